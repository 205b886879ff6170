"The trained sample: it is small, it belongs to this code, and it predicts better than standing still."
import shutil

import numpy as np
import pytest

from worldmodels_nb.runs.claim import find_difference
from worldmodels_nb.runs.folder import RunError
from worldmodels_nb.runs.heads import REWARD_HEADS
from worldmodels_nb.runs.reopen import available_runs, open_run
from worldmodels_nb.runs.sample import KEPT, copy_kept, held_out_rows, make_sample_run, open_sample
from worldmodels_nb.settings import load_settings, repo_root, shipped
from worldmodels_nb.training.fit import weights_hash

ROOT = repo_root()
MODELS = ["encdec", "encdec_jepa", "jepa", "vjepa2"]
AGAIN = "; make it again with `make sample`"


@pytest.fixture(scope="module")
def opened(): return open_sample()


@pytest.fixture(scope="module")
def rows(opened): return held_out_rows(opened)


def files(): return [path for path in (ROOT / "data" / "sample").rglob("*") if path.is_file()]


def test_it_is_small(): assert sum(path.stat().st_size for path in files()) <= 6_000_000


def test_it_holds_what_is_looked_at_and_nothing_else():
    run = ROOT / "data" / "sample" / "run"
    assert {path.name for path in files() if run in path.parents} == set(KEPT)
    text = "".join(path.read_text() for path in run.rglob("*") if path.suffix in (".json", ".ini", ".jsonl"))
    assert str(ROOT) not in text and "/tmp" not in text


def test_it_is_fresh(opened):
    "Every weight loads, and the settings are those of the preset as it stands: else run `make sample`."
    assert opened.notes == [] and find_difference(opened.settings, load_settings(preset="sample")) == ""
    assert opened.settings == load_settings(preset="sample")
    assert list(opened.models) == list(opened.decoders) == list(opened.probes) == list(opened.heads) == MODELS
    assert all(set(heads) == set(REWARD_HEADS) for heads in opened.heads.values())


def test_it_is_a_run_like_any_other(opened):
    assert opened.status["status"] == "finished"
    assert open_run("sample").rows == opened.rows and available_runs()[-1]["name"] == "sample"
    assert {row["model"] for row in opened.rows} >= set(MODELS)


def test_its_data_are_the_eight_episodes_and_all_held_out(opened, sample):
    assert opened.data.dataset.hash == sample.hash
    assert len(opened.data.training) == 0 and len(opened.data.validation) == len(sample)


def test_it_has_not_been_trained_on_the_sample(opened, sample):
    "Another seed, other episodes."
    assert opened.settings.data.path is None
    assert opened.settings.run.seed != sample.info["settings"]["run"]["seed"]


def values(rows, model, metric, kind, head=""):
    found = {row["horizon"]: row["value"] for row in rows
             if (row["metric"], row["kind"], row["head"]) == (metric, kind, head)
             and row["model"] in (model, "")}
    return np.array([found[horizon] for horizon in range(1, 9)])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("metric", ["latent", "position"])
def test_every_model_beats_no_change_at_every_horizon(rows, model, metric):
    "In position from the second step on: the first is as long as what a linear probe misses on true latents."
    own = [row for row in rows if row["model"] in (model, "")]
    error, still = values(own, model, metric, "model"), values(own, model, metric, "baseline", "persistence")
    readable = slice(1 if metric == "position" else 0, None)
    assert (error < still)[readable].all()
    if metric == "latent": return
    assert (values(own, model, "position_ratio", "model")[readable] < 1).all()
    assert error[0] < still[0] + values(own, model, metric, "reference", "probe")[0]


@pytest.mark.parametrize("model", MODELS)
def test_actions_matter(rows, model):
    own = [row for row in rows if row["model"] == model]
    other = values(own, model, "position", "baseline", "shuffled_actions")
    assert (values(own, model, "position", "model")[3:] < 0.8 * other[3:]).all()


@pytest.fixture
def stale(tmp_path):
    "A copy of the sample's run."
    return shutil.copytree(shipped("data/sample/run"), tmp_path / "run")


def test_other_settings_are_stale(stale):
    path = stale / "settings.ini"
    path.write_text(path.read_text().replace("\nseed = 0", "\nseed = 7"))
    with pytest.raises(RunError, match="is stale: run.seed is 7 there and 0 here") as said: open_sample(stale)
    assert str(said.value).endswith(AGAIN) and "\n" not in str(said.value)


def test_weights_of_another_shape_are_stale(stale, monkeypatch):
    path = stale / "settings.ini"
    latent = load_settings(preset="sample").model.latent_dim
    path.write_text(path.read_text().replace(f"\nlatent_dim = {latent}", f"\nlatent_dim = {2 * latent}"))
    with pytest.raises(RunError, match="^the sample is stale") as said: open_sample(stale)
    assert str(said.value).endswith(AGAIN) and "\n" not in str(said.value)


LOST = ["models/jepa/decoder/weights.safetensors", "models/jepa/probe", "settings.ini"]


@pytest.mark.parametrize("lost", LOST)
def test_a_sample_that_has_lost_something_is_stale(stale, lost):
    path = stale / lost
    if path.is_dir(): shutil.rmtree(path)
    else: path.unlink()
    with pytest.raises(RunError, match="stale") as said: open_sample(stale)
    assert str(said.value).endswith(AGAIN)


QUICK = {"collect.episodes": 8, "collect.steps": 12, "run.models": ["jepa"], "train.steps": 2,
         "train.state_decoder.steps": 2, "train.reward_mlp.steps": 2, "evaluation.probe.mlp_steps": 2,
         "evaluation.n_windows": 4, "evaluation.bootstrap": 10, "evaluation.horizons": [1, 2]}


def test_the_same_seed_gives_the_same_weights_and_replaces_what_was_there(tmp_path):
    made, own, hashes = tmp_path / "made", QUICK | {"data.dir": str(tmp_path / "data")}, []
    for _ in range(2):
        run = open_run(make_sample_run(made, own, progress=False).path, data=shipped("data/sample/tworooms"))
        hashes.append(weights_hash(run.models["jepa"]))
        assert {path.name for path in made.rglob("*") if path.is_file()} <= set(KEPT)
    assert hashes[0] == hashes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "made"]


def test_copying_keeps_only_what_is_looked_at(tmp_path):
    run = tmp_path / "run" / "models" / "jepa" / "world"
    run.mkdir(parents=True)
    for name in ("weights.safetensors", "state.pt", "step_000010.png"): (run / name).write_bytes(b"x")
    copy_kept(tmp_path / "run", tmp_path / "copy")
    kept = [path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")]
    assert kept == ["models/jepa/world/weights.safetensors"]
