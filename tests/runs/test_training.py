"World models of a run: the same windows for all, stages one after another or alone, weights from elsewhere."
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from run_tools import TWO, Page, begin, counted_fits, go, refused, results, run_in, small, weights_of
from safetensors.numpy import load_file

from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.runs.experiment import run_stage
from worldmodels_nb.runs.folder import RunError
from worldmodels_nb.runs.report import write_report
from worldmodels_nb.runs.training import bar_label, ensure_data, initial_model, start_session
from worldmodels_nb.training.fit import Callback
from worldmodels_nb.training.parts import read_result

TRAINED = ("data", "train")


def test_episodes_shorter_than_a_window_are_refused(tmp_path):
    with refused(DatasetError, "train.window_steps is 4", "has 3", "collect.steps"):
        go("mine", small(tmp_path, {"collect.steps": 3, "train.window_steps": 4}))


# ---------------------------------------------------------------- a model in two stages

def test_a_model_in_two_stages_is_a_model_like_any_other(tmp_path):
    folder = run_in(tmp_path, TWO, models=["vjepa2"])
    rows = results(folder)["vjepa2"]
    assert {row["protocol"] for row in rows} == {"probe", "rollout", "reward", "collapse", "cost"}
    costs = {row["metric"]: row["value"] for row in rows if row["protocol"] == "cost"}
    assert costs["steps"] == 8 and costs["frames_seen"] == 4 * 4 * 2 + 4 * 4 * 3
    text = Page(write_report(folder).read_text()).text
    assert "vjepa2 for 8 steps" in text and (folder / "pictures" / "training_vjepa2_pretrain.png").exists()


def alone(folder, run, stage, changes=()):
    "A run of one stage, and nothing else."
    settings = small(folder, TWO | {"run.stages": [stage]} | dict(changes), models=["vjepa2"])
    session = begin(run, settings)
    run_stage(session, stage)
    return session


def steps_of(session):
    return [read_result(session.folder.part("vjepa2", stage))["steps"] for stage in ("pretrain", "action")]


def test_a_stage_alone_needs_the_one_before_it_and_can_take_it_from_elsewhere(tmp_path):
    with refused(RunError, "action of vjepa2 needs the weights of pretrain", "vjepa2.pretrain.load"):
        alone(tmp_path, "first", "action")
    alone(tmp_path, "second", "pretrain")
    both = alone(tmp_path, "second", "action")
    assert steps_of(both) == [4, 4]
    third = alone(tmp_path, "third", "action", {"vjepa2.pretrain.load": str(both.folder.path)})
    assert steps_of(third) == [0, 4]
    assert weights_of(third, "vjepa2", "action") == weights_of(both, "vjepa2", "action")


def test_who_looks_on_is_asked_for_each_stage_and_changes_no_bit(tmp_path):
    seen = []
    class Looking(Callback):
        def __init__(self, part): self.part = part
        def on_end(self, run): seen.append((self.part, run.step))
    def watch(part, world, data):
        assert part.startswith(world.registered) and len(data.training)
        return [Looking(part)]
    settings = small(tmp_path, TWO, ["jepa", "vjepa2"])
    session = start_session("watched", settings, progress=False, watch=watch)
    for stage in ("data", "train"): run_stage(session, stage)
    assert seen == [("jepa", 6), ("vjepa2/pretrain", 4), ("vjepa2/action", 4)]
    alone = go("alone", settings, ["data", "train"])
    assert weights_of(session, "jepa") == weights_of(alone, "jepa")


def test_a_bar_says_which_model_it_is_of_how_many(tmp_path):
    session = start_session("mine", small(tmp_path, models=["encdec", "jepa"]))
    labels = [bar_label(session, part) for part in ("encdec", "jepa/decoder", "oracles/oracle")]
    assert labels == ["encdec, 1 of 2", "jepa/decoder, 2 of 2", "oracles/oracle"]
    assert bar_label(replace(session, progress=False), "jepa") == ""


def test_a_stage_that_no_model_of_the_run_has_is_refused(tmp_path):
    with refused(RunError, "none of run.models = ['jepa']", "vjepa2"):
        run_stage(begin("fourth", small(tmp_path, {"run.stages": ["pretrain"]})), "pretrain")


# ---------------------------------------------------------------- weights from elsewhere

def without_cost(rows):
    return [row for row in rows["jepa"] if row["protocol"] != "cost"]


@pytest.mark.parametrize("kind", ["run", "file"])
def test_loaded_weights_are_taken_as_they_are_and_judged_the_same(kind, trained, tmp_path, monkeypatch):
    fits, part = counted_fits(monkeypatch), trained.folder.part("jepa", "world")
    source = trained.folder.path if kind == "run" else part / "weights.safetensors"
    folder = run_in(tmp_path, {"jepa.load": str(source)}, run="second")
    assert "JEPA" not in fits and len(fits) == 6                  # decoder, three reward heads, two oracles
    result = read_result(folder / "models" / "jepa" / "world")
    assert result["steps"] == 0 and str(source) in result["reason"]
    assert result["weights"] == read_result(part)["weights"]
    assert without_cost(results(folder)) == without_cost(results(trained.folder.path))
    assert "jepa for 0 steps" in Page(write_report(folder).read_text()).text


def test_training_can_go_on_from_loaded_weights(trained, tmp_path):
    changes = {"jepa.load": str(trained.folder.path), "jepa.train_loaded": True, "jepa.steps": 2}
    again = go("second", small(tmp_path, changes), TRAINED)
    assert read_result(again.folder.part("jepa", "world"))["steps"] == 2
    before, after = (load_file(session.folder.part("jepa", "world") / "weights.safetensors")
                     for session in (trained, again))
    fresh = initial_model("jepa", again.settings, ensure_data(again)).state_dict()
    moved = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0 < moved < .1
    assert any(np.abs(fresh[name].numpy() - before[name]).max() > moved for name in before)


@pytest.mark.parametrize("changes, words", [
    ({"model.latent_dim": 64}, ["'jepa.load'", "encoder.readout", "model.latent_dim = 128 (here 64)"]),
    ({"predictor.type": "mlp"}, ["predictor.net", "is missing", 'predictor.type = "gru" (here "mlp")']),
    ({"jepa.target": "ema_target"},
     ["target.", "is missing", 'jepa.target = "shared" (here "ema_target")'])])
def test_weights_of_another_architecture_name_tensors_and_the_setting(changes, words, trained, tmp_path):
    source = {"jepa.load": str(trained.folder.path)}
    with refused(RunError, *words): go("second", small(tmp_path, source | changes), TRAINED)
    assert not (tmp_path / "runs" / "second" / "models").exists()


def test_a_bare_file_of_another_architecture_names_tensors_and_sections(trained, tmp_path):
    file = trained.folder.part("jepa", "world") / "weights.safetensors"
    with refused(RunError, "encoder.readout", "[model]", "[predictor]"):
        go("second", small(tmp_path, {"jepa.load": str(file), "model.latent_dim": 64}), TRAINED)


class Bomb:
    def __reduce__(self): return (os.mkdir, ("exploded",))


def with_changed_weights(trained, other):
    "The folder of a run whose weights were changed after it wrote down their hash."
    (other / "models" / "jepa" / "world").mkdir(parents=True)
    for name in ("settings.ini", "models/jepa/world/result.json"):
        (other / name).write_bytes((trained.folder.path / name).read_bytes())
    changed = weights_of(trained, "jepa")[:-4] + b"\0\0\0\0"
    (other / "models" / "jepa" / "world" / "weights.safetensors").write_bytes(changed)
    return other


@pytest.mark.parametrize("damage", ["cut", "pickle", "text", "missing", "changed"])
def test_foreign_and_broken_weight_files_are_refused_by_name_and_nothing_runs(
        damage, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, wrong = tmp_path / "weights.safetensors", "not a whole safetensors file"
    if damage == "cut": file.write_bytes(weights_of(trained, "jepa")[:-100])
    elif damage == "pickle": torch.save({"a": Bomb()}, file)
    elif damage == "text": file.write_text("hello")
    elif damage == "missing": wrong = "there is no"
    else:
        file = with_changed_weights(trained, tmp_path / "runs" / "other")
        wrong = "not the file that training wrote"
    with refused(RunError, "'jepa.load'", "weights.safetensors", wrong):
        go("second", small(tmp_path, {"jepa.load": str(file)}), TRAINED)
    assert not (tmp_path / "exploded").exists()


def test_what_a_run_loads_is_written_down_in_its_settings(trained, tmp_path):
    source = str(trained.folder.path)
    folder = go("second", small(tmp_path, {"jepa.load": source}), TRAINED).folder.path
    assert f"load = {json.dumps(source)}" in (folder / "settings.ini").read_text()
