"""What happens beside the loop: bars, rows, validation, best weights, pictures, and a guard."""

import io
import json
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from device_tools import ELSEWHERE, Device
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_tools import FORTY as RECIPE
from training_tools import At, Rows, Small

from worldmodels_nb.training import callbacks as module
from worldmodels_nb.training.callbacks import (
    BestWeights,
    EarlyStopping,
    Metrics,
    NaNGuard,
    Progress,
    Validation,
    evaluation_mode,
    fixed_parts,
    generator_states,
    on_host,
    read_metrics,
    restore_generators,
)
from worldmodels_nb.training.fit import (
    Callback,
    History,
    LossTerms,
    Trainable,
    TrainingError,
    fit,
    weights_hash,
)
from worldmodels_nb.training.parts import Checkpoint, read_state, train
from worldmodels_nb.viz import curves


@dataclass
class Points:
    x: Tensor

    def to(self, device):
        return Points(self.x.to(device))


class Table(Rows):
    "Batches that hold their rows by name."

    def batch(self, indices):
        return Points(super().batch(indices))


class Toy(Small):
    def loss(self, batch):
        return super().loss(batch.x)


DATA, OTHERS = Table(64), Table(20, seed=1)


def sample(step):
    return DATA.sample(8, 0, step)


def ours(model, folder, recipe=RECIPE, **more):
    return train(model, DATA, OTHERS, recipe, folder, progress=False, **more)


class Say(Callback):
    "Puts given validation values into the log, one after another, every so many steps."

    def __init__(self, values, every=1):
        self.values, self.every = list(values), every

    def on_step(self, run):
        if run.step % self.every == 0 and self.values:
            run.log["val/total"] = self.values.pop(0)


# progress and metrics


def test_progress_says_steps_time_rate_and_loss_in_one_line_and_nothing_when_off(tmp_path, capfd):
    log = io.StringIO()
    fit(Toy(), sample, RECIPE, [Progress("toy, 2 of 3", log)])
    said = log.getvalue()
    assert said.startswith("toy, 2 of 3: step 40 of 40 in 00:0") and said.count("\n") == 1
    assert "00:00 left" in said and "step/s" in said and "loss=" in said and "\r" not in said
    ours(Toy(), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_progress_begins_where_a_restart_does():
    class Jump(Callback):
        def on_start(self, run):
            run.step = 30

    progress = Progress(file=io.StringIO())
    fit(Toy(), sample, RECIPE, [Jump(), progress])
    assert (progress.bar.initial, progress.bar.n, progress.bar.total) == (30, 40, 40)


def test_rows_have_the_terms_rate_norm_and_seconds_and_each_step_once(tmp_path):
    ours(Toy(), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert all(
        set(row)
        == {"step", "lr", "seconds", "train/total", "train/error", "grad_norm", "val/total", "val/error"}
        for row in rows
    )
    assert all(
        row["train/total"] == pytest.approx(2 * row["train/error"]) and row["grad_norm"] > 0 for row in rows
    )
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_half_a_line_is_no_row(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"step": 10}\n{"step": 20, "lr": 0.0')
    assert read_metrics(path) == [{"step": 10}]


def test_a_restart_cuts_rows_after_its_step_and_half_lines(tmp_path):
    path = tmp_path / "m"
    path.write_text(
        "".join(json.dumps({"step": step, "old": 1}) + "\n" for step in (10, 20, 30)) + '{"step": 4'
    )

    class Jump(Callback):
        def on_start(self, run):
            run.step = 20

    fit(Toy(), sample, RECIPE, [Jump(), Metrics(path)])
    assert [(row["step"], "old" in row) for row in read_metrics(path)] == [
        (10, True),
        (20, True),
        (30, False),
        (40, False),
    ]


def test_many_scalars_come_in_one_transfer(monkeypatch):
    transfers = []
    monkeypatch.setattr(
        Tensor, "tolist", lambda self, original=Tensor.tolist: transfers.append(1) or original(self)
    )
    assert on_host({"a": torch.tensor(1.5), "b": torch.tensor(2, dtype=torch.float64)}) == {
        "a": 1.5,
        "b": 2.0,
    }
    assert len(transfers) == 1


# looking without touching


def test_evaluation_mode_puts_back_every_mode_the_generator_and_the_gradient_switch():
    model = Toy()
    model.train()
    model.fixed.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(KeyError):
        with evaluation_mode(model):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            torch.rand(5)
            raise KeyError
    assert (
        [m.training for m in model.modules()] == modes
        and torch.equal(torch.get_rng_state(), state)
        and torch.is_grad_enabled()
    )


def test_evaluation_mode_draws_the_same_numbers_each_time():
    model = Toy()
    with evaluation_mode(model):
        first = torch.rand(3)
    torch.rand(7)
    with evaluation_mode(model):
        assert torch.equal(torch.rand(3), first)


@given(windows=st.integers(1, 300), size=st.integers(1, 64), batches=st.integers(1, 8))
@hypothesis_settings(max_examples=80, deadline=None)
def test_parts_hold_no_window_twice_and_differ_in_size_by_one_at_most(windows, size, batches):
    parts = fixed_parts(windows, size, batches)
    together = np.concatenate(parts)
    assert len(set(together)) == len(together) == min(windows, size * batches)
    assert (
        1 <= min(map(len, parts))
        and max(map(len, parts)) <= size
        and max(map(len, parts)) - min(map(len, parts)) <= 1
    )
    assert len(parts) <= batches and all(
        np.array_equal(a, b) for a, b in zip(parts, fixed_parts(windows, size, batches))
    )


def test_validation_is_the_mean_over_windows_in_evaluation_mode():
    run = fit(Toy(), sample, RECIPE, [Validation(OTHERS, RECIPE)])
    run.model.eval()
    assert [len(part) for part in fixed_parts(20, 8, 3)] == [7, 7, 6]
    with torch.no_grad():
        assert run.log["val/total"] == pytest.approx(
            run.model.loss(OTHERS.batch(np.arange(20))).total.item(), rel=1e-5
        )


def test_how_often_one_validates_changes_nothing():
    plain = weights_hash(fit(Toy(), sample, RECIPE).model)
    for every in (1, 7):
        torch.manual_seed(0)
        assert (
            weights_hash(
                fit(
                    Toy(),
                    sample,
                    RECIPE,
                    [Validation(OTHERS, RECIPE.model_copy(update={"validate_every": every}))],
                ).model
            )
            == plain
        )


def test_a_validation_that_is_not_finite_stops_the_run():
    broken = Table(20)
    broken.x[:] = math.nan
    with pytest.raises(TrainingError, match="step 10: val/error is not finite.*validation data"):
        fit(Toy(), sample, RECIPE, [Validation(broken, RECIPE)])


# the best, and stopping early


def test_best_weights_need_an_improvement_by_more_than_delta(tmp_path):
    best, hashes = BestWeights(tmp_path / "w", delta=0.5), {}

    class Watch(Callback):
        def on_step(self, run):
            hashes[run.step] = (
                run.resume_state["best_step"],
                run.resume_state["waited"],
                (tmp_path / "w").stat().st_mtime_ns,
            )

    fit(
        Toy(),
        sample,
        RECIPE.model_copy(update={"steps": 6}),
        [Say([5.0, 4.6, 4.5, 4.4, 3.0, math.inf]), best, Watch()],
    )
    assert [hashes[k][:2] for k in range(1, 7)] == [(1, 0), (1, 1), (1, 2), (4, 0), (5, 0), (5, 1)]
    assert len({written for _, _, written in hashes.values()}) == 3


@pytest.mark.parametrize("patience, end", [(1, 6), (2, 8), (3, 18), (0, 40)])
def test_patience_counts_validations_not_steps(tmp_path, patience, end):
    said = [3, 2, 2, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1]  # one every second step; the best so far at 2, 4 and 10
    expected = {6: 6, 8: 8, 18: 16, 40: 40}[end]
    run = fit(
        Toy(), sample, RECIPE, [Say(said, every=2), BestWeights(tmp_path / "w"), EarlyStopping(patience)]
    )
    assert run.step == expected and bool(run.stop) == bool(patience)


def test_early_stopping_says_why(tmp_path):
    run = fit(Toy(), sample, RECIPE, [Say([1, 2, 2]), BestWeights(tmp_path / "w"), EarlyStopping(2)])
    assert run.stop == "no improvement since step 1 in 2 validations"


# the guard


class Breaks(Toy):
    "At one training step, something is not finite."

    def __init__(self, what, at=17):
        super().__init__()
        self.what, self.at = what, at

    def loss(self, batch):
        losses, now = super().loss(batch), self.training and self.steps == self.at
        zero = torch.tensor(0.0 if now else 1.0)
        terms = {**losses.terms, "extra": torch.ones(())}
        if self.what == "term":
            return LossTerms(losses.total, {**terms, "extra": 1 / zero})
        if self.what == "total":
            return LossTerms(losses.total / zero, terms)
        root = torch.sqrt(
            (self.net[0].weight * (1 - zero if not now else zero)).square().sum() + (0 if now else 1)
        )  # slope of √ at 0
        return LossTerms(losses.total + root, terms)


@pytest.mark.parametrize(
    "what, named", [("term", "extra"), ("total", "total"), ("gradient", "gradient norm")]
)
@pytest.mark.parametrize("every", [1, 10])
def test_the_guard_names_step_and_term_and_saves_the_weights(what, named, every, tmp_path):
    model = Breaks(what)
    with pytest.raises(
        TrainingError,
        match=f"^step 17: {named} is not finite.*weights are still those of step 16"
        ".*state.pt \\(step 15\\).*learning_rate",
    ):
        fit(model, sample, RECIPE, [NaNGuard(every), Checkpoint(tmp_path / "state.pt", 15, {})])
    good = Breaks(what, at=-1)
    fit(good, sample, RECIPE, [At(16, lambda run: setattr(run, "stop", "here"))])
    assert weights_hash(model) == weights_hash(good)


def test_a_crack_at_the_124th_batch_leaves_the_weights_of_step_123():
    class Cracked(Toy):
        def loss(self, batch):
            losses = super().loss(batch)
            crack = losses.total / (0.0 if self.steps == 124 else 1.0)
            return LossTerms(total=crack, terms={**losses.terms, "crack": crack.detach()})

    recipe, saved, short = RECIPE.model_copy(update={"steps": 300}), Cracked(), Cracked()
    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="step 124: crack"):
        fit(saved, sample, recipe, [NaNGuard()])
    torch.manual_seed(0)
    fit(short, sample, recipe, [At(123, lambda run: setattr(run, "stop", "here"))])
    assert weights_hash(saved) == weights_hash(short)


def test_without_a_guard_the_weights_are_lost():
    model = Breaks("gradient")
    fit(model, sample, RECIPE)
    assert not model.net[0].weight.isfinite().any()


def test_a_guard_changes_no_bit_of_a_healthy_run():
    torch.manual_seed(0)
    plain = weights_hash(fit(Toy(), sample, RECIPE).model)
    assert weights_hash(fit(Toy(), sample, RECIPE, [NaNGuard(3)]).model) == plain


def test_the_guard_follows_terms_that_come_and_go():
    class Late(Toy):
        def loss(self, batch):
            losses = super().loss(batch)
            if self.steps > 20:
                losses.terms["rollout"] = torch.tensor(math.nan if self.steps == 23 else 0.0)
            return losses

    with pytest.raises(TrainingError, match="^step 23: rollout"):
        fit(Late(), sample, RECIPE, [NaNGuard(10)])

    class Gone(Toy):
        def loss(self, batch):
            losses = super().loss(batch)
            if self.steps <= 23:
                losses.terms["early"] = torch.tensor(math.nan if self.steps == 23 else 0.0)
            return losses

    with pytest.raises(TrainingError, match="^step 23: early"):
        fit(Gone(), sample, RECIPE, [NaNGuard(10)])


@pytest.mark.parametrize("cadence", [(10, 15), (7, 40), (40, 3)])
def test_nothing_written_after_the_first_bad_step(cadence, tmp_path):
    recipe = RECIPE.model_copy(update=dict(validate_every=cadence[0], checkpoint_every=cadence[1]))
    with pytest.raises(TrainingError, match="step 17"):
        ours(Breaks("gradient"), tmp_path, recipe)
    assert all(row["step"] <= 16 for row in read_metrics(tmp_path / "metrics.jsonl"))
    if (tmp_path / "state.pt").exists():
        state = read_state(tmp_path / "state.pt")
        assert state["step"] <= 16 and all(t.isfinite().all() for t in state["model"].values())
    assert not (tmp_path / "result.json").exists()


# pictures


def test_pictures_are_drawn_in_evaluation_mode_and_named_by_step(tmp_path):
    seen = []

    def picture(step):
        seen.append((step, model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return curves({"a": ([0, 1], [step, 1], None, None)}, "x", "y")

    model = Toy()
    with_pictures = ours(model, tmp_path / "a", picture=picture)["weights"]
    assert seen == [(20, False, False), (40, False, False)]
    assert sorted(p.name for p in (tmp_path / "a" / "pictures").iterdir()) == [
        "step_000020.png",
        "step_000040.png",
    ]
    assert (tmp_path / "a" / "pictures" / "step_000020.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        ours(Toy(), tmp_path / "b")["weights"] == with_pictures and not (tmp_path / "b" / "pictures").exists()
    )


def test_zero_makes_no_pictures(tmp_path):
    ours(
        Toy(),
        tmp_path,
        RECIPE.model_copy(update={"picture_every": 0}),
        picture=lambda step: pytest.fail("drawn"),
    )


def test_the_module_exports_what_the_chapter_promises():
    promised = {"Progress", "Metrics", "Validation", "BestWeights", "EarlyStopping", "NaNGuard", "Pictures"}
    assert promised <= set(module.__all__)


# one sample, broken data, another device


class Spread(Toy):
    "Beside the loss, what a collapsing model is watched by."

    def loss(self, batch):
        losses = super().loss(batch)
        spread = self.net(batch.x).std(0, correction=0).mean()
        return LossTerms(losses.total, {**losses.terms, "spread": spread.detach()})


@pytest.mark.parametrize("windows", [1, 2, 9, 17])
def test_one_validation_window_or_one_left_over_is_no_reason_to_stop(windows, tmp_path):
    model = Spread()
    result = train(model, DATA, Table(windows, seed=1), RECIPE, tmp_path, progress=False)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "val/spread" in row]
    assert result["steps"] == 40 and len(rows) == 4
    assert all(row["val/spread"] == 0 for row in rows) == (windows == 1)


@dataclass
class Parts:
    "Windows as a dataset has them: bytes, numbers, and what is not there."

    x: Tensor
    states: Tensor
    rewards: Tensor
    latents: Tensor | None = None
    frames: Tensor | None = None

    def to(self, device):
        return self


class Broken:
    "Windows of which one, the fourth that is drawn, holds something in one part."

    def __init__(self, part, value, at=3):
        self.part, self.value, self.at = part, value, at

    def __len__(self):
        return 64

    def batch(self, indices):
        n = len(indices)
        parts = {name: torch.ones(n, 2) for name in ("x", "states", "rewards", "latents")}
        return Parts(**parts, frames=torch.zeros(n, 3, dtype=torch.uint8))

    def sample(self, batch_size, seed, step):
        batch = self.batch(np.arange(batch_size))
        if step == self.at:
            getattr(batch, self.part)[1] = self.value
        return batch


class All(Trainable):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def loss(self, batch):
        parts = (batch.x, batch.states, batch.rewards, batch.latents)
        total = sum((self.w * t).square().mean() for t in parts)
        return LossTerms(total, {"all": total.detach()})


@pytest.mark.parametrize("part", ["x", "states", "rewards", "latents"])
@pytest.mark.parametrize(
    "value, named", [(math.nan, "NaN"), (math.inf, "infinite numbers"), (-math.inf, "infinite numbers")]
)
def test_broken_data_are_named_and_no_rate_is_blamed(part, value, named, tmp_path):
    with pytest.raises(TrainingError) as caught:
        train(All(), Broken(part, value), Broken(part, 1.0), RECIPE, tmp_path, progress=False)
    said = str(caught.value)
    assert f"the data hold {named} in {part}," in said and said.startswith("step 4: all")
    assert "learning_rate" not in said and "\n" not in said


@pytest.mark.parametrize("part", ["states", "rewards", "latents"])
def test_broken_validation_data_are_named(part, tmp_path):
    others = Broken(part, 1.0)
    batch = others.batch

    def broken(indices):
        found = batch(indices)
        getattr(found, part)[0] = math.nan
        return found

    others.batch = broken
    with pytest.raises(TrainingError, match=f"step 10: .*the validation data hold NaN in {part}"):
        train(All(), Broken(part, 1.0), others, RECIPE, tmp_path, progress=False)


def test_finite_data_are_not_blamed():
    with pytest.raises(TrainingError) as caught:
        fit(Breaks("gradient"), sample, RECIPE, [NaNGuard()])
    assert "the data hold" not in str(caught.value) and "learning_rate" in str(caught.value)


class Constant(Toy):
    "A term that does not depend on the model, and was made where tensors are made: on the CPU."

    def loss(self, batch):
        losses = super().loss(batch)
        return LossTerms(losses.total, {"fixed": torch.tensor(0.25), **losses.terms})


def test_a_training_on_another_device_is_the_same_but_for_rounding(tmp_path):
    torch.set_num_threads(1)
    here = train(Constant(), DATA, OTHERS, RECIPE, tmp_path / "here", progress=False)
    with Device(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*copying from a non-meta parameter")
        watching = [History(), Progress(file=io.StringIO())]
        more = dict(device=ELSEWHERE, progress=False, callbacks=watching)
        there = train(Constant(), DATA, OTHERS, RECIPE, tmp_path / "there", **more)
    assert there["best_step"] == here["best_step"] and len(watching[0]["fixed"]) == 40
    for a, b in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("here", "there"))):
        a, b = a | {"seconds": 0}, b | {"seconds": 0}
        assert a == pytest.approx(b, rel=1e-3)


def test_each_device_keeps_its_generators(monkeypatch):
    class Module:
        states = {0: torch.zeros(16, dtype=torch.uint8), 1: torch.ones(16, dtype=torch.uint8)}

        def get_rng_state(self, device=None):
            return self.states[device.index if device else 0]

        def set_rng_state(self, state, device=None):
            self.states = {**self.states, device.index if device else 0: state}

    for name, index in (("cuda:1", 1), ("mps:0", 0), ("cuda:0", 0)):
        device, own = torch.device(name), Module()
        monkeypatch.setattr(torch, "get_device_module", lambda device, own=own: own)
        states = generator_states(device)
        assert states[device.type] is Module.states[index] and "cpu" in states
        restore_generators({**states, device.type: torch.full((16,), 7, dtype=torch.uint8)}, device)
        assert own.states[index][0] == 7 and own.states[1 - index] is Module.states[1 - index]
        restore_generators({"cpu": states["cpu"]}, device)
