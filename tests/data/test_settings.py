"Settings: what loads, what is refused and how, what is written back."
import pytest
from hypothesis import given, settings as limits, strategies as st
from worldmodels_nb.settings import Settings, SettingsError, load_settings, make_settings, pick_device, repo_root, save_settings, settings_table, write_whole

FILE = repo_root() / "settings.ini"


@pytest.mark.parametrize("preset", [None, "smoke", "demo", "study", "atari", "seed"])
def test_resolved_settings_round_trip(tmp_path, preset):
    used = load_settings(FILE, preset, {"env.kwargs": {"wall": "random"}, "run.seed": 7})
    assert load_settings(save_settings(used, tmp_path / "resolved.ini")) == used


@limits(max_examples=25, deadline=None)
@given(steps=st.integers(1, 10**6), rate=st.floats(1e-8, 1.0), path=st.none() | st.text(max_size=20), horizons=st.lists(st.integers(1, 99), min_size=1))
def test_any_value_round_trips(tmp_path_factory, steps, rate, path, horizons):
    used = make_settings({"training": {"steps": steps, "learning_rate": rate}, "ppo": {"load": path}, "evaluation": {"horizons": horizons}})
    assert load_settings(save_settings(used, tmp_path_factory.mktemp("s") / "s.ini")) == used


def test_later_layers_win(tmp_path):
    (tmp_path / "s.ini").write_text("[training]\nsteps = 5\nbatch_size = 7\n[quick/training]\nsteps = 6\n")
    assert load_settings(tmp_path / "s.ini").train.steps == 5
    assert load_settings(tmp_path / "s.ini", "quick").train.steps == 6
    last = load_settings(tmp_path / "s.ini", "quick", {"train.steps": 8}).train
    assert (last.steps, last.batch_size) == (8, 7)


@pytest.mark.parametrize("text, words", [
    ("[env]\nidd = \"CartPole-v1\"\n", ["env.idd", "env.id"]),
    ("[envv]\nid = \"CartPole-v1\"\n", ["envv", "env"]),
    ("[env]\nid = CartPole-v1\n", ["env", "CartPole-v1", "quotes"]),
    ("[env]\nsize = \"64\"\n", ["env.size", "'64'", "integer"]),
    ("[env]\nsize = 1000\n", ["env.size", "1000", "≤ 512"]),
    ("[env]\nsize = 60\n", ["env.size = 60", "patch_size = 8"]),
    ("[env]\ncolor = \"gray\"\n", ["env.color", "gray", "grey"]),
    ("[training]\nlearning_rate = NaN\n", ["train.learning_rate", "finite"]),
    ("[training]\nsteps = true\n", ["train.steps", "True"]),
    ("[model]\nencoder = \"vit\"\nlatent_dim = 30\n", ["model.latent_dim = 30", "4 attention heads"]),
    ("[run]\nmodels = []\n", ["run.models"]),
    ("[ppo]\npolicy_type = \"MultiInputPolicy\"\n", ["collect.ppo.policy_type", "CnnPolicy"]),
    ("[fast/training]\nstep = 3\n", ["training.step", "train.steps"]),
    ("[env\nid = 3\n", ["settings.ini"]),
    ("[env]\nid = \"a\"\nid = \"b\"\n", ["already exists"]),
])
def test_what_is_wrong_is_refused_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "settings.ini"
    path.write_text(text)
    with pytest.raises(SettingsError) as refused: load_settings(path)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value), str(refused.value)


def test_missing_file_preset_and_device():
    with pytest.raises(SettingsError, match="no settings file"): load_settings("/nowhere/settings.ini")
    with pytest.raises(SettingsError, match="nearest known one is 'smoke'"): load_settings(FILE, "smok")
    with pytest.raises(SettingsError, match="section.key"): load_settings(FILE, overrides={"steps": 3})
    with pytest.raises(SettingsError, match="run.device"): pick_device("tpu")


def test_every_knob_has_a_reason():
    rows = settings_table()
    assert len(rows) == sum(len(f.annotation.model_fields) for f in Settings.model_fields.values())
    assert all(len(row["reason"]) > 5 for row in rows)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError): write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
