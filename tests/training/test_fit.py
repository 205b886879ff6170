"""The loop: schedule, optimiser, order of events, and weights as files."""

import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from worldmodels_nb.settings import TrainingSettings
from worldmodels_nb.training import fit as module
from worldmodels_nb.training.callbacks import Metrics, NaNGuard
from worldmodels_nb.training.fit import (
    Callback,
    History,
    LossTerms,
    Trainable,
    TrainingError,
    WeightsError,
    differences,
    fit,
    fit_steps,
    fit_windows,
    in_steps,
    learning_rate,
    load_weights,
    make_optimizer,
    save_weights,
    spared_from_decay,
    weighted,
    weights_bytes,
    weights_hash,
)


@dataclass
class Points:
    x: Tensor

    def to(self, device):
        return Points(self.x.to(device))


class Toy(Trainable):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 1))
        self.frozen = nn.Linear(2, 1).requires_grad_(False)
        self.calls = []

    def loss(self, batch):
        error = (self.net(batch.x) - batch.x.prod(1, keepdim=True)).square().mean()
        return LossTerms(total=error, terms={"error": error.detach()})

    def after_step(self, step, steps):
        self.calls.append((step, steps))


def toy(width=8, seed=0):
    torch.manual_seed(seed)
    return Toy(width)


def sample(step):
    return Points(torch.randn(16, 2, generator=torch.Generator().manual_seed(step)))


def trained_alike(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# the schedule


def test_schedule_equals_a_case_worked_by_hand():
    six = TrainingSettings(steps=6, learning_rate=1.0, warmup=1 / 3)
    root = math.sqrt(0.5)
    assert [learning_rate(k, 6, six) for k in range(6)] == pytest.approx(
        [0.5, 1, 1, (1 + root) / 2, 0.5, (1 - root) / 2], rel=0, abs=1e-12
    )


def test_a_constant_schedule_stays_and_a_warm_up_may_last_all_along():
    recipe = TrainingSettings(steps=4, learning_rate=1.0, warmup=0.0, schedule="constant")
    assert [learning_rate(k, 4, recipe) for k in range(4)] == [1.0] * 4
    assert learning_rate(3, 4, recipe.model_copy(update={"warmup": 1.0, "schedule": "cosine"})) == 1.0


@pytest.mark.parametrize("steps, warm", [(20, 5), (100, 5), (60, 3), (7, 2)])
def test_schedule_equals_torchs_own_schedulers(steps, warm):
    recipe = TrainingSettings(steps=steps, learning_rate=0.1, warmup=warm / steps)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    of = torch.optim.lr_scheduler
    parts = [
        of.LinearLR(optimizer, 1 / warm, total_iters=warm - 1),
        of.CosineAnnealingLR(optimizer, steps - warm),
    ]
    schedule = of.SequentialLR(optimizer, parts, milestones=[warm])
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [learning_rate(k, steps, recipe) for k in range(steps)] == pytest.approx(theirs, rel=1e-9)


@given(steps=st.integers(1, 400), warmup=st.floats(0, 1), schedule=st.sampled_from(["cosine", "constant"]))
@hypothesis_settings(max_examples=60, deadline=None)
def test_schedule_rises_then_never_rises_and_no_step_is_wasted(steps, warmup, schedule):
    recipe = TrainingSettings(steps=steps, learning_rate=0.01, warmup=warmup, schedule=schedule)
    rates = [learning_rate(k, steps, recipe) for k in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 0.01 for rate in rates) and max(rates) == 0.01
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


# the optimiser


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm2d = nn.LayerNorm([3, 4])  # its gain has two dimensions
        self.conv = nn.Conv2d(2, 3, 3)
        self.batchnorm = nn.BatchNorm2d(3)
        self.cell = nn.GRUCell(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.tied = self.conv


def test_decay_spares_norms_biases_and_vectors_and_nothing_else():
    spared = spared_from_decay(Odd())
    assert {
        "norm2d.weight",
        "norm2d.bias",
        "batchnorm.weight",
        "cell.bias_ih",
        "attention.in_proj_bias",
        "conv.bias",
        "scale",
    } <= spared
    assert not spared & {
        "conv.weight",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "token",
    }


def test_optimizer_holds_every_trainable_parameter_once_and_no_frozen_one():
    model = Odd()
    model.cell.requires_grad_(False)
    decayed, spared = make_optimizer(model, TrainingSettings(weight_decay=0.25)).param_groups
    held = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)


def test_a_wholly_frozen_model_is_refused():
    with pytest.raises(TrainingError, match="every parameter of Toy is frozen"):
        fit(toy().requires_grad_(False), sample, TrainingSettings(steps=1))


# the loop


def test_loop_is_short_enough_to_hold_in_the_head():
    assert len(inspect.getsource(fit_steps).splitlines()) <= 25


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
def test_fit_equals_plain_torch_to_the_last_bit(clip):
    recipe = TrainingSettings(steps=30, learning_rate=0.02, weight_decay=0.3, grad_clip=clip)
    ours, plain = toy(), toy()
    run = fit(ours, sample, recipe)
    spared = spared_from_decay(plain)
    named = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if name not in spared], "weight_decay": 0.3},
            {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
        ],
        fused=True,
    )
    for step in range(30):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 30, recipe)
        optimizer.zero_grad()
        plain.loss(sample(step)).total.backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for _, p in named]))
        if clip and norm > clip:
            nn.utils.clip_grads_with_norm_(
                [p for _, p in named], clip, nn.utils.get_total_norm([p.grad for _, p in named])
            )
        optimizer.step()
    assert trained_alike(ours, plain)
    assert run.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)  # the norm before clipping


class Diary(Callback):
    def __init__(self):
        self.events, self.weights = [], []

    def note(self, name, run):
        self.events.append((name, run.step))
        self.weights.append(run.model.net[0].weight.detach().clone())

    def on_start(self, run):
        self.note("start", run)

    def before_update(self, run):
        self.note("before", run)

    def on_step(self, run):
        self.note("step", run)

    def on_end(self, run):
        self.note("end", run)


def test_events_come_in_order_and_the_update_lies_between_before_update_and_on_step():
    diary, asked = Diary(), []
    model = toy()

    def watched(step):
        asked.append(step)
        return sample(step)

    fit(model, watched, TrainingSettings(steps=3), [diary])
    assert diary.events == [
        ("start", 0),
        ("before", 0),
        ("step", 1),
        ("before", 1),
        ("step", 2),
        ("before", 2),
        ("step", 3),
        ("end", 3),
    ]
    assert asked == [0, 1, 2]
    assert model.calls == [(1, 3), (2, 3), (3, 3)]
    start, before, after = diary.weights[:3]
    assert torch.equal(start, before) and not torch.equal(before, after)


def test_a_callback_stops_the_run_by_giving_a_reason():
    class Stop(Callback):
        def on_step(self, run):
            if run.step == 4:
                run.stop = "seen enough"

    diary = Diary()
    run = fit(toy(), sample, TrainingSettings(steps=50), [Stop(), diary])
    assert (run.step, run.stop, diary.events[-1]) == (4, "seen enough", ("end", 4))


def test_a_callback_may_move_the_start_and_the_batches_follow():
    class Jump(Callback):
        def on_start(self, run):
            run.step = 7

    asked = []

    def watched(step):
        asked.append(step)
        return sample(step)

    fit(toy(), watched, TrainingSettings(steps=10), [Jump()])
    assert asked == [7, 8, 9]


def test_numbers_are_read_from_the_device_only_now_and_then(monkeypatch, tmp_path):
    reads, where = [], [0]
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):

        def counted(self, *args, original=getattr(Tensor, name)):
            reads.append(where[0])
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)

    class Where(Callback):
        def before_update(self, run):
            where[0] = run.step + 1

    fit(
        toy(),
        sample,
        TrainingSettings(steps=40),
        [Where(), NaNGuard(10), Metrics(tmp_path / "metrics.jsonl")],
    )
    assert set(reads) == {10, 20, 30, 40}


def test_frozen_parts_do_not_move():
    model = toy()
    before = model.frozen.weight.clone()
    fit(model, sample, TrainingSettings(steps=5, weight_decay=1.0))
    assert torch.equal(model.frozen.weight, before)


@pytest.mark.parametrize(
    "epochs, windows, batch, steps",
    [(20, 1000, 32, 625), (0.001, 10, 8, 1), (1, 65, 64, 2), (2.5, 64, 16, 10)],
)
def test_epochs_become_steps(epochs, windows, batch, steps):
    counted = in_steps(TrainingSettings(epochs=epochs, batch_size=batch), windows)
    assert (counted.steps, counted.epochs) == (steps, None)


@pytest.mark.parametrize("epochs, windows", [(1e300, 10), (1e308, 10**6), (1e9, 10**6)])
def test_more_epochs_than_time_are_refused(epochs, windows):
    with pytest.raises(TrainingError, match="lower train.epochs"):
        in_steps(TrainingSettings(batch_size=8).model_copy(update={"epochs": epochs}), windows)


@pytest.mark.parametrize("recipe", [dict(), dict(bf16=True), dict(grad_clip=0.0), dict(schedule="constant")])
def test_a_device_without_numbers_is_trained_on_too(recipe):
    run = fit(toy(), sample, TrainingSettings(steps=3, **recipe), [NaNGuard()], device="meta")
    assert run.step == 3 and run.grad_norm.is_meta and all(p.is_meta for p in run.model.parameters())


def test_without_epochs_the_steps_stand():
    recipe = TrainingSettings(steps=77)
    assert in_steps(recipe, 10) is recipe


class Rows:
    "Batches as windows hand them out: by seed and step."

    def __len__(self):
        return 64

    def sample(self, batch_size, seed, step):
        draw = torch.Generator().manual_seed(1000 * seed + step)
        return Points(torch.randn(batch_size, 2, generator=draw))


def test_windows_are_sampled_by_batch_size_seed_and_step():
    recipe, rows = TrainingSettings(steps=10, batch_size=8), Rows()
    ours = fit_windows(toy(), rows, recipe, seed=3).model
    assert trained_alike(ours, fit(toy(), lambda step: rows.sample(8, 3, step), recipe).model)
    assert not trained_alike(ours, fit_windows(toy(), rows, recipe, seed=4).model)


def test_a_history_holds_total_and_terms_and_changes_nothing():
    every, tenth, plain = History(), History(every=10), toy()
    recipe = TrainingSettings(steps=30)
    fit(plain, sample, recipe)
    ours = fit(toy(), sample, recipe, [every, tenth]).model
    assert trained_alike(ours, plain)
    assert len(every["total"]) == 30 and [row["step"] for row in tenth.rows] == [10, 20, 30]
    assert every["total"] == every["error"] and tenth["error"] == every["error"][9::10]
    assert set(every.lines()) == {"error"} and set(every.lines("total", "error")) == {"total", "error"}


class Sine(Trainable):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 1))

    def loss(self, x):
        error = (self.net(x) - torch.sin(x)).square().mean()
        return LossTerms(total=error, terms={"error": error})


def test_fit_equals_one_group_of_plain_adamw_to_the_last_bit():
    recipe = TrainingSettings(steps=50, learning_rate=0.02, weight_decay=0.0, warmup=0.0, schedule="constant")
    plain = toy()
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0, fused=True)
    for step in range(50):
        optimizer.zero_grad()
        plain.loss(sample(step)).total.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    assert trained_alike(fit(toy(), sample, recipe).model, plain)


def test_half_precision_rounds_otherwise_and_learns_all_the_same():
    def positions(step):
        return 6 * torch.rand(64, 1, generator=torch.Generator().manual_seed(step)) - 3

    precise, half = History(), History()
    for history, bf16 in ((precise, False), (half, True)):
        fit(Sine(), positions, TrainingSettings(steps=300, learning_rate=0.02, bf16=bf16), [history])
    assert half["error"] != precise["error"] and half["error"][-1] < 0.1 * half["error"][0]


def test_the_total_is_the_weighted_sum_and_the_terms_stay_as_they_are():
    parts = {"prediction": torch.tensor(0.5), "variance": torch.tensor(0.25)}
    losses = weighted(parts, {"variance": 16.0})
    assert losses.total.item() == 0.5 + 16 * 0.25
    assert {name: term.item() for name, term in losses.terms.items()} == {"prediction": 0.5, "variance": 0.25}


# weights as files


class Everything(nn.Module):
    "Buffers, tied weights, a scalar, integers and half precision."

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("coarse", torch.arange(4, dtype=torch.bfloat16))


def test_weights_survive_the_file_whole(tmp_path):
    torch.manual_seed(0)
    model = Everything()
    torch.manual_seed(1)
    other = Everything()
    model.norm(torch.randn(8, 3))
    named = save_weights(model, tmp_path / "w")
    load_weights(other, tmp_path / "w", named)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert weights_hash(other) == named and other.b.weight is other.a.weight


def test_hash_sees_one_bit():
    model = toy()
    named = weights_hash(model)
    with torch.no_grad():
        model.net[0].bias[0] = torch.nextafter(model.net[0].bias[0], torch.tensor(9.0))
    assert weights_hash(model) != named


CONTENT = weights_bytes(toy(seed=3))


@given(cut=st.integers(0, len(CONTENT) - 1))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_refused_by_name_wherever_it_is_cut(cut, tmp_path_factory):
    path, model = tmp_path_factory.mktemp("cut") / "weights.safetensors", toy()
    named = weights_hash(model)
    path.write_bytes(CONTENT[:cut])
    with pytest.raises(WeightsError, match="weights.safetensors"):
        load_weights(model, path)
    assert weights_hash(model) == named


@given(at=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_flipped_bit_anywhere_is_noticed_by_the_hash_and_never_raises_anything_else(
    at, bit, tmp_path_factory
):
    path, content = tmp_path_factory.mktemp("flip") / "weights.safetensors", bytearray(CONTENT)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_weights(toy(), path, weights_hash(toy(seed=3)))
    try:
        load_weights(toy(), path)
    except WeightsError:
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(60), b"epoch,loss\n1,0.3\n" * 20]
)
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(content)
    model = toy()
    named = weights_hash(model)
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_weights(model, tmp_path / "weights.safetensors")
    assert weights_hash(model) == named


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="nowhere.*No such file"):
        load_weights(toy(), tmp_path / "nowhere")


def test_another_architecture_is_refused_and_says_which_tensors_differ(tmp_path):
    save_weights(toy(width=16), tmp_path / "w")
    model = toy()
    named = weights_hash(model)
    with pytest.raises(
        WeightsError, match=r"net.0.weight is \(16, 2\) float32, the model's is \(8, 2\) float32.*and \d more"
    ):
        load_weights(model, tmp_path / "w")
    assert weights_hash(model) == named


def test_differences_name_what_is_missing_and_what_is_too_much():
    a, b = (
        {"x": torch.zeros(2), "y": torch.zeros(2)},
        {"x": torch.zeros(2), "z": torch.zeros(2, dtype=torch.float16)},
    )
    assert differences(a, a) == ""
    assert differences(a, b) == "z is missing; the model has no y"
    assert (
        differences({"z": torch.zeros(2)}, {"z": b["z"]}) == "z is (2,) float32, the model's is (2,) float16"
    )


def test_the_module_exports_what_the_chapter_promises():
    assert {"fit", "make_optimizer", "learning_rate", "load_weights", "save_weights", "in_steps"} <= set(
        module.__all__
    )


# a step at a time


def test_drawn_a_step_at_a_time_the_loop_is_the_same_to_the_last_bit():
    ours, other, diary = toy(), toy(), Diary()
    recipe = TrainingSettings(steps=5, learning_rate=0.02)
    steps = fit_steps(ours, sample, recipe, [diary])
    assert [(run.step, len(diary.events)) for run in steps] == [(k, 1 + 2 * k) for k in range(6)]
    assert diary.events[-1] == ("end", 5)
    fit(other, sample, recipe)
    assert trained_alike(ours, other)


def test_a_loop_that_is_left_alone_has_no_end_and_one_that_is_told_to_stop_has():
    recipe = TrainingSettings(steps=5)
    for told, last in ((False, ("step", 1)), (True, ("end", 1))):
        diary = Diary()
        steps = fit_steps(toy(), sample, recipe, [diary])
        for run in steps:
            if run.step == 1: run.stop = "enough" if told else ""
            if run.step == 1 and not told: break
        steps.close()
        assert diary.events[-1] == last
