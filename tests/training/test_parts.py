"""A run that is killed again and again ends with the same bits as one that is left alone.

And a part's folder: what `train` writes, refuses, and finds again. Started as a script, this file imports
torch once, then forks one child for each attempt to train and kills it by SIGKILL.
"""

import copy
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_tools import FORTY, At, Rows, Small

from worldmodels_nb import settings as settings_module
from worldmodels_nb.settings import TrainingSettings
from worldmodels_nb.training import callbacks, parts
from worldmodels_nb.training import fit as fit_module
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.fit import (
    Callback,
    LossTerms,
    Trainable,
    TrainingError,
    WeightsError,
    fit_windows,
    save_weights,
    weights_hash,
)
from worldmodels_nb.training.parts import STATE_SCHEMA, Resume, read_result, read_state, record_loaded, train
from worldmodels_nb.viz import curves

KILLS = 10
RECIPE = TrainingSettings(
    steps=330, batch_size=16, learning_rate=0.01, validate_every=11, validation_batches=3, checkpoint_every=7
)


@dataclass
class Points:
    x: Tensor
    y: Tensor

    def to(self, device):
        return Points(self.x.to(device), self.y.to(device))


class Table:
    def __init__(self, n, seed):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 4, generator=draw)
        self.y = self.x.prod(1, keepdim=True)

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return Points(self.x[indices], self.y[indices])

    def sample(self, batch_size, seed, step):
        return self.batch(np.random.default_rng([seed, step]).integers(len(self), size=batch_size))


class Toy(Trainable):
    "What a restart could forget: random masks, running statistics, a moving average, moments, a schedule."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.ReLU(), nn.Linear(24, 1)
        )
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    def loss(self, batch):
        keep = torch.rand_like(batch.x) > 0.1
        y = self.net(batch.x * keep)
        terms = {"error": (y - batch.y).square().mean(), "lag": (y - self.slow(batch.x)).square().mean()}
        return LossTerms(
            total=terms["error"] + 0.1 * terms["lag"],
            terms={name: term.detach() for name, term in terms.items()},
        )

    def after_step(self, step, steps):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters()):
                slow.lerp_(fast, 0.05)


def attempt(folder, further=(), burn=0, recipe=RECIPE):
    model = Toy()
    torch.rand(burn)  # another process has drawn other numbers before it gets here
    return train(
        model, Table(64, seed=1), Table(40, seed=2), recipe, folder, seed=5, callbacks=further, progress=False
    )


def same(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(killed, whole):
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert same(read_state(killed / "state.pt"), read_state(whole / "state.pt"))
    assert same(read_metrics(killed / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl"))
    assert same(read_result(killed), read_result(whole))
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


class Tell(Callback):
    "Says each step to the parent; some steps later, waits to be killed, so that no attempt can escape."

    def __init__(self, step, wait_at):
        self.step, self.wait_at = step, wait_at

    def on_step(self, run):
        self.step.value = run.step
        time.sleep(0.001)
        while run.step >= self.wait_at:
            time.sleep(0.01)


def kill_often(folder):
    chance, context = random.Random(7), multiprocessing.get_context("fork")
    kills = []
    for number, target in enumerate(sorted(chance.sample(range(2, RECIPE.steps - 40), KILLS))):
        step = context.Value("i", 0)
        child = context.Process(target=attempt, args=(folder, [Tell(step, target + 30)], number))
        child.start()
        while step.value < target and child.is_alive():
            time.sleep(0.0005)
        time.sleep(0.03 * chance.random())
        child.kill()
        child.join()
        kills.append((child.exitcode, step.value))
    child = context.Process(target=attempt, args=(folder,))
    child.start()
    child.join()
    return {"kills": kills, "last": child.exitcode}


def test_ten_kills_change_no_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, __file__, whole, killed], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [code for code, _ in said["kills"]] == [-signal.SIGKILL] * KILLS and said["last"] == 0
    assert all(0 < step < RECIPE.steps for _, step in said["kills"])
    assert_same_run(killed, whole)
    assert [row["step"] for row in read_metrics(killed / "metrics.jsonl")] == sorted(
        {*range(10, 331, 10), *range(11, 331, 11)}
    )


class Crash(BaseException):
    "As sudden as a power cut, as far as one process can tell."


def crash_at_write(monkeypatch, number, after):
    "The process dies in its n-th write of a whole file, before or after the file is in place."
    count = [0]

    def write_whole(path, data, original=parts.write_whole):
        count[0] += 1
        if count[0] == number and not after:
            raise Crash
        original(path, data)
        if count[0] == number:
            raise Crash
        return path

    for module in (callbacks, fit_module, parts, settings_module):  # rows, weights, checkpoints, the result
        monkeypatch.setattr(module, "write_whole", write_whole)


SHORT = RECIPE.model_copy(update=dict(steps=26, validate_every=5, checkpoint_every=6))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    attempt(folder, recipe=SHORT)
    return folder


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_write_changes_no_bit(undisturbed, after, tmp_path):
    for number in range(1, 30):
        folder = tmp_path / f"{number}"
        with pytest.MonkeyPatch.context() as patch:
            crash_at_write(patch, number, after)
            try:
                attempt(folder, recipe=SHORT)
            except Crash:
                pass
            else:
                break
        attempt(folder, burn=3, recipe=SHORT)
        assert_same_run(folder, undisturbed)
    assert (
        number > 8
    )  # metrics, five checkpoints, at least one set of weights and the result were each crashed


def test_a_run_stopped_early_is_not_continued_after_a_crash_before_its_result(tmp_path):
    recipe = RECIPE.model_copy(
        update=dict(steps=200, validate_every=5, checkpoint_every=50, patience=2, delta=10.0)
    )
    attempt(tmp_path / "whole", recipe=recipe)
    result = read_result(tmp_path / "whole")
    assert result["stopped_early"] and result["steps"] == 15 and result["best_step"] == 5
    attempt(tmp_path / "again", recipe=recipe)
    (tmp_path / "again" / "result.json").unlink()
    attempt(tmp_path / "again", recipe=recipe)
    assert_same_run(tmp_path / "again", tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_swept(undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".state.pt.x7k").write_bytes(bytes(100))
    attempt(tmp_path / "run", recipe=SHORT)
    assert_same_run(tmp_path / "run", undisturbed)


def test_seconds_of_all_pieces_are_summed(tmp_path):
    class Die(Callback):
        def on_step(self, run):
            if run.step == 14:
                raise Crash

    with pytest.raises(Crash):
        attempt(tmp_path, [Die()], recipe=SHORT)
    path = tmp_path / "state.pt"
    state = read_state(path)
    torch.save({**state, "seconds": 1000.0}, path)
    assert 1000 < attempt(tmp_path, recipe=SHORT)["seconds"] < 1060


def test_the_test_would_notice_a_forgotten_generator(undisturbed, tmp_path):
    class Die(Callback):
        def on_step(self, run):
            if run.step == 14:
                raise Crash

    class Forget(Callback):
        def on_start(self, run):
            torch.manual_seed(99)

    with pytest.raises(Crash):
        attempt(tmp_path, [Die()], recipe=SHORT)
    attempt(tmp_path, [Forget()], recipe=SHORT)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, undisturbed)


def test_the_best_weights_are_what_comes_back(undisturbed, tmp_path):
    model = Toy()
    result = train(model, Table(64, seed=1), Table(40, seed=2), SHORT, undisturbed, seed=5, progress=False)
    assert weights_hash(model) == result["weights"] and not model.training


# a smaller toy, which counts its steps


DATA, OTHERS = Rows(64), Rows(20, seed=1)


def ours(model, folder, recipe=FORTY, **more):
    return train(model, DATA, OTHERS, recipe, folder, progress=False, **more)


# train


def test_the_result_says_what_was_trained(tmp_path):
    model = Small()
    result = ours(model, tmp_path, FORTY.model_copy(update={"epochs": 3.0}), seed=4)
    assert result == json.loads((tmp_path / "result.json").read_text()) == read_result(tmp_path)
    assert (
        result["schema_version"] == 1
        and result["model"] == "Small"
        and result["steps"] == 24
        and not result["stopped_early"]
    )
    assert result["parameters"] == {"net": 33, "fixed": 6} and result["trainable_parameters"] == {
        "net": 33,
        "fixed": 0,
        "frozen": 6,
    }
    assert result["recipe"]["train.steps"] == 24 and result["recipe"]["run.seed"] == 4
    assert result["weights"] == weights_hash(model) and not model.training
    values = {
        row["step"]: row["val/total"]
        for row in read_metrics(tmp_path / "metrics.jsonl")
        if "val/total" in row
    }
    assert result["best_value"] == min(values.values()) == values[result["best_step"]]


def test_the_best_weights_come_back_not_the_last(tmp_path):
    wild = FORTY.model_copy(update=dict(learning_rate=0.5, schedule="constant", validate_every=1))
    model = Small()
    result = ours(model, tmp_path, wild)
    assert result["best_step"] < 40
    with torch.no_grad():
        assert model.loss(OTHERS.batch(np.arange(20))).total.item() == pytest.approx(
            result["best_value"], rel=1e-5
        )
    assert weights_hash(model) == result["weights"]


def test_a_finished_training_is_not_trained_again(tmp_path):
    first, second = Small(), Small()
    result = ours(first, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert (
        ours(second, tmp_path) == result and second.steps == 0 and weights_hash(second) == weights_hash(first)
    )
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_starting_over_trains_again_and_gives_the_same(tmp_path):
    result, model = (
        ours(Small(), tmp_path, picture=lambda step: curves({"a": ([0], [1], None, None)}, "x", "y")),
        Small(),
    )
    again = ours(model, tmp_path, resume=False)
    assert (
        model.steps == 40
        and again["weights"] == result["weights"]
        and not list((tmp_path / "pictures").iterdir())
    )


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, named",
    [
        (
            dict(recipe=FORTY.model_copy(update={"learning_rate": 0.02})),
            "train.learning_rate = 0.01, and now it is 0.02",
        ),
        (dict(seed=3), "run.seed = 0, and now it is 3"),
    ],
)
def test_another_recipe_is_refused_by_name(tmp_path, finished, change, named):
    ours(Small(), tmp_path)
    if not finished:
        (tmp_path / "result.json").unlink()
    with pytest.raises(TrainingError, match=named):
        ours(Small(), tmp_path, **change)


def test_other_training_windows_are_refused(tmp_path):
    ours(Small(), tmp_path)
    with pytest.raises(TrainingError, match="training windows = 64, and now it is 65"):
        train(Small(), Rows(65), OTHERS, FORTY, tmp_path, progress=False)


def test_another_architecture_is_refused_and_names_the_tensor(tmp_path):
    ours(Small(), tmp_path)
    with pytest.raises(WeightsError, match=r"net.0.weight is \(8, 2\) float32, the model's is \(9, 2\)"):
        ours(Small(9), tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(TrainingError, match=r"net.0.weight is \(8, 2\) float32, the model's is \(9, 2\)"):
        ours(Small(9), tmp_path)


def test_other_frozen_parts_are_refused(tmp_path):
    ours(Small(), tmp_path)
    (tmp_path / "result.json").unlink()
    model = Small()
    model.net[3].requires_grad_(False)
    with pytest.raises(TrainingError, match="other parameters are trained"):
        ours(model, tmp_path)


def test_weights_changed_behind_its_back_are_refused(tmp_path):
    ours(Small(), tmp_path)
    save_weights(Small(), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="weights.safetensors is not the file that training wrote"):
        ours(Small(), tmp_path)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", "cut", "bomb", "other", "older"])
def test_a_checkpoint_that_cannot_be_read_is_refused_and_runs_nothing(tmp_path, content):
    ours(Small(), tmp_path)
    (tmp_path / "result.json").unlink()
    path = tmp_path / "state.pt"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "bomb":
        torch.save({"schema_version": STATE_SCHEMA, "step": Bomb()}, path)
    elif content == "other":
        torch.save({"epoch": 3}, path)
    elif content == "older":
        torch.save({"schema_version": STATE_SCHEMA - 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match="state.pt is no checkpoint.*delete it"):
        ours(Small(), tmp_path)


def test_resume_without_a_checkpoint_starts_at_zero(tmp_path):
    assert fit_windows(Small(), DATA, FORTY, callbacks=[Resume(tmp_path / "state.pt", {})]).step == 40


def test_further_callbacks_see_the_complete_row_and_come_before_the_checkpoint(tmp_path):
    rows = []

    class Watch(Callback):
        def on_step(self, run):
            if run.log:
                rows.append({"step": run.step, **run.log})
            run.resume_state["mine"] = run.step

    ours(Small(), tmp_path, callbacks=[Watch()])
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert read_state(tmp_path / "state.pt")["resume_state"]["mine"] == 40


def test_a_callback_after_the_last_validation_may_stop_the_run(tmp_path):
    result = ours(Small(), tmp_path, callbacks=[At(23, lambda run: setattr(run, "stop", "pressed"))])
    assert result["stopped_early"] and result["reason"] == "pressed" and result["steps"] == 23


def test_a_run_stopped_before_its_first_validation_keeps_what_it_has(tmp_path):
    model = Small()
    result = ours(model, tmp_path, callbacks=[At(3, lambda run: setattr(run, "stop", "pressed"))])
    assert (result["steps"], result["best_step"], result["best_value"]) == (3, 3, None) and result[
        "weights"
    ] == weights_hash(model)


# weights from elsewhere


def test_loaded_weights_stand_where_a_training_would_have_put_them(tmp_path):
    model, other = Small(), Small()
    result = record_loaded(model, "another run", tmp_path)
    assert result == read_result(tmp_path) == record_loaded(model, "another run", tmp_path)
    assert (result["steps"], result["reason"], result["best_value"]) == (0, "loaded from another run", None)
    assert result["weights"] == weights_hash(model) and not model.training
    with torch.no_grad():
        other.net[0].weight.zero_()
    with pytest.raises(TrainingError, match="was trained with weights"):
        record_loaded(other, "another run", tmp_path)


@pytest.mark.parametrize("content", ['{"schema_version": 99}', '{"steps": 3', "[1]"])
def test_a_result_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(TrainingError, match="result.json.*start over with resume=False"):
        read_result(tmp_path)


@pytest.mark.parametrize("again", [dict(epochs=3.0), dict(epochs=2.9), dict(epochs=None, steps=24)])
def test_passes_that_are_as_many_steps_go_on_with_one_another(tmp_path, again):
    passes = FORTY.model_copy(update=dict(epochs=3.0, checkpoint_every=7))
    whole = ours(Small(), tmp_path / "whole", passes)
    with pytest.raises(Crash):
        ours(Small(), tmp_path / "cut", passes, callbacks=[At(16, crash)])
    result = ours(Small(), tmp_path / "cut", passes.model_copy(update=again))
    assert result["weights"] == whole["weights"] and result["steps"] == 24


def crash(run):
    raise Crash


@pytest.mark.parametrize("again", [dict(epochs=4.0), dict(epochs=None, steps=23), dict(epochs=2.0)])
def test_passes_that_are_other_steps_are_refused(tmp_path, again):
    ours(Small(), tmp_path, FORTY.model_copy(update={"epochs": 3.0}))
    with pytest.raises(TrainingError, match="train.steps = 24, and now it is"):
        ours(Small(), tmp_path, FORTY.model_copy(update=again))


def test_the_module_exports_what_the_chapter_promises():
    promised = {
        "Checkpoint",
        "Resume",
        "read_state",
        "check_recipe",
        "standard_callbacks",
        "train",
        "read_result",
    }
    assert promised | {"record_loaded"} <= set(parts.__all__)


if __name__ == "__main__":
    import torch._dynamo  # the first optimiser step imports it; better once here than in each child

    torch.set_num_threads(1)  # before anything is computed: threads do not survive a fork
    whole_folder, killed_folder = map(Path, sys.argv[1:])
    report = kill_often(killed_folder)
    attempt(whole_folder)
    print(json.dumps(report))
