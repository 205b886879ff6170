"Settings: what loads, what is refused and how, what is written back."
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from worldmodels_nb import settings as chapter
from worldmodels_nb.settings import (
    LossSettings,
    RewardMLPSettings,
    Settings,
    SettingsError,
    VJEPA2Settings,
    load_settings,
    make_settings,
    nearest,
    pick_device,
    read_json,
    read_presets,
    refusal,
    repo_root,
    save_settings,
    section_keys,
    sections,
    seed_everything,
    settings_table,
    write_json,
    write_whole,
)

FILE = repo_root() / "settings.ini"
PRESETS = ["smoke", "demo", "study", "atari", "seed"]


# --- round trips and layers

@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_resolved_settings_round_trip(tmp_path, preset):
    used = load_settings(FILE, preset, {"env.kwargs": {"wall": "random"}, "run.seed": 7})
    assert load_settings(save_settings(used, tmp_path / "resolved.ini")) == used


@limits(max_examples=25, deadline=None)
@given(steps=st.integers(1, 10**6), rate=st.floats(1e-8, 1.0), path=st.none() | st.text(max_size=20),
       horizons=st.lists(st.integers(1, 99), min_size=1))
def test_any_value_round_trips(tmp_path_factory, steps, rate, path, horizons):
    used = make_settings({"train": {"steps": steps, "learning_rate": rate}, "collect.ppo": {"load": path},
                          "evaluation": {"horizons": horizons}})
    assert load_settings(save_settings(used, tmp_path_factory.mktemp("s") / "s.ini")) == used


def test_the_saved_file_names_every_setting(tmp_path):
    path = save_settings(Settings(), tmp_path / "resolved.ini")
    assert "[loss.dino]\nweight = 0.0\n" in path.read_text(encoding="utf-8")
    assert chapter._read_ini(path) == {
        name: {key: Settings().flat()[f"{name}.{key}"] for key in section_keys(kind)}
        for name, kind in sections().items()}


def test_later_layers_win(tmp_path):
    path = tmp_path / "s.ini"
    path.write_text("[train]\nsteps = 5\nbatch_size = 7\n[quick/train]\nsteps = 6\n")
    assert load_settings(path).train.steps == 5
    assert load_settings(path, "quick").train.steps == 6
    last = load_settings(path, "quick", {"train.steps": 8}).train
    assert (last.steps, last.batch_size) == (8, 7)


def test_layers_reach_sections_inside_sections(tmp_path):
    path = tmp_path / "s.ini"
    path.write_text("[vjepa2.action]\nheads = 4\n[quick/vjepa2.action]\nwindow_steps = 6\n")
    last = load_settings(path, "quick", {"vjepa2.action.rollout_steps": 5}).vjepa2
    assert (last.action.heads, last.action.window_steps, last.action.rollout_steps) == (4, 6, 5)
    assert last.pretrain == VJEPA2Settings().pretrain


def test_the_file_holds_the_defaults_and_need_not_name_every_key(tmp_path):
    assert load_settings(FILE) == Settings()
    (tmp_path / "empty.ini").write_text("")
    assert load_settings(tmp_path / "empty.ini") == Settings()


# --- sections inside sections

def test_every_section_is_found_under_its_dotted_name():
    names = list(sections())
    assert {"collect", "collect.ppo", "encoder.vit", "vjepa2.pretrain", "vjepa2.action", "loss", "loss.dino",
            "train", "train.state_decoder", "train.reward_mlp", "train.larp", "evaluation",
            "evaluation.probe"} <= set(names)
    assert "encoder" not in names and "vjepa2" not in names     # groups without keys of their own
    for name, kind in sections().items(): assert type(Settings().section(name)) is kind
    assert Settings().section("loss.dyno") is None and Settings().section("env.size") is None
    assert Settings().section("nothing") is None


def test_flat_names_every_setting_once():
    flat = Settings().flat()
    assert list(flat) == [row["key"] for row in settings_table()]
    assert flat["loss.dino.center_decay"] == .9 and flat["vjepa2.pretrain.frames"] == 4
    assert not [key for key in flat if isinstance(flat[key], chapter.Section)]


def test_values_may_be_given_by_dotted_names_or_nested():
    dotted = make_settings({"loss": {"jepa": 2.0}, "loss.dino": {"weight": 0.5}})
    assert dotted.loss.jepa == 2.0 and dotted.loss.dino.weight == .5
    assert dotted == Settings(loss=dict(jepa=2.0, dino=dict(weight=.5)))


# --- terms of the loss

@pytest.fixture
def toy_term(monkeypatch):
    monkeypatch.setitem(chapter.FURTHER_TERMS, "toy", 0.25)


@pytest.mark.parametrize("name, weight", [
    ("prediction", 8.0), ("variance", 16.0), ("covariance", .06), ("barlow", 0.0), ("dino", 0.0),
    ("sigreg", 0.0)])
def test_every_term_has_a_weight(name, weight):
    assert LossSettings().weight(name) == weight
    used = make_settings({f"loss.{name}": {"weight": 3.0}} if name in ("barlow", "dino", "sigreg")
                         else {"loss": {name: 3.0}})
    assert used.loss.weight(name) == 3.0


def test_a_declared_term_has_a_key_of_its_own(toy_term, tmp_path):
    assert Settings().loss.weight("toy") == .25
    used = make_settings({"loss": {"toy": 2.0}})
    assert used.loss.weight("toy") == 2.0 and used.flat()["loss.toy"] == 2.0
    again = load_settings(save_settings(used, tmp_path / "s.ini"))
    assert again == used and again.loss.weight("toy") == 2.0
    assert load_settings(FILE, overrides={"loss.toy": 3.0}).loss.weight("toy") == 3.0


@pytest.mark.parametrize("values, words", [
    ({"toi": 1.0}, ["unknown setting 'loss.toi'", "'toy'"]),
    ({"varience": 1.0}, ["unknown setting 'loss.varience'", "'variance'"]),
    ({"toy": -1.0}, ["loss.toy", "-1.0", "greater than or equal to 0"]),
    ({"toy": "much"}, ["loss.toy", "'much'"])])
def test_a_declared_term_is_checked_and_a_misprint_is_still_one(toy_term, values, words):
    said = refusal(lambda: make_settings({"loss": values}))
    assert all(word in said for word in words) and "\n" not in said, said


def test_an_undeclared_term_is_a_misprint():
    assert "unknown setting 'loss.toy'" in refusal(lambda: make_settings({"loss": {"toy": 1.0}}))


# --- recipes

def test_a_recipe_is_train_with_the_parts_own_keys_over_it():
    mine = make_settings({"train": {"epochs": 2.0, "window_steps": 3}, "jepa": {"learning_rate": 1e-4},
                          "train.larp": {"epochs": 5.0}})
    assert (mine.recipe("encdec").learning_rate, mine.recipe("encdec").epochs) == (2e-3, 2.0)
    assert (mine.recipe("jepa").learning_rate, mine.recipe("jepa").epochs) == (1e-4, 2.0)
    decoder = mine.recipe("train.state_decoder")
    assert (decoder.steps, decoder.epochs) == (400, None)
    assert mine.recipe("train.larp").epochs == 5.0
    assert mine.recipe("nothing") == mine.recipe("encdec") and mine.recipe("jepa").window_steps == 3
    action = make_settings({}).recipe("vjepa2.action")
    assert (action.steps, action.batch_size, action.learning_rate) == (8000, 8, 3.5e-3)


def test_reward_heads_share_one_recipe():
    mine = make_settings({"train.reward_mlp": {"hidden": [8], "steps": 7, "dropout": .1},
                          "train.larp": {"hidden": [9, 9], "batch_size": 5, "enabled": False}})
    assert mine.reward_head("reward_mlp") == mine.train.reward_mlp
    larp = mine.reward_head("larp")
    assert isinstance(larp, RewardMLPSettings)
    assert (larp.hidden, larp.steps, larp.batch_size, larp.dropout) == ([9, 9], 7, 5, .1)
    assert not larp.enabled and mine.train.reward_mlp.enabled
    assert (mine.recipe("train.larp").steps, mine.recipe("train.larp").batch_size) == (7, 5)
    epochs = make_settings({"train.larp": {"epochs": 2.0}}).reward_head("larp")
    assert (epochs.epochs, epochs.hidden) == (2.0, [256, 256, 256])


# --- refusals

@pytest.mark.parametrize("text, words", [
    ("[env]\nidd = \"CartPole-v1\"\n", ["env.idd", "env.id"]),
    ("[envv]\nid = \"CartPole-v1\"\n", ["envv", "env"]),
    ("[env]\nid = CartPole-v1\n", ["env", "CartPole-v1", "quotes"]),
    ("[env]\nsize = \"64\"\n", ["env.size", "'64'", "integer"]),
    ("[env]\nsize = 1000\n", ["env.size", "1000", "≤ 512"]),
    ("[env]\nsize = 60\n", ["env.size = 60", "patch_size = 8"]),
    ("[env]\ncolor = \"gray\"\n", ["env.color", "gray", "grey"]),
    ("[train]\nlearning_rate = NaN\n", ["train.learning_rate", "finite"]),
    ("[train]\nsteps = true\n", ["train.steps", "True"]),
    ("[model]\nencoder = \"vit\"\nlatent_dim = 30\n", ["model.latent_dim = 30", "4 attention heads"]),
    ("[run]\nmodels = []\n", ["run.models"]),
    ("[collect.ppo]\npolicy_type = \"MultiInputPolicy\"\n", ["collect.ppo.policy_type", "CnnPolicy"]),
    ("[fast/train]\nstep = 3\n", ["train.step", "train.steps"]),
    ("[loss.dino]\nwait = 1.0\n", ["loss.dino.wait", "loss.dino.weight"]),
    ("[vjepa2.action]\nheads = 0\n", ["vjepa2.action.heads", "≥ 1"]),
    ("[fast/vjepa2.action]\nwindow_steps = 2\n", ["preset fast", "vjepa2.action.context_length = 4"]),
    ("[env\nid = 3\n", ["settings.ini"]),
    ("[env]\nid = \"a\"\nid = \"b\"\n", ["already exists"]),
])
def test_what_is_wrong_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "settings.ini"
    path.write_text(text)
    with pytest.raises(SettingsError) as refused: load_settings(path)
    said = str(refused.value)
    assert all(word in said for word in words) and "\n" not in said, said


@pytest.mark.parametrize("section, values, words", [
    ("vjepa2.pretrain", {"frames": 5, "tubelet_size": 2}, ["5 is not divisible", "tubelet_size = 2"]),
    ("vjepa2.pretrain", {"dim": 10}, ["dim = 10", "heads = 4", "width 6 or more"]),
    ("vjepa2.pretrain", {"predictor_dim": 10}, ["predictor_dim = 10", "predictor_heads = 3"]),
    ("vjepa2.pretrain", {"blocks": [1]}, ["names 1 masks and vjepa2.pretrain.scales 2"]),
    ("vjepa2.pretrain", {"aspect": [2.0, 1.0]}, ["aspect = [2.0, 1.0]", "turn them round"]),
    ("vjepa2.pretrain", {"ema_end": 0.5}, ["ema_start = 0.99", "ema_end = 0.5"]),
    ("vjepa2.action", {"window_steps": 3}, ["context_length = 4", "window_steps = 3"]),
    ("vjepa2.action", {"rollout_steps": 9}, ["rollout_steps = 9", "window_steps = 4"])])
def test_settings_of_one_section_that_do_not_fit_together(section, values, words):
    said = refusal(lambda: make_settings({section: values}))
    assert all(word in said for word in words) and "\n" not in said, said


def test_settings_of_two_sections_that_do_not_fit_together():
    no_grid = {"model": {"tokens": True, "encoder": "mlp"}}
    assert "model.encoder = 'mlp' has no grid" in refusal(lambda: make_settings(no_grid))
    one_view = {"loss": {"invariance": 1.0, "views": "one"}}
    assert "loss.invariance compares two views" in refusal(lambda: make_settings(one_view))


def test_missing_file_preset_and_device():
    with pytest.raises(SettingsError, match="no settings file"): load_settings("/nowhere/settings.ini")
    with pytest.raises(SettingsError, match="nearest known one is 'smoke'"): load_settings(FILE, "smok")
    with pytest.raises(SettingsError, match="section.key"): load_settings(FILE, overrides={"steps": 3})
    with pytest.raises(SettingsError, match="run.device"): pick_device("tpu")


def test_the_repository_is_found_from_anywhere(tmp_path):
    assert repo_root(tmp_path) == repo_root("/") == repo_root(FILE.parent / "nbs" / "0_data") == FILE.parent


def test_refusal_hands_back_the_sentence_and_insists_on_one():
    def refuse(): raise SettingsError("not like this")
    def break_down(): raise KeyError("something else")
    assert refusal(refuse) == "not like this"
    with pytest.raises(AssertionError, match="was not refused"): refusal(lambda: 3)
    with pytest.raises(KeyError, match="something else"): refusal(break_down)


def test_settings_cannot_be_changed_once_made():
    with pytest.raises(ValueError, match="frozen"): Settings().train.steps = 3


def test_the_nearest_word_is_named_or_none():
    named = "; the nearest known one is 'learning_rate'"
    assert nearest("learning_rte", ["learning_rate", "batch_size"]) == named
    assert nearest("train.learning_rte", ["learning_rate"]) == named
    assert nearest("qqqq", ["learning_rate"]) == ""


# --- presets

def test_presets_are_found_in_the_file_and_beside_it():
    assert sorted(read_presets(FILE)) == sorted(PRESETS)
    assert (repo_root() / "data" / "presets" / "seed.ini").is_file()
    assert "[seed/" not in FILE.read_text(encoding="utf-8")
    assert load_settings(FILE, "seed").env.id == "ALE/Assault-v5"


def test_a_preset_in_a_file_of_its_own_is_checked_like_the_others(tmp_path):
    path, own = tmp_path / "settings.ini", tmp_path / "data" / "presets"
    own.mkdir(parents=True)
    path.write_text("[train]\nsteps = 5\n")
    (own / "long.ini").write_text("[train]\nsteps = 50\n[loss.dino]\nweight = 1.0\n")
    used = load_settings(path, "long")
    assert used.train.steps == 50 and used.loss.dino.weight == 1.0 and load_settings(path).train.steps == 5
    assert list(read_presets(path)) == ["long"]
    (own / "wrong.ini").write_text("[train]\nstep = 50\n")
    said = refusal(lambda: load_settings(path))
    assert "preset wrong" in said and "train.step" in said


# --- files

def test_every_knob_has_a_reason():
    rows = settings_table()
    assert len(rows) == sum(len(section_keys(kind)) for kind in sections().values())
    assert len({row["key"] for row in rows}) == len(rows)
    assert all(len(row["reason"]) > 5 for row in rows)
    assert [row["key"] for row in settings_table("loss.sigreg")] == [
        "loss.sigreg.weight", "loss.sigreg.directions", "loss.sigreg.points", "loss.sigreg.largest"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError): write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_carries_its_version_and_is_read_back(tmp_path):
    path = tmp_path / "result.json"
    content = dict(steps=600, name="κ", curve=[1.5, None])
    assert write_json(path, content, schema=2) == dict(schema_version=2) | content
    assert read_json(path, schema=2) == dict(schema_version=2) | content
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == read_json(path, 2) and "κ" in text
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert read_json(tmp_path / "missing.json") is None


@pytest.mark.parametrize("text, words", [
    ("{\"schema_version\": 3}", ["schema version 3", "reads 2", "train it again"]),
    ("{\"steps\": 3}", ["schema version None", "reads 2"]), ("[1, 2]", ["schema version None"]),
    ("{\"schema_version\": 2", ["damaged", "train it again"]), ("\0\xff", ["damaged"])])
def test_json_of_another_version_or_damaged_is_refused(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode("latin-1"))
    said = refusal(lambda: read_json(path, schema=2, mend="train it again"))
    assert str(path) in said and all(word in said for word in words) and "\n" not in said, said


# --- seeds and devices

def test_one_seed_starts_every_generator_anew():
    def draw():
        rng = seed_everything(7)
        return rng.random(), np.random.random(), torch.rand(1).item(), chapter.random.random()
    assert draw() == draw() and len(set(draw())) == 4
    assert pick_device("cpu") == torch.device("cpu") and pick_device().type in ("cpu", "cuda", "mps")
