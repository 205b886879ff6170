"""A run that is killed again and again ends with the same bits as one that is left alone.

Started as a script, this file imports torch once, then forks one child for each attempt to train and kills it by SIGKILL.
"""
import copy
import json
import multiprocessing
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

from worldmodels_nb.training.fit import LossTerms, Trainable
from worldmodels_nb.settings import TrainingSettings
from worldmodels_nb.training import callbacks as module
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.parts import read_result, read_state, train
from worldmodels_nb.training.fit import Callback, weights_hash

KILLS = 10
RECIPE = TrainingSettings(steps=330, batch_size=16, learning_rate=0.01, validate_every=11, validation_batches=3, checkpoint_every=7)


@dataclass
class Points:
    x: Tensor
    y: Tensor
    def to(self, device): return Points(self.x.to(device), self.y.to(device))


class Table:
    def __init__(self, n, seed):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 4, generator=draw)
        self.y = self.x.prod(1, keepdim=True)
    def __len__(self): return len(self.x)
    def batch(self, indices): return Points(self.x[indices], self.y[indices])
    def sample(self, batch_size, seed, step): return self.batch(np.random.default_rng([seed, step]).integers(len(self), size=batch_size))


class Toy(Trainable):
    "Everything a restart could forget: random masks, running statistics, a moving average, optimiser moments, a schedule."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 24), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.ReLU(), nn.Linear(24, 1))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
    def loss(self, batch):
        keep = torch.rand_like(batch.x) > 0.1
        y = self.net(batch.x * keep)
        terms = {"error": (y - batch.y).square().mean(), "lag": (y - self.slow(batch.x)).square().mean()}
        return LossTerms(total=terms["error"] + 0.1 * terms["lag"], terms={name: term.detach() for name, term in terms.items()})
    def after_step(self, step, steps):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters()): slow.lerp_(fast, 0.05)


def attempt(folder, callbacks=(), burn=0, recipe=RECIPE):
    model = Toy()
    torch.rand(burn)  # another process has drawn other numbers before it gets here
    return train(model, Table(64, seed=1), Table(40, seed=2), recipe, folder, seed=5, callbacks=callbacks, progress=False)


def same(a, b):
    if isinstance(a, Tensor): return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(killed, whole):
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    assert same(read_state(killed / "state.pt"), read_state(whole / "state.pt"))
    assert same(read_metrics(killed / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl"))
    assert same(read_result(killed), read_result(whole))
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


class Tell(Callback):
    "Tells the parent each step; some steps after the one it waits for, waits to be killed, so that no attempt can escape."
    def __init__(self, step, wait_at): self.step, self.wait_at = step, wait_at
    def on_step(self, run):
        self.step.value = run.step
        time.sleep(0.001)
        while run.step >= self.wait_at: time.sleep(0.01)


def kill_often(folder):
    chance, context = random.Random(7), multiprocessing.get_context("fork")
    kills = []
    for number, target in enumerate(sorted(chance.sample(range(2, RECIPE.steps - 40), KILLS))):
        step = context.Value("i", 0)
        child = context.Process(target=attempt, args=(folder, [Tell(step, target + 30)], number))
        child.start()
        while step.value < target and child.is_alive(): time.sleep(0.0005)
        time.sleep(0.03 * chance.random())
        child.kill(); child.join()
        kills.append((child.exitcode, step.value))
    child = context.Process(target=attempt, args=(folder,))
    child.start(); child.join()
    return {"kills": kills, "last": child.exitcode}


def test_ten_kills_change_no_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run([sys.executable, __file__, whole, killed], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [code for code, _ in said["kills"]] == [-signal.SIGKILL] * KILLS and said["last"] == 0
    assert all(0 < step < RECIPE.steps for _, step in said["kills"])
    assert_same_run(killed, whole)
    assert [row["step"] for row in read_metrics(killed / "metrics.jsonl")] == sorted({*range(10, 331, 10), *range(11, 331, 11)})


class Crash(BaseException):
    "As sudden as a power cut, as far as one process can tell."


def crash_at_write(monkeypatch, number, after):
    "The process dies in its n-th write of a whole file, before or after the file is in place."
    count = [0]
    def write_whole(path, data, original=module.write_whole):
        count[0] += 1
        if count[0] == number and not after: raise Crash
        original(path, data)
        if count[0] == number: raise Crash
        return path
    from worldmodels_nb.training.fit import fit
    monkeypatch.setattr(module, "write_whole", write_whole)
    monkeypatch.setattr(fit, "write_whole", write_whole)


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
            try: attempt(folder, recipe=SHORT)
            except Crash: pass
            else: break
        attempt(folder, burn=3, recipe=SHORT)
        assert_same_run(folder, undisturbed)
    assert number > 8  # metrics, five checkpoints, at least one set of weights and the result were each crashed


def test_a_run_stopped_early_is_not_continued_after_a_crash_before_its_result(tmp_path):
    recipe = RECIPE.model_copy(update=dict(steps=200, validate_every=5, checkpoint_every=50, patience=2, delta=10.0))
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
            if run.step == 14: raise Crash
    with pytest.raises(Crash): attempt(tmp_path, [Die()], recipe=SHORT)
    path = tmp_path / "state.pt"
    state = read_state(path)
    torch.save({**state, "seconds": 1000.0}, path)
    assert 1000 < attempt(tmp_path, recipe=SHORT)["seconds"] < 1060


def test_the_test_would_notice_a_forgotten_generator(undisturbed, tmp_path):
    class Die(Callback):
        def on_step(self, run):
            if run.step == 14: raise Crash
    class Forget(Callback):
        def on_start(self, run): torch.manual_seed(99)
    with pytest.raises(Crash): attempt(tmp_path, [Die()], recipe=SHORT)
    attempt(tmp_path, [Forget()], recipe=SHORT)
    with pytest.raises(AssertionError): assert_same_run(tmp_path, undisturbed)


def test_the_best_weights_are_what_comes_back(undisturbed, tmp_path):
    model = Toy()
    result = train(model, Table(64, seed=1), Table(40, seed=2), SHORT, undisturbed, seed=5, progress=False)
    assert weights_hash(model) == result["weights"] and not model.training


if __name__ == "__main__":
    import torch._dynamo  # the first optimiser step imports it; better once here than in each child
    torch.set_num_threads(1)  # before anything is computed: threads do not survive a fork
    whole_folder, killed_folder = map(Path, sys.argv[1:])
    report = kill_often(killed_folder)
    attempt(whole_folder)
    print(json.dumps(report))
