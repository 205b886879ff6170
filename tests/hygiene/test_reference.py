"The two chapters for looking things up: complete, true of the code, and no older than it."
import ast
import json
from pkgutil import resolve_name

import nbformat
import pytest
from IPython.display import Markdown

from worldmodels_nb.settings import (
    LarpSettings,
    load_settings,
    read_json,
    read_presets,
    repo_root,
    section_keys,
    sections,
)

ROOT = repo_root()
FOLDER = ROOT / "nbs" / "9_reference"
REFERENCE, DICTIONARY = "91_settings_reference", "90_coming_from_the_seed_project"
OURS = [f"{name}.{key}" for name, kind in sections().items() for key in section_keys(kind)]
PRESETS = read_presets(ROOT / "settings.ini")
SEED = read_json(ROOT / "data" / "seed_settings.json")["settings"]
PROGRAMS = read_json(ROOT / "data" / "seed_programs.json")

# The seed project's configuration, written down once more: key or group of keys, one group a line
THEIRS = {
    "environment": "name frame_stack_size image_height image_width",
    "data": "collection.num_episodes collection.max_steps_per_episode dataset.dir dataset.load_path "
            "dataset.filename validation_split",
    "model_loading": "dir load_path model_type_to_load",
    "training": "num_epochs batch_size learning_rate num_workers log_interval frame_skipping "
                "options.skip_std_enc_dec_training_if_loaded options.skip_jepa_training_if_loaded",
    "training.early_stopping": "patience delta metric_enc_dec checkpoint_path_enc_dec metric_jepa "
                               "checkpoint_path_jepa",
    "models": "shared_latent_dim shared_patch_size encoder.type",
    "models.encoder.params.vit": "depth heads mlp_dim pool dropout emb_dropout",
    "models.encoder.params.cnn": "num_conv_layers base_filters kernel_size stride padding activation_fn_str "
                                 "fc_hidden_dim dropout_rate",
    "models.encoder.params.mlp": "num_hidden_layers hidden_dim activation_fn_str dropout_rate",
    "models.standard_encoder_decoder": "variant action_emb_dim decoder_dim decoder_depth decoder_heads "
                                       "decoder_mlp_dim decoder_dropout decoder_patch_size",
    "models.jepa": "learning_rate predictor_hidden_dims predictor_dropout_rate ema_decay target_encoder_mode",
    "models.jepa.decoder_training": "enabled num_epochs learning_rate checkpoint_path validation_plot_dir "
                                    "early_stopping.patience early_stopping.delta early_stopping.metric",
    "models.reward_predictors.reward_mlp": "enabled input_type hidden_dims num_epochs activation "
                                           "use_batch_norm learning_rate log_interval dropout_rate "
                                           "early_stopping_patience",
    "models.reward_predictors.larp": "enabled hidden_dims num_epochs activation use_batch_norm learning_rate "
                                     "log_interval dropout_rate early_stopping_patience",
    "models.auxiliary_loss": "type use_for_jepa use_for_enc_dec weight",
    "models.auxiliary_loss.params": "vicreg.sim_coeff vicreg.std_coeff vicreg.cov_coeff vicreg.eps "
                                    "vicreg.proj_hidden_dim vicreg.proj_output_dim "
                                    "barlow_twins.lambda_param barlow_twins.eps barlow_twins.scale_loss "
                                    "dino.center_ema_decay dino.eps",
    "ppo_agent": "enabled n_envs use_subproc_vec_env action_repetition_k learning_rate total_train_timesteps "
                 "n_steps batch_size n_epochs gamma gae_lambda clip_range additional_log_std_noise "
                 "policy_type",
    "vjepa2_world_model.stage1": "masking_ratio mask_token_dim ema_decay num_epochs learning_rate "
                                 "early_stopping_patience weight_decay",
    "vjepa2_world_model.stage2": "sequence_length teacher_forcing_ratio rollout_steps num_epochs "
                                 "learning_rate early_stopping_patience weight_decay",
    "wandb": "project entity run_name_prefix enabled",
}

# What its main program does, in order; each is told from the others by these words of it
ORDER = ["configuration", "tracking", "device", "folders", "action space", "data", "split", "models",
         "saved weights", "losses", "optimisers", "encoder-decoder and JEPA", "stop early", "state decoder",
         "reward MLPs", "LARPs", "load the best", "evaluation mode"]


def cells(stem):
    notebook = nbformat.read(FOLDER / f"{stem}.ipynb", as_version=4)
    return [c for c in notebook.cells if c.cell_type == "code"]


def stored(stem):
    "The tables as they stand in the notebook file."
    outputs = [o for c in cells(stem) for o in c.outputs]
    return [text for o in outputs if (text := o.get("data", {}).get("text/markdown"))]


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


def fresh(stem):
    path = f"nbs/9_reference/{stem}.ipynb"
    return (f"{path} is older than the code: jupyter nbconvert --to notebook --inplace --execute {path}, "
            "then nbdev-clean")


@pytest.fixture(scope="module")
def reference(): return run(REFERENCE)


@pytest.fixture(scope="module")
def dictionary(): return run(DICTIONARY)


def rows(text):
    "The cells of a Markdown table, without its head."
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    unbarred = [line.strip("| ").replace("\\|", "\0") for line in lines[2:]]
    return [[part.strip() for part in line.split(" | ")] for line in unbarred]


def split(tables):
    "Tables of sections, and the others."
    return [t for t in tables if t.startswith("**`[")], [t for t in tables if not t.startswith("**`[")]


def preset_keys():
    overlays = [(preset, name, own) for preset, overlay in PRESETS.items() for name, own in overlay.items()]
    return [(preset, f"{name}.{key}") for preset, name, own in overlays for key in own]


def found_preset_keys(tables):
    return [(t.split("`")[1], row[0].strip("`")) for t in tables for row in rows(t)]


def test_reference_has_every_setting_once_with_its_reason(reference):
    tables, presets = split(reference[1])
    shown = [row for t in tables for row in rows(t)]
    assert [t.split("`")[1] for t in tables] == [f"[{name}]" for name in sections()]
    assert [row[0].strip("`") for row in shown] == OURS and len(set(OURS)) == len(OURS)
    assert all(len(row) == 5 and len(row[4]) > 5 for row in shown)
    assert all(kind.__doc__ in t for t, kind in zip(tables, sections().values()))
    assert sorted(found_preset_keys(presets)) == sorted(preset_keys())


def test_every_preset_is_in_the_reference_with_what_it_is_for(reference):
    _, presets = split(reference[1])
    assert {"smoke", "demo", "study", "atari", "seed"} <= set(PRESETS)
    assert [t.split("`")[1] for t in presets] == list(PRESETS)
    assert all(len(t.splitlines()[0].split("** ")[1]) > 5 for t in presets)


def test_stored_reference_is_what_the_code_says(reference):
    (kept, kept_presets), (made, made_presets) = split(stored(REFERENCE)), split(reference[1])
    assert [row[0].strip("`") for t in kept for row in rows(t)] == OURS, fresh(REFERENCE)
    assert kept == made, fresh(REFERENCE)
    assert sorted(found_preset_keys(kept_presets)) == sorted(preset_keys()), fresh(REFERENCE)
    assert kept_presets == made_presets, fresh(REFERENCE)


def test_stored_outputs_are_small():
    for stem in (REFERENCE, DICTIONARY):
        assert len(json.dumps([c.outputs for c in cells(stem)])) < 100_000


def their_keys(): return [f"{group}.{key}" for group, keys in THEIRS.items() for key in keys.split()]


def claims():
    "(their key, our key, the value that preset seed is to hold)."
    for group, entries in SEED.items():
        for key, entry in entries.items():
            ours = entry["ours"]
            held = ours if isinstance(ours, dict) else dict.fromkeys(ours, entry["default"])
            yield from ((f"{group}.{key}", name, value) for name, value in held.items())


def preset_values():
    "What preset seed holds, a reward head's settings as they come out when they have been laid over."
    preset = load_settings(ROOT / "settings.ini", "seed")
    larp = preset.reward_head("larp")
    return preset.flat() | {f"train.larp.{key}": getattr(larp, key) for key in LarpSettings.model_fields}


def test_dictionary_has_every_key_of_the_seed_project():
    listed = [f"{group}.{key}" for group, entries in SEED.items() for key in entries]
    assert sorted(listed) == sorted(their_keys()) and len(set(listed)) == len(listed)
    silent = [entry for entries in SEED.values() for entry in entries.values()
              if not entry["ours"] and not entry["remark"]]
    assert silent == [], "nothing to set, and no reason why"


def test_dictionary_names_settings_that_exist():
    assert [(theirs, ours) for theirs, ours, _ in claims() if ours not in OURS] == []


def test_preset_seed_holds_what_the_dictionary_claims():
    preset, claimed = preset_values(), list(claims())
    wrong = [(theirs, ours, value, preset[ours]) for theirs, ours, value in claimed]
    unlike = [w for w in wrong if w[2] != w[3] or isinstance(w[2], bool) != isinstance(w[3], bool)]
    assert len(claimed) > 100 and unlike == []


def test_programs_name_things_that_exist_in_the_order_of_the_main_program():
    steps = PROGRAMS["main.py"] + PROGRAMS["main_vjepa2.py"]
    for name in {name for step in steps for name in step["ours"]}: resolve_name(f"worldmodels_nb.{name}")
    done = [step["step"] for step in PROGRAMS["main.py"]]
    assert all(words in step for words, step in zip(ORDER, done)) and len(done) == len(ORDER) + 2
    stages = [step["stage"].split("`")[1] for step in PROGRAMS["main.py"][4:-1]]
    assert list(dict.fromkeys(stage for stage in stages if stage != "train")) == ["data", "heads", "evaluate"]


def test_stored_dictionary_shows_every_key_and_is_what_the_code_says(dictionary):
    bold = [t for t in stored(DICTIONARY) if t.startswith("**`")]
    tables = {t.split("`")[1]: [row[0].strip("`") for row in rows(t)] for t in bold}
    shown = [f"{group}.{key}" for group, keys in tables.items() for key in keys]
    assert sorted(shown) == sorted(their_keys()), fresh(DICTIONARY)
    assert stored(DICTIONARY) == dictionary[1], fresh(DICTIONARY)
