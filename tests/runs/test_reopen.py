"A run opened again: all that it learnt, nothing changed by looking, and a sentence for what is not there."
import shutil

import numpy as np
import pytest
import torch
from run_tools import SMALL, TWO, bytes_of, cut_short, go, inside, refused, small

from worldmodels_nb.data.datasets import dataset_name, sample_dataset, write_dataset
from worldmodels_nb.models.base import build_model
from worldmodels_nb.runs import reopen
from worldmodels_nb.runs.facts import read_rows
from worldmodels_nb.runs.folder import RunError, RunFolder
from worldmodels_nb.runs.reopen import available_runs, find_run, open_run
from worldmodels_nb.runs.training import ensure_data, start_session, train_model
from worldmodels_nb.settings import expand, load_settings, make_settings, save_settings

MODELS = ["encdec", "vjepa2"]
HEADS = {"reward_mlp", "reward_mlp_no_action", "larp"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of two models, one of them trained in two stages."
    settings = inside(tmp_path_factory.mktemp("reopen"), base=SMALL | TWO, models=MODELS)
    return go("mine", settings)


@pytest.fixture
def copy(finished, tmp_path):
    "A copy of that run, to be damaged; its dataset stays where it is."
    return shutil.copytree(finished.folder.path, tmp_path / "mine")


def times(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


# ---------------------------------------------------------------- a finished run

def test_everything_is_there(finished):
    run = open_run("mine", finished.settings.run.dir)
    assert run.name == "mine" and run.folder.path == finished.folder.path and run.notes == []
    assert run.settings == finished.settings and run.status["status"] == "finished"
    assert list(run.models) == list(run.decoders) == list(run.probes) == list(run.heads) == MODELS
    assert all(set(heads) == HEADS for heads in run.heads.values())
    def _r2(rows): return {row["value"] for row in rows if row["metric"] == "r2 position"}  # pixels': in each
    assert _r2(run.rows) == _r2(read_rows(finished.folder))


def test_the_data_are_split_as_they_were(finished):
    run, trained_on = open_run(finished.folder.path), ensure_data(start_session(
        "mine", finished.settings, progress=False, reopen=True))
    assert run.data.dataset.hash == trained_on.dataset.hash
    assert np.array_equal(run.data.validation, trained_on.validation)
    assert np.array_equal(run.data.training, trained_on.training)


@pytest.mark.parametrize("model", MODELS)
def test_models_are_those_that_were_trained(model, finished):
    session = start_session("mine", finished.settings, progress=False, reopen=True)
    trained = train_model(session, ensure_data(session), model).state_dict()
    world = open_run(finished.folder.path).models[model]
    assert trained.keys() == world.state_dict().keys()
    assert all(torch.equal(t, trained[name]) for name, t in world.state_dict().items())
    assert not world.training and not any(p.requires_grad for p in world.parameters())


def test_the_probe_is_the_one_that_was_measured(finished):
    run = open_run(finished.folder.path)
    dataset, model = run.data.dataset, run.models["encdec"]
    rows = dataset.frame_indices(run.data.validation)
    with torch.no_grad(): z = model.encode(torch.from_numpy(dataset.frames[rows])[:, None])
    read = run.probes["encdec"].r2(z.flatten(1), torch.from_numpy(dataset.states[rows]))
    written = {row["metric"]: row["value"] for row in run.rows
               if row["model"] == "encdec" and row["kind"] == "model" and row["protocol"] == "probe"}
    assert read[0].item() == pytest.approx(written["r2 agent x"], abs=1e-4)


def test_decoders_and_heads_can_be_used(finished):
    run = open_run(finished.folder.path)
    batch = run.data.windows(1, validation=True).batch(np.arange(2))
    for name, model in run.models.items():
        z = model.encode(batch.frames)
        assert run.decoders[name](z).shape == (2, 2, *run.data.dataset.spec.frame_shape)
        for head in run.heads[name].values(): assert head(z, batch.actions).isfinite().all()


def test_looking_changes_nothing(finished):
    folder = finished.folder.path
    before, when, state = bytes_of(folder), times(folder.parents[1]), torch.get_rng_state()
    open_run(folder)
    available_runs(folder.parent)
    assert bytes_of(folder) == before and times(folder.parents[1]) == when
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_another_process_holds_can_be_looked_at(finished, monkeypatch):
    def locked(*_): raise AssertionError("a lock was asked for")
    monkeypatch.setattr("filelock.FileLock.acquire", locked)
    assert list(open_run(finished.folder.path).models) == MODELS


def test_it_says_what_it_is_in_one_line(finished):
    words = repr(open_run(finished.folder.path))
    assert "mine, finished: encdec, vjepa2" in words and "\n" not in words and len(words) < 200


# ---------------------------------------------------------------- what is not there

def test_an_unfinished_run_shows_what_there_is(tmp_path):
    settings = inside(tmp_path, {"run.stages": ["data", "pretrain"]}, base=SMALL | TWO,
                      models=["jepa", "vjepa2"])
    go("half", settings, stages=("data", "pretrain"))
    run = open_run("half", tmp_path / "runs")
    assert run.models == run.decoders == run.probes == run.heads == {} and run.rows == []
    assert run.data is not None and run.status["status"] == "begun"
    said = " ".join(run.notes)
    assert "jepa is not there" in said and "(world)" in said and "(action)" in said


def test_a_run_without_heads_has_models_and_says_so(tmp_path):
    go("half", small(tmp_path), stages=("data", "train"))
    run = open_run("half", tmp_path / "runs")
    assert list(run.models) == ["jepa"] and run.decoders == {}
    wanted = ["decoder", "probe", "reward heads", "results"]
    assert [word for word in wanted if word in " ".join(run.notes)] == wanted


def test_a_run_from_before_probes_were_kept(copy):
    shutil.rmtree(copy / "models/encdec/probe")
    run = open_run(copy)
    assert list(run.probes) == ["vjepa2"]
    assert run.notes == ["encdec has no probe; run the stage \"evaluate\" again."]


def test_a_dataset_that_is_gone_leaves_the_models(copy, finished, tmp_path):
    settings = load_settings(copy / "settings.ini")
    elsewhere = make_settings(settings.model_dump() | {"data": settings.data.model_dump() | {
        "dir": str(tmp_path / "nowhere")}})
    save_settings(elsewhere, copy / "settings.ini")
    run = open_run(copy)
    assert run.data is None and list(run.models) == MODELS
    assert len(run.notes) == 1 and dataset_name(elsewhere) in run.notes[0]
    assert not (tmp_path / "nowhere").exists(), "a dataset was gathered by looking"


def test_a_dataset_that_is_another_one_is_not_taken_for_it(copy):
    path = copy / "provenance.json"
    path.write_text(path.read_text().replace("\"dataset_hash\": \"", "\"dataset_hash\": \"0"))
    run = open_run(copy)
    assert run.data is None and "other data" in run.notes[0]


def test_a_model_that_is_not_known_here_is_left_out(copy):
    path = copy / "models.json"
    path.write_text(path.read_text().replace("\"encdec\"", "\"mine\""))
    (copy / "models/encdec").rename(copy / "models/mine")
    run = open_run(copy)
    assert list(run.models) == ["vjepa2"] and "mine cannot be built here" in run.notes[0]


# ---------------------------------------------------------------- other data

def test_another_dataset_is_held_out(finished):
    run = open_run(finished.folder.path, data=write_other(finished, 64))
    assert run.data.training.size == 0 and np.array_equal(run.data.validation, np.arange(3))


def write_other(finished, seed, **env):
    s = finished.settings.model_dump()
    new = make_settings(s | {"run": s["run"] | {"seed": seed}, "env": s["env"] | env,
                             "collect": s["collect"] | {"episodes": 3}})
    folder = expand(finished.settings.run.dir).parent / f"other{seed}"
    write_dataset(new, folder, progress=False)
    return folder


def test_data_that_look_otherwise_are_refused(finished):
    assert finished.settings.env.size != sample_dataset().spec.frame_shape[1]
    with refused(RunError, "frame_shape", "tworooms", "[3, 64, 64]", "[3, 32, 32]"):
        open_run(finished.folder.path, data="data/sample/tworooms")


def test_data_that_are_nowhere_are_refused(finished):
    with refused(RunError, "nowhere"): open_run(finished.folder.path, data="nowhere")


# ---------------------------------------------------------------- damage

DAMAGED = ["settings.ini", "status.json", "models.json", "models/encdec/evaluation.json",
           "models/encdec/world/result.json", "models/encdec/world/weights.safetensors",
           "models/vjepa2/pretrain/weights.safetensors", "models/vjepa2/decoder/weights.safetensors",
           "models/encdec/larp/weights.safetensors", "models/encdec/probe/weights.safetensors"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_was_cut_short_is_named(name, copy):
    cut_short(copy / name)
    with refused(RunError, str(copy), name.rpartition("/")[2]): open_run(copy)


@pytest.mark.parametrize("name", ["models.json", "models/encdec/world/weights.safetensors"])
def test_a_file_that_is_gone_is_named(name, copy):
    (copy / name).unlink()
    with refused(RunError, str(copy / name)): open_run(copy)


def test_weights_of_another_shape_are_named(copy):
    world, other = copy / "models/encdec/world", copy / "models/encdec/decoder"
    shutil.copy(other / "weights.safetensors", world)
    shutil.copy(other / "result.json", world)
    with refused(RunError, str(world / "weights.safetensors"), "another"): open_run(copy)


# ---------------------------------------------------------------- which there are

def test_the_newest_comes_first_and_the_sample_last(finished, tmp_path):
    for name, ended in (("a", "2026-01-02"), ("b", "2026-01-03"), ("c", "2026-01-01")):
        shutil.copytree(finished.folder.path, tmp_path / name)
        status = f'{{"schema_version": 1, "status": "finished", "stages": [], "ended": "{ended}"}}'
        (tmp_path / name / "status.json").write_text(status)
    (tmp_path / "no run").mkdir()
    found = available_runs(tmp_path)
    assert [run["name"] for run in found if run["name"] != "sample"] == ["b", "a", "c"]
    assert found[0]["models"] == MODELS and found[0]["env"] == finished.settings.env.id
    assert "sample" not in [run["name"] for run in found[:-1]]


@pytest.mark.parametrize("name", ["settings.ini", "status.json", "models.json"])
def test_a_damaged_run_is_listed_with_its_sentence(name, copy):
    (copy / name).write_text("{")
    about = available_runs(copy.parent)[0]
    assert about["name"] == "mine" and about["status"] == "damaged"
    assert name in about["note"] and "\n" not in about["note"]


def test_there_need_not_be_any_run(tmp_path):
    assert [run["name"] for run in available_runs(tmp_path / "nowhere")] in ([], ["sample"])


def test_a_name_that_is_no_run_names_the_nearest(finished):
    with refused(RunError, "'mime'", "'mine'"): open_run("mime", finished.settings.run.dir)


@pytest.mark.parametrize("name", ["", "a/b", "..", 7, None, "x\0y"])
def test_what_is_no_name_is_refused(name, tmp_path):
    with refused(RunError): open_run(name, tmp_path)


def test_a_run_of_ones_own_that_is_called_sample_goes_first(finished, tmp_path):
    shutil.copytree(finished.folder.path, tmp_path / "sample")
    assert find_run("sample", tmp_path) == RunFolder(tmp_path / "sample")
    assert [run["path"] for run in available_runs(tmp_path)] == [tmp_path / "sample"]
    assert open_run("sample", tmp_path).data.training.size


def test_the_sample_is_opened_on_held_out_episodes():
    run = open_run("sample")
    assert run.name == "sample" and run.folder.path.as_posix().endswith(reopen.SAMPLE_RUN)
    assert len(run.models) == 4 and run.models.keys() == run.decoders.keys()
    assert len(run.data.validation) == len(sample_dataset()) and run.data.training.size == 0
    for name, world in run.models.items():
        assert type(world) is type(build_model(name, run.settings, run.data.dataset.spec))
