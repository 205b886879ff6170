"Settings: what loads, what is refused and how, what is written back."
import datetime
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
    expand,
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
    shipped,
    write_json,
    write_whole,
)

FILE = repo_root() / "settings.ini"
PRESETS = ["smoke", "demo", "study", "walls", "atari", "seed", "sample"]


# --- round trips and layers

@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_resolved_settings_round_trip(tmp_path, preset):
    used = load_settings(FILE, preset, {"env.kwargs": {"wall": "random"}, "run.seed": 7})
    assert load_settings(save_settings(used, tmp_path / "resolved.ini")) == used


@limits(max_examples=25, deadline=None)
@given(steps=st.integers(1, 10**6), rate=st.floats(1e-8, 1.0),
       path=st.none() | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
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


@pytest.fixture
def write(tmp_path):
    "write(text, **presets): a settings file, and presets in files beside it."
    def _write(text, **presets):
        (tmp_path / "data" / "presets").mkdir(parents=True, exist_ok=True)
        for name, own in presets.items():
            (tmp_path / "data" / "presets" / f"{name}.ini").write_text(own)
        (tmp_path / "settings.ini").write_text(text, encoding="utf-8")
        return tmp_path / "settings.ini"
    return _write


COHERENT = [  # sections that fit as a whole, and one key of theirs that does not fit the defaults by itself
    ({"env": {"size": 84}, "model": {"patch_size": 7}, "decoder": {"patch_size": 14}}, "model.patch_size", 7),
    ({"model": {"encoder": "vit", "latent_dim": 90}, "encoder.vit": {"heads": 3}}, "model.latent_dim", 90),
    ({"vjepa2.action": {"window_steps": 2, "context_length": 2, "rollout_steps": 2}},
     "vjepa2.action.window_steps", 2),
    ({"loss": {"views": "one", "invariance": 0.0}}, "loss.views", "one"),
    ({"vjepa2.pretrain": {"blocks": [4], "scales": [0.5]}}, "vjepa2.pretrain.blocks", [4])]


def as_text(values, preset=""):
    lines = [f"[{preset}{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
             for name, own in values.items()]
    return "".join(lines)


@pytest.mark.parametrize("values, key, value", COHERENT)
def test_a_preset_that_fits_as_a_whole_is_taken(write, values, key, value):
    assert load_settings(write(as_text(values, "own/")), "own").flat()[key] == value
    assert load_settings(write(as_text(values, "own/"))) == Settings()
    beside = write("[train]\nsteps = 9\n", own=as_text(values))
    assert load_settings(beside, "own").flat()[key] == value and load_settings(beside).train.steps == 9


@pytest.mark.parametrize("base, preset", [
    ({"env": {"size": 84}, "model": {"patch_size": 7}, "decoder": {"patch_size": 14}}, {"env": {"size": 32}}),
    ({"vjepa2.action": {"window_steps": 2, "context_length": 2, "rollout_steps": 2}},
     {"vjepa2.action": {"context_length": 3}}),
    ({"model": {"encoder": "vit", "latent_dim": 90}, "encoder.vit": {"heads": 3}},
     {"encoder.vit": {"heads": 4}}),
    ({"model": {"tokens": True}}, {"model": {"encoder": "mlp"}})])
def test_a_preset_that_only_misses_this_file_is_refused_when_it_is_chosen(write, base, preset):
    path = write(as_text(base) + as_text(preset, "other/"))
    assert load_settings(path) == make_settings(base)
    assert "settings.ini with preset other: " in refusal(lambda: load_settings(path, "other"))


@pytest.mark.parametrize("preset, words", [
    ({"env": {"sise": 32}}, "env.sise"), ({"env": {"size": "32"}}, "env.size"),
    ({"train": {"steps": 0}}, "≥ 1"),
    ({"trian": {"steps": 3}}, "trian"), ({"env": {"size": 84}}, "model.patch_size = 8"),
    ({"vjepa2.pretrain": {"frames": 5, "tubelet_size": 2}}, "tubelet_size = 2")])
@pytest.mark.parametrize("chosen", [None, "fine", "wrong"])
def test_a_preset_that_is_wrong_by_itself_is_always_refused(write, preset, words, chosen):
    for path in (write(as_text(preset, "wrong/") + "[fine/train]\nsteps = 3\n"),
                 write("[fine/train]\nsteps = 3\n", wrong=as_text(preset))):
        said = refusal(lambda path=path: load_settings(path, chosen))
        assert "with preset wrong" in said and words in said and "\n" not in said


@pytest.mark.parametrize("preset, overrides", [
    ({"env": {"size": 84}}, {"model.patch_size": 7, "decoder.patch_size": 14}),
    ({"vjepa2.action": {"window_steps": 2}},
     {"vjepa2.action.context_length": 2, "vjepa2.action.rollout_steps": 1}),
    ({"vjepa2.pretrain": {"blocks": [4]}}, {"vjepa2.pretrain.scales": [0.5]}),
    ({"loss": {"invariance": 2.0}}, {"loss.views": "two"})])
def test_overrides_may_complete_a_preset(write, preset, overrides):
    path = write(as_text(preset, "half/"))
    flat = load_settings(path, "half", overrides).flat()
    assert all(flat[key] == value for key, value in overrides.items())


# --- what only another language says

def advised(path):
    said = refusal(lambda: load_settings(path))
    assert len(said.splitlines()) == 1 and len(said) < 700, said
    return said.rpartition("as in ")[2]


MEANT = [  # section, what stands in the file, what was meant
    ("train", "bf16 = True", True), ("train", "bf16 = FALSE", False), ("train", "bf16 = yes", True),
    ("jepa", "load = None", None), ("tracking", "entity = NULL", None), ("train", "epochs = none", None),
    ("env", "size = 32  # px", 32), ("env", "color = \"grey\" ; one channel", "grey"),
    ("env", "id = CartPole-v1 # the pole", "CartPole-v1"),
    ("env", "kwargs = {\"a\": \"b # c\"} # d", {"a": "b # c"}),
    ("env", "color = 'grey'", "grey"), ("env", "color = GREY", "grey"),
    ("env", "id = “CartPole-v1”", "CartPole-v1"),
    ("env", "kwargs = {'wall': None, 'n': (1, 2)}", {"wall": None, "n": [1, 2]}),
    ("data", r'path = "D:\new\table"', "D:/new/table"),
    ("data", r'path = "C:\Users\me\runs"', "C:/Users/me/runs"),
    ("data", r"path = 'E:\bin\f'  # there", "E:/bin/f"), ("run", r"dir = C:\temp\runs", "C:/temp/runs"),
    ("jepa", r'load = "\\server\share\run"', "//server/share/run"),
    ("data", r'dir = "runs\best"', "runs/best"),
    ("tracking", "project = 2024-01-31", "2024-01-31"), ("tracking", "project = True", "True"),
    ("tracking", "project = 1_0", "1_0"), ("run", "dir = ~/runs", "~/runs"),
    ("train", "learning_rate = .001", 1e-3), ("train", "learning_rate = 1e-5 # slow", 1e-5),
    ("train", "steps = 1_000", 1000), ("train", "steps = 1,000", 1000), ("train", "steps = 0x10", 16),
    ("run", "models = jepa", ["jepa"]), ("run", "models = jepa, encdec", ["jepa", "encdec"]),
    ("run", "models = ['jepa', 'encdec',]", ["jepa", "encdec"]), ("evaluation", "horizons = (1, 2)", [1, 2])]


@pytest.mark.parametrize("section, line, meant", MEANT)
def test_whoever_follows_the_advice_gets_what_was_meant(write, section, line, meant):
    advice = advised(write(f"[{section}]\n{line}\n"))
    got = load_settings(write(f"[{section}]\n{advice}\n")).flat()[f"{section}.{line.partition(' =')[0]}"]
    assert got == meant and type(got) is type(meant)
    again = advised(write(f"[own/{section}]\n{line}\n"))
    assert again == advice


@pytest.mark.parametrize("line", [
    "size = big", "size = 9 000 000", "color = [", "kwargs = {a: 1}", "size =", "size = ½"])
def test_where_nothing_is_known_to_be_meant_the_advice_still_loads(write, line):
    load_settings(write(f"[env]\n{advised(write(f'[env]{chr(10)}{line}{chr(10)}'))}\n"))


@pytest.mark.parametrize("line, words", [
    ('kwargs = {"a": 1, "a": 2}', "'a' twice"), ('kwargs = {"a": NaN}', "NaN"),
    ("kwargs = " + "[" * 900, "JSON"),
    ('kwargs = {"a": ' + "[" * 40 + "]" * 40 + "}", "32 deep"), ("size = " + "9" * 5000, "digits"),
    ('kwargs = {"a": ' + "9" * 50 + "}", "digits"), ('kwargs = {"a": -Infinity}', "Infinity"),
    ('kwargs = {"a": 1e999}', "not finite"), (r'id = "a\u0000b"', r"'\x00'"), (r'id = "\ud83d"', "d83d"),
    (r'id = "a\tb"', r"'\t'"), (r'kwargs = {"a\n": 1}', r"'\n'"), (r'id = "\u001b[31m"', "x1b")])
def test_values_that_no_setting_takes(write, line, words):
    said = refusal(lambda: load_settings(write(f"[env]\n{line}\n")))
    assert words in said and len(said.splitlines()) == 1 and len(said) < 700 and line[:3] in said, said


@pytest.mark.parametrize("data, words", [
    ("[env]\nsize = 32\n".encode("utf-16"), "UTF-8"), ("[env]\nsize = 32\n".encode("utf-16-be"), "UTF-8"),
    ("[env]\nid = \"Größe\"\n".encode("latin-1"), "UTF-8"), (b"[env]\nid = \"a\0b\"\n", "UTF-8"),
    (b"\x89PNG\r\n", "UTF-8"), (b"[env]\nid = \"\xed\xa0\x80\"\n", "UTF-8"), (None, "is not a file")])
def test_files_that_are_no_text_are_refused(tmp_path, data, words):
    path = tmp_path / "settings.ini"
    if data is None: path.mkdir()
    else: path.write_bytes(data)
    said = refusal(lambda: load_settings(path))
    assert str(path) in said and words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("name", ["a\x0bb", "a\x85b", "a\u2028b", "a\x1cb"])
@pytest.mark.parametrize("text", [
    "[{}/env]\nsize = 0\n", "[env]\n{} = x\n", "[{}]\nsize = 3\n", "[{}/x]\ny = z\n"])
def test_names_with_line_ends_of_their_own_still_make_one_line(write, name, text):
    for preset in (None, name):
        said = refusal(lambda preset=preset: load_settings(write(text.format(name)), preset))
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf[env]\nsize = 32\n", b"[env]\r\nsize = 32\r\n",
    b"\xef\xbb\xbf# \xce\xba\r\n[env]\rsize = 32"])
def test_marks_and_line_ends_of_other_systems_are_read(tmp_path, text):
    (tmp_path / "settings.ini").write_bytes(text)
    assert load_settings(tmp_path / "settings.ini").env.size == 32


# --- what papermill and Python hand over

CIRCLE: dict = {}
CIRCLE["a"] = [CIRCLE]


@pytest.mark.parametrize("key, given, words", [
    ("train.learning_rate", "1e-4", "write 0.0001 or 1.0e-4"),
    ("train.weight_decay", "5E-05", "0.00005 or 5.0e-5"),
    ("jepa.learning_rate", "2.5e-3", "write 0.0025 or 2.5e-3"), ("train.steps", "1e3", "write 1000"),
    ("train.steps", 20.0, "write 20"), ("env.size", "32", "write 32"), ("train.bf16", "yes", "write true"),
    ("tracking.project", 12, 'write "12"'),
    ("tracking.project", datetime.date(2024, 1, 31), 'write "2024-01-31"'),
    ("evaluation.horizons", 8, "write [8]"), ("evaluation.horizons", (1, 2), "write [1, 2]"),
    ("evaluation.horizons", {4}, "write [4]"), ("run.models", "jepa", 'write ["jepa"]'),
    ("run.seed", np.int64(3), "write 3"), ("run.seed", True, "True"), ("train.bf16", 1, "1"),
    ("run.seed", None, "None"),
    ("env.kwargs", {"a": {1, 2}}, "type set"),
    ("env.kwargs", {"a": [datetime.date(2024, 1, 1)]}, "type date"),
    ("env.kwargs", {"a": b"x"}, "type bytes"), ("env.kwargs", {1: 2}, "key 1"),
    ("env.kwargs", CIRCLE, "32 deep"),
    ("env.kwargs", {"a": np.zeros(9)}, "type ndarray"), ("env.kwargs", {"a": (1,)}, "type tuple"),
    ("env.kwargs", {"a": 10**5000}, "digits"), ("env.kwargs", [1], "env.kwargs"),
    ("env.kwargs", object(), "object"),
    ("env.id", "a\0", r"'\x00'"), ("env.id", "\udc80", "udc80"), ("run.dir", "D:\new", r"'\n'"),
    ("env.id", "x" * 10**5 + "\0", "x00"), ("env.size", "y" * 10**5, "yyy"), ("loss.dino", 3, "loss.dino"),
    ("train.steps.more", 3, "train.steps"), ("loss.dino.weight.x", 3, "loss.dino.weight"),
    ("..", 3, "unknown")])
def test_overrides_of_other_types_are_refused_in_one_sentence(write, key, given, words):
    said = refusal(lambda: load_settings(write("[loss.dino]\nweight = 0.5\n"), overrides={key: given}))
    assert words in said and len(said.splitlines()) == 1 and len(said) < 500, said


@pytest.mark.parametrize("given", [
    "train.steps", [1], 3, 0, (), {3: 1}, {None: 1}, {("a", "b"): 1}, {"train": {}}, {b"train.steps": 1},
    {"a\nb": 1}, {10**5000: 1}], ids=lambda given: type(given).__name__)
def test_overrides_that_are_none(given):
    said = refusal(lambda: load_settings(FILE, overrides=given))
    assert "override" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("preset", [
    3, 0, True, 1.5, ["smoke"], [], {"a": 1}, b"smoke", datetime.date(2024, 1, 1), CIRCLE, "x" * 5000, "a\nb",
    np.eye(2), 10**5000], ids=lambda preset: type(preset).__name__)
def test_presets_that_are_none(preset):
    said = refusal(lambda: load_settings(FILE, preset))
    assert "no preset" in said and "smoke" in said and len(said.splitlines()) == 1 and len(said) < 400


def test_numbers_of_numpy_that_are_pythons_too_become_pythons():
    quarter = np.float64(.25)
    used = make_settings({"train": {"learning_rate": quarter}, "env": {"kwargs": {"a": quarter}}})
    assert type(used.train.learning_rate) is type(used.env.kwargs["a"]) is float


def test_a_whole_section_may_be_laid_over(write):
    path, given = write("[loss.dino]\nweight = 0.5\ncenter_decay = 0.5\n"), {"weight": 2.0}
    dino = load_settings(path, overrides={"loss.dino": given}).loss.dino
    assert (dino.weight, dino.center_decay) == (2.0, 0.5) and given == {"weight": 2.0}


def test_settings_share_nothing_with_what_they_were_made_from():
    kwargs = {"walls": [1, 2]}
    used = make_settings({"env": {"kwargs": kwargs}})
    kwargs["walls"].append(3)
    assert used.env.kwargs == {"walls": [1, 2]}


# --- bounds

NUMBERS = [key for key, value in Settings().flat().items() if type(value) in (int, float)]
OPTIONAL = ["collect.frames", "encoder.cnn.hidden", "jepa.steps", "jepa.epochs", "jepa.batch_size",
            "jepa.patience", "jepa.delta", "train.epochs", "train.larp.steps", "vjepa2.action.epochs",
            "train.reward_mlp.episodes"]


@pytest.mark.parametrize("key", NUMBERS + OPTIONAL)
def test_every_number_has_bounds(key):
    section, _, name = key.rpartition(".")
    kind = int if type(Settings().flat()[key]) is int else float
    for number in (10**12, -20, 1e300):
        assert key in refusal(lambda number=number: make_settings({section: {name: kind(number)}}))


@pytest.mark.parametrize("key", [
    "predictor.hidden", "loss.projector", "train.reward_mlp.hidden", "train.larp.hidden",
    "evaluation.horizons", "vjepa2.pretrain.blocks"])
@pytest.mark.parametrize("numbers", [[0], [-5], [8, 10**12], [True], [1.5], [[1]], ["8"], [None]])
def test_numbers_in_lists_have_bounds(key, numbers):
    section, _, name = key.rpartition(".")
    assert key in refusal(lambda: make_settings({section: {name: numbers}}))


@pytest.mark.parametrize("key, names", [
    ("run.models", ["jepa", "encdec", "jepa"]), ("run.models", ["mine", "mine"]),
    ("run.stages", ["data", "train", "train"]), ("run.stages", ["action", "action"])])
def test_what_is_named_twice_is_refused(key, names):
    section, _, name = key.rpartition(".")
    said = refusal(lambda: make_settings({section: {name: names}}))
    assert key in said and repr(names[-1]) in said and "twice" in said


def test_a_horizon_counts_once():
    assert make_settings({"evaluation": {"horizons": [2, 1, 2, 1]}}).evaluation.horizons == [2, 1]


NO_TERMS = dict(variance=0.0, covariance=0.0, smoothness=0.0, inverse=0.0)


@pytest.mark.parametrize("loss", [dict(prediction=0.0, jepa=0.0), dict(prediction=0, **NO_TERMS),
                                  dict(prediction=0.0, views="one", dino=dict(weight=0.0), **NO_TERMS)])
def test_weights_that_are_all_zero_are_refused_where_a_model_needs_one(loss):
    said = refusal(lambda: make_settings({"loss": loss}))
    assert "jepa" in said and "weight 0" in said and "loss.prediction" in said
    make_settings({"loss": loss, "run": {"models": ["encdec", "vjepa2"]}})
    make_settings({"loss": loss, "jepa": {"load": "a run"}})
    for rest in (dict(prediction=1.0), dict(jepa=1.0, inverse=2.0), dict(jepa=1.0, sigreg=dict(weight=1.0))):
        make_settings({"loss": loss | rest})


# --- where files are

def test_the_repository_is_found_from_anywhere(tmp_path):
    assert repo_root(tmp_path) == repo_root("/") == repo_root(FILE.parent / "nbs" / "0_data") == FILE.parent
    assert shipped("settings.ini") == FILE and shipped("data/presets").is_dir()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A folder to work in, and a package that was installed without a repository, with defaults of its own."
    package, here = tmp_path / "site" / "worldmodels_nb", tmp_path / "here"
    (package / "defaults" / "data" / "presets").mkdir(parents=True)
    here.mkdir()
    (package / "defaults" / "settings.ini").write_text("[train]\nsteps = 7\n")
    (package / "defaults" / "data" / "presets" / "seed.ini").write_text("[train]\nsteps = 9\n")
    monkeypatch.setattr(chapter, "__file__", str(package / "settings.py"))
    monkeypatch.chdir(here)
    return here


def test_without_a_repository_defaults_come_from_the_package(elsewhere):
    assert repo_root() == elsewhere and repo_root("/") == chapter.Path("/")
    assert shipped("settings.ini").parent.name == "defaults" and load_settings().train.steps == 7
    assert load_settings(preset="seed").train.steps == 9
    assert expand("data/runs") == elsewhere / "data" / "runs"


@pytest.mark.parametrize("name, text", [
    ("settings.ini", "[DEFAULT]\nlib_name = other\n"), ("settings.ini", "[train]\nsteps = 8\n"),
    ("pyproject.toml", "[project]\nname = \"other\"\n"), ("pyproject.toml", "name = \"worldmodels_nb\"\n"),
    ("pyproject.toml", "[project]\nname = [\"worldmodels_nb\"]\n"), ("pyproject.toml", "project = 3\n"),
    ("pyproject.toml", "[tool.nbdev]\nlib_path = \"worldmodels_nb\"\n"), ("pyproject.toml", "[[[\n")])
def test_the_folder_of_another_project_is_not_taken_for_ours(elsewhere, name, text):
    (elsewhere / "nbs").mkdir()
    (elsewhere / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    (elsewhere / name).write_text(text)
    assert repo_root() == elsewhere and load_settings().train.steps == 7
    assert repo_root(elsewhere / "nbs") == elsewhere / "nbs"


def test_a_repository_is_known_by_the_name_of_its_project(elsewhere):
    (elsewhere / "pyproject.toml").write_text("[project]\nname = \"worldmodels_nb\"\n")
    (elsewhere / "settings.ini").write_text("[train]\nsteps = 5\n")
    (elsewhere / "nbs").mkdir()
    assert repo_root(elsewhere / "nbs") == elsewhere and load_settings().train.steps == 5


@pytest.mark.parametrize("path, there", [
    ("~/runs", "home/runs"), ("~", "home"), ("/tmp/~", "/tmp/~"), ("data/~x", FILE.parent / "data/~x"),
    ("data/runs", FILE.parent / "data/runs")])
def test_paths_begin_at_home_or_at_the_repository(tmp_path, monkeypatch, path, there):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert expand(path) == expand(chapter.Path(path)) == tmp_path / there


def test_settings_are_read_from_home_and_nobodys_home_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.ini").write_text("[train]\nsteps = 5\n")
    assert load_settings("~/mine.ini").train.steps == 5
    for call in (load_settings, expand):
        assert "'~nobody-here/a.ini'" in refusal(lambda call=call: call("~nobody-here/a.ini"))


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
    ("{\"schema_version\": 2", ["damaged", "train it again"]), ("\0\xff", ["damaged", "UTF-8"])])
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
