"Who may work on a run, what may change when it goes on, and a start that fails leaves nothing in the way."
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from run_tools import begin, bytes_of, counted_fits, evaluation_of, go, refused, run_in, small, weights_of

from worldmodels_nb import settings as settings_module
from worldmodels_nb.runs import claim
from worldmodels_nb.runs.claim import claim_run, hold_run, release_run
from worldmodels_nb.runs.experiment import finish_run, run_experiment, run_stage
from worldmodels_nb.runs.folder import RunError, RunFolder, read_status
from worldmodels_nb.runs.training import start_session

# ---------------------------------------------------------------- one process at a time

HOLD = """
import signal, sys, time
from pathlib import Path
from worldmodels_nb.runs.claim import hold_run
from worldmodels_nb.runs.folder import RunFolder
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
hold_run(RunFolder(Path(sys.argv[1])))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    "A begun run that another process holds."
    folder = begin("mine", small(tmp_path)).folder
    release_run(folder)
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder.path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    yield folder, other
    other.kill()
    other.wait()


def test_a_second_process_is_told_who_holds_the_run(held, tmp_path):
    folder, other = held
    before = bytes_of(folder.path)
    with refused(RunError, str(folder.path), f"process {other.pid} on", "another run name"):
        begin("mine", small(tmp_path))
    assert bytes_of(folder.path) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_ends_with_its_process_however_that_ends(how, held, tmp_path):
    folder, other = held
    other.send_signal(how)
    other.wait(timeout=60)
    assert begin("mine", small(tmp_path)).folder == folder


def test_the_same_process_may_come_back(tmp_path):
    "As in a notebook's second Run All."
    for _ in range(3): session = begin("mine", small(tmp_path))
    assert not hold_run(session.folder)


def test_a_finished_or_failed_run_is_let_go(tmp_path):
    folder = RunFolder(run_in(tmp_path))
    assert hold_run(folder)
    release_run(folder)
    with pytest.raises(RunError):
        claim_run("mine", small(tmp_path, {"train.steps": 7}))
    assert hold_run(folder), "a refused claim keeps no lock"
    release_run(folder)


def test_a_deleted_folder_can_be_made_again(tmp_path):
    session = begin("mine", small(tmp_path))
    session.folder.path.rename(tmp_path / "aside")
    again = begin("mine", small(tmp_path))
    assert (again.folder.path / "settings.ini").exists() and not hold_run(again.folder)


# ---------------------------------------------------------------- a start that fails keeps no name

def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("module, name", [
    (os, "fsync"), (os, "replace"), (os, "rename"), (claim, "write_json"), (claim, "save_settings")])
def test_a_start_on_a_full_disk_leaves_no_folder(module, name, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, full)
        with refused((RunError, OSError), "No space left", "make room", "run.dir"):
            begin("mine", small(tmp_path))
    assert list((tmp_path / "runs").iterdir()) == []
    begin("mine", small(tmp_path, {"train.steps": 7}))


def test_where_no_folder_can_be_made_one_sentence_says_so(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with refused(RunError, "cannot be made", "run.dir"): begin("mine", small(tmp_path))


@pytest.mark.parametrize("wrong", [{"predictor.type": "mlp"}, {"train.steps": 7}, {"model.latent_dim": 64},
                                   {"env.kwargs": {"wall": "random"}}, {"run.models": ["encdec"]}])
def test_before_anything_is_trained_every_setting_may_be_mended(wrong, tmp_path):
    begin("mine", small(tmp_path, wrong))
    assert read_status(RunFolder(run_in(tmp_path)))["status"] == "finished"


def test_a_status_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch):
    session = begin("mine", small(tmp_path))
    def stumble(*_): raise RuntimeError("the first error")
    monkeypatch.setattr("worldmodels_nb.runs.experiment.ensure_data", stumble)
    monkeypatch.setattr(settings_module.os, "fsync", full)
    with pytest.warns(UserWarning, match="not noted"), pytest.raises(RuntimeError, match="the first error"):
        run_stage(session, "data")


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"schema_version": 1}'])
def test_a_damaged_status_hides_nothing(damage, tmp_path, monkeypatch):
    session = begin("mine", small(tmp_path))
    (session.folder.path / "status.json").write_bytes(damage)
    def stumble(*_): raise KeyError("the first error")
    monkeypatch.setattr("worldmodels_nb.runs.experiment.ensure_data", stumble)
    with pytest.warns(UserWarning, match="status.json"), pytest.raises(KeyError, match="the first error"):
        run_stage(session, "data")


# ---------------------------------------------------------------- going on with other settings

@pytest.fixture
def begun(tmp_path):
    "A run that has trained one of its two models, and that one's heads."
    go("mine", small(tmp_path, models=["jepa", "encdec"]), ("data",))
    only = small(tmp_path, {"run.stages": ["data", "train"]}, models=["jepa", "encdec"])
    session = go("mine", only, ("data", "train"))
    release_run(session.folder)
    return session


@pytest.mark.parametrize("change", [
    {"evaluation.n_windows": 5}, {"evaluation.bootstrap": 12}, {"evaluation.probe.ridge": .5},
    {"evaluation.probe.mlp_steps": 0}, {"evaluation.horizons": [2]}, {"tracking.project": "other"},
    {"train.state_decoder.channels": 8}, {"train.larp.steps": 5}, {"train.reward_mlp.hidden": [4, 4]}])
def test_what_comes_after_the_weights_may_change(change, begun, tmp_path, monkeypatch):
    before = weights_of(begun, "jepa")
    fits = counted_fits(monkeypatch)
    folder = run_in(tmp_path, change, ["jepa", "encdec"])
    assert weights_of(begun, "jepa") == before and not {"JEPA", "EncoderDecoder"} & set(fits)
    assert read_status(RunFolder(folder))["status"] == "finished"
    assert {row["horizon"] for row in evaluation_of(folder, "jepa")["rows"]} - {0} <= set(
        change.get("evaluation.horizons", [1, 2]))


@pytest.mark.parametrize("key, value", [("train.steps", 7), ("run.seed", 1), ("model.latent_dim", 64),
                                        ("env.kwargs", {"wall": "random"}), ("jepa.learning_rate", .01)])
def test_what_shaped_finished_weights_is_refused(key, value, begun, tmp_path):
    before = bytes_of(begun.folder.path)
    with refused(RunError, key, repr(value), "jepa.load", "another run name"):
        begin("mine", small(tmp_path, {key: value}, models=["jepa", "encdec"]))
    assert bytes_of(begun.folder.path) == before


def test_a_model_that_has_not_begun_may_change(tmp_path):
    session = go("mine", small(tmp_path, {"run.stages": ["train"]}, ["jepa", "encdec"]), ("data",))
    (session.folder.part("jepa", "world")).mkdir(parents=True)
    (session.folder.part("jepa", "world") / "state.pt").touch()
    release_run(session.folder)
    with refused(RunError, "jepa.learning_rate"):
        begin("mine", small(tmp_path, {"jepa.learning_rate": .01}, ["jepa", "encdec"]))
    begin("mine", small(tmp_path, {"encdec.learning_rate": .01}, ["jepa", "encdec"]))


def test_heads_trained_with_other_settings_are_trained_anew(tmp_path, monkeypatch):
    go("mine", small(tmp_path, {"run.stages": ["data", "train", "heads"]}), ("data", "train", "heads"))
    fits = counted_fits(monkeypatch)
    folder = run_in(tmp_path, {"train.state_decoder.steps": 5})
    assert fits.count("StateDecoder") == 1 and "JEPA" not in fits
    assert json.loads((folder / "models/jepa/decoder/result.json").read_text())["steps"] == 5


def test_other_data_under_the_same_name_are_refused(begun, tmp_path):
    path = begun.folder.path / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(dataset_hash="0" * 64)))
    with refused(RunError, "other data", "another run name"): run_in(tmp_path, models=["jepa", "encdec"])


def test_a_finished_run_is_opened_to_be_looked_at_and_changed_by_nothing(tmp_path):
    settings = small(tmp_path)
    folder = run_in(tmp_path)
    before = bytes_of(folder)
    session = start_session("mine", settings, progress=False, reopen=True)
    for stage in settings.run.stages: run_stage(session, stage)
    assert finish_run(session)["status"] == "finished" and bytes_of(folder) == before
    with refused(RunError, "finished", "another run name"): run_experiment("mine", settings, progress=False)


def test_the_time_of_a_lock_is_told(tmp_path):
    folder = begin("mine", small(tmp_path)).folder
    assert time.strftime("%Y") in (folder.path / "run.lock").read_text()
