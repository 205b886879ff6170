"The two chapters for looking things up: complete, true of the code, and no older than it."
import ast, json
import nbformat
import pytest
from IPython.display import Markdown
from worldmodels_nb.settings import Settings, _read_ini, load_settings, repo_root

ROOT = repo_root()
REFERENCE, DICTIONARY = "91_settings_reference", "90_coming_from_the_seed_project"
RAW = _read_ini(ROOT / "settings.ini")
OURS = [f"{section}.{key}" for section, field in Settings.model_fields.items() for key in field.annotation.model_fields]

# The seed project's configuration, written down once more: key or group of keys, one group a line
THEIRS = {
    "environment": "name frame_stack_size image_height image_width",
    "data": "collection.num_episodes collection.max_steps_per_episode dataset.dir dataset.load_path dataset.filename validation_split",
    "model_loading": "dir load_path model_type_to_load",
    "training": "num_epochs batch_size learning_rate num_workers log_interval frame_skipping "
                "options.skip_std_enc_dec_training_if_loaded options.skip_jepa_training_if_loaded",
    "training.early_stopping": "patience delta metric_enc_dec checkpoint_path_enc_dec metric_jepa checkpoint_path_jepa",
    "models": "shared_latent_dim shared_patch_size encoder.type",
    "models.encoder.params.vit": "depth heads mlp_dim pool dropout emb_dropout",
    "models.encoder.params.cnn": "num_conv_layers base_filters kernel_size stride padding activation_fn_str fc_hidden_dim dropout_rate",
    "models.encoder.params.mlp": "num_hidden_layers hidden_dim activation_fn_str dropout_rate",
    "models.standard_encoder_decoder": "variant action_emb_dim decoder_dim decoder_depth decoder_heads decoder_mlp_dim decoder_dropout decoder_patch_size",
    "models.jepa": "learning_rate predictor_hidden_dims predictor_dropout_rate ema_decay target_encoder_mode",
    "models.jepa.decoder_training": "enabled num_epochs learning_rate checkpoint_path validation_plot_dir early_stopping.patience early_stopping.delta early_stopping.metric",
    "models.reward_predictors.reward_mlp": "enabled input_type hidden_dims num_epochs activation use_batch_norm learning_rate log_interval dropout_rate early_stopping_patience",
    "models.reward_predictors.larp": "enabled hidden_dims num_epochs activation use_batch_norm learning_rate log_interval dropout_rate early_stopping_patience",
    "models.auxiliary_loss": "type use_for_jepa use_for_enc_dec weight",
    "models.auxiliary_loss.params": "vicreg.sim_coeff vicreg.std_coeff vicreg.cov_coeff vicreg.eps vicreg.proj_hidden_dim vicreg.proj_output_dim "
                                    "barlow_twins.lambda_param barlow_twins.eps barlow_twins.scale_loss dino.center_ema_decay dino.eps",
    "ppo_agent": "enabled n_envs use_subproc_vec_env action_repetition_k learning_rate total_train_timesteps n_steps batch_size n_epochs gamma gae_lambda "
                 "clip_range additional_log_std_noise policy_type",
    "vjepa2_world_model.stage1": "masking_ratio mask_token_dim ema_decay num_epochs learning_rate early_stopping_patience weight_decay",
    "vjepa2_world_model.stage2": "sequence_length teacher_forcing_ratio rollout_steps num_epochs learning_rate early_stopping_patience weight_decay",
    "wandb": "project entity run_name_prefix enabled",
}
LATER = {"vjepa2_world_model.stage1": "masked", "vjepa2_world_model.stage2": "ac"}  # shown once Settings has the section


def cells(stem): return [c for c in nbformat.read(ROOT / "nbs" / f"{stem}.ipynb", as_version=4).cells if c.cell_type == "code"]


def stored(stem):
    "The tables as they stand in the notebook file."
    return [text for c in cells(stem) for o in c.outputs if (text := o.get("data", {}).get("text/markdown"))]


def run(stem):
    "A chapter's cells, run here: its variables, and the tables it shows."
    shown = []
    names = {"display": shown.append}
    for cell in cells(stem):
        tree = ast.parse(cell.source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, stem, "exec"), names)
        if last: shown.append(eval(compile(ast.Expression(last.value), stem, "eval"), names))
    return names, [thing.data for thing in shown if isinstance(thing, Markdown)]


def fresh(stem): return f"nbs/{stem}.ipynb is older than the code: jupyter nbconvert --to notebook --inplace --execute nbs/{stem}.ipynb, then nbdev-clean"


@pytest.fixture(scope="module")
def reference(): return run(REFERENCE)


@pytest.fixture(scope="module")
def dictionary(): return run(DICTIONARY)


def rows(text):
    "The cells of a Markdown table, without its head."
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in line.strip("| ").replace("\\|", "\0").split(" | ")] for line in lines[2:]]


def split(tables): return [t for t in tables if t.startswith("**`[")], [t for t in tables if not t.startswith("**`[")]


def preset_keys(): return [(name.split("/")[0], f"{name.split('/')[1]}.{key}") for name, keys in RAW.items() if "/" in name for key in keys]


def found_preset_keys(tables): return [(t.split("`")[1], row[0].strip("`")) for t in tables for row in rows(t)]


def test_reference_has_every_setting_once_with_its_reason(reference):
    sections, presets = split(reference[1])
    assert [t.split("`")[1] for t in sections] == [f"[{section}]" for section in Settings.model_fields]
    assert [row[0].strip("`") for t in sections for row in rows(t)] == OURS
    assert all(len(row) == 5 and len(row[4]) > 5 for t in sections for row in rows(t))
    assert all(field.annotation.__doc__ in t for t, field in zip(sections, Settings.model_fields.values()))
    assert sorted(found_preset_keys(presets)) == sorted(preset_keys())


def test_stored_reference_is_what_the_code_says(reference):
    (kept, kept_presets), (made, _) = split(stored(REFERENCE)), split(reference[1])
    assert [row[0].strip("`") for t in kept for row in rows(t)] == OURS, fresh(REFERENCE)
    assert kept == made, fresh(REFERENCE)
    assert sorted(found_preset_keys(kept_presets)) == sorted(preset_keys()), fresh(REFERENCE)


def test_stored_outputs_are_small():
    for stem in (REFERENCE, DICTIONARY): assert len(json.dumps([c.outputs for c in cells(stem)])) < 100_000


def their_keys(): return [f"{group}.{key}" for group, keys in THEIRS.items() for key in keys.split()]


def claims(seed):
    "(their key, our key, the value that preset seed is to hold) for what is shown."
    for prefix, entries in seed.items():
        if LATER.get(prefix, "run") not in Settings.model_fields: continue
        for key, default, ours, _ in entries:
            yield from ((f"{prefix}.{key}", name, value) for name, value in (ours if isinstance(ours, dict) else dict.fromkeys(ours.split(), default)).items())


def test_dictionary_has_every_key_of_the_seed_project(dictionary):
    listed = [f"{prefix}.{key}" for prefix, entries in dictionary[0]["SEED"].items() for key, *_ in entries]
    assert sorted(listed) == sorted(their_keys()) and len(set(listed)) == len(listed)
    assert all(ours or remark for entries in dictionary[0]["SEED"].values() for _, _, ours, remark in entries), "nothing to set, and no reason why"


def test_dictionary_names_settings_that_exist(dictionary):
    assert [(theirs, ours) for theirs, ours, _ in claims(dictionary[0]["SEED"]) if ours not in OURS] == []


def test_preset_seed_holds_what_the_dictionary_claims(dictionary):
    preset = load_settings(ROOT / "settings.ini", "seed").model_dump()
    claimed = list(claims(dictionary[0]["SEED"]))
    wrong = [(theirs, ours, value, preset[ours.split(".")[0]][ours.split(".")[1]]) for theirs, ours, value in claimed]
    assert len(claimed) > 100 and [w for w in wrong if w[2] != w[3] or isinstance(w[2], bool) != isinstance(w[3], bool)] == []


def test_stored_dictionary_shows_every_key_and_is_what_the_code_says(dictionary):
    tables = {t.split("`")[1]: [row[0].strip("`") for row in rows(t)] for t in stored(DICTIONARY) if t.startswith("**`")}
    shown = [key for key in their_keys() if LATER.get(".".join(key.split(".")[:2]), "run") in Settings.model_fields]
    assert sorted(f"{prefix}.{key}" for prefix, keys in tables.items() for key in keys) == sorted(shown), fresh(DICTIONARY)
    assert stored(DICTIONARY) == dictionary[1], fresh(DICTIONARY)
