"Open-loop rollouts: errors by hand, baselines and references, invariances, and rows."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.datasets import Batch, Windows
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.data.tworooms import TwoRooms
from worldmodels_nb.eval.heads import StateDecoder, fit_probe, readout
from worldmodels_nb.eval.results import (
    MODEL,
    EvaluationError,
    Source,
    data_rows,
    independent_windows,
    result_row,
)
from worldmodels_nb.eval.rollouts import (
    MEAN_FRAME,
    MEAN_POSITION,
    PERSISTENCE,
    SHUFFLED,
    STILL,
    TRUTH,
    HorizonErrors,
    Readers,
    TrainingMeans,
    evaluation_horizons,
    open_loop,
    plot_rollouts,
    roll_ahead,
    rollout_batches,
    rollout_errors,
    rollout_results,
    rollout_rows,
    rollout_strips,
    training_means,
)
from worldmodels_nb.models import jepa  # noqa: F401  (registers itself)
from worldmodels_nb.models.base import build_model
from worldmodels_nb.settings import EvaluationSettings, load_settings
from worldmodels_nb.training.fit import freeze

PROBE, DECODER = Source("reference", "probe"), Source("reference", "decoder")


class Drift:
    "Every action is added to the latent; `gain` scales what the model believes of it."
    context_length = 1

    def __init__(self, gain=1.): self.gain, self.encoded = gain, 0

    def encode(self, frames):
        self.encoded += 1
        return frames[..., 0, 0, :2].float()[:, :, None]

    def rollout(self, z, past_actions, actions):
        moves = actions if actions.is_floating_point() else torch.nn.functional.one_hot(actions, 2).float()
        return z[:, -1:] + self.gain * moves.cumsum(1)[:, :, None]


def world(B=12, T=6, scale=1., discrete=False, states=True, latents=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(0, 2, (B, T), generator=g) if discrete else torch.randn(B, T, 2, generator=g)
    moves = torch.nn.functional.one_hot(actions, 2).float() if discrete else actions
    s = torch.cat([torch.randn(B, 1, 2, generator=g), moves], 1).cumsum(1)             # (B, T+1, 2)
    frames = torch.randint(0, 256, (B, T + 1, 1, 8, 8), dtype=torch.uint8, generator=g)
    nothing, z = torch.zeros(B, T), scale * s[:, :, None]
    return Batch(frames, actions if discrete else actions * scale, nothing, nothing.bool(),
                 s if states else None, z if latents else None)


def black(z): return torch.zeros(*z.shape[:2], 1, 8, 8)


def probe_of(batch):
    return fit_probe(readout(batch.latents).flatten(0, 1), batch.states.flatten(0, 1), 1e-9)


def upto(batch, h, history=1):
    "The beginning of each window: `history` steps to look back on, and h to predict."
    T = history - 1 + h
    def part(array, n): return None if array is None else array[:, :n]
    acts = (part(array, T) for array in (batch.actions, batch.rewards, batch.terminated))
    return Batch(part(batch.frames, T + 1), *acts, part(batch.states, T + 1), part(batch.latents, T + 1))


def errors_at(model, batch, horizons, probe=None, decoder=None, position=(), std=None, means=None):
    "Errors at each of some horizons (n, K), of the same windows' beginnings."
    readers = Readers({"": probe} if probe else {}, decoder, means, position, std)
    found = [rollout_errors(model, [upto(batch, h)], readers) for h in horizons]
    return {metric: {source: torch.stack([each[metric][source] for each in found], 1) for source in values}
            for metric, values in found[0].items()}


@pytest.mark.parametrize("discrete", [False, True])
def test_a_perfect_model_has_no_error_and_baselines_have_theirs(discrete):
    batch = world(discrete=discrete)
    errors = errors_at(Drift(), batch, [1, 3, 6], probe_of(batch), position=[0, 1])
    assert errors["latent"][MODEL].max() < 1e-10 and errors["latent"][MODEL].shape == (12, 3)
    assert errors["position"][MODEL].max() < 1e-3 and errors["position"][PROBE].max() < 1e-3
    moved = (batch.states[:, [1, 3, 6]] - batch.states[:, :1])
    assert torch.allclose(errors["position"][STILL], moved.norm(dim=-1).double(), atol=1e-3)
    variance = batch.latents.double().flatten(0, 2).var(0, correction=0).sum()
    last = moved.double().square().sum(-1)[:, -1] / variance
    assert torch.allclose(errors["latent"][PERSISTENCE][:, -1], last)


def test_shuffled_actions_are_those_of_another_window_from_the_present_on():
    for history in (1, 3):
        batch = world(B=5)
        rolled = open_loop(Drift(), batch.latents, batch.actions, history)
        moves = batch.actions[:, history - 1:].roll(2, 0).cumsum(1)
        other = batch.latents[:, history - 1:history] + moves[:, :, None]
        assert torch.allclose(rolled[SHUFFLED], other, atol=1e-6)
        assert (rolled[SHUFFLED] - rolled[MODEL]).abs().amax((1, 2, 3)).min() > 1e-3


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(.1, .9))
def test_the_latent_error_has_no_unit(scale, gain):
    plain = errors_at(Drift(gain), world(), [1, 6])["latent"]
    scaled = errors_at(Drift(gain), world(scale=scale), [1, 6])["latent"]
    for whose in plain: assert torch.allclose(plain[whose], scaled[whose], rtol=1e-3, atol=1e-6)


def test_saying_the_mean_latent_scores_one_and_a_point_scores_nothing():
    batch = world(B=400)
    class Mean:
        context_length = 1
        def rollout(self, z, past, actions):
            return batch.latents.mean((0, 1)).expand(len(z), actions.shape[1], 1, 2)
    batch.latents = torch.randn(400, 7, 1, 2, generator=torch.Generator().manual_seed(1))
    errors = errors_at(Mean(), batch, [1, 6])["latent"]
    assert torch.allclose(errors[MODEL].mean(0), torch.ones(2, dtype=torch.float64), atol=.1)
    assert torch.allclose(errors[PERSISTENCE].mean(0), torch.full((2,), 2., dtype=torch.float64), atol=.25)
    batch.latents = torch.full((400, 7, 1, 2), .3)
    assert errors_at(Mean(), batch, [1])["latent"][MODEL].isnan().all()


def test_batches_are_only_a_way_to_save_memory():
    batch = world(B=12)
    def part(i): return Batch(*(None if v is None else v[i] for v in vars(batch).values()))
    readers = Readers({"": probe_of(batch)}, position=[0])
    whole, cut = (rollout_errors(Drift(.5), batches, readers)
                  for batches in ([batch], [part(slice(0, 5)), part(slice(5, 12))]))
    for metric in whole:
        for whose in set(whole[metric]) - {SHUFFLED}:
            assert torch.allclose(whole[metric][whose], cut[metric][whose])


def test_cached_latents_are_used_and_frames_are_encoded_once_otherwise():
    model = Drift()
    rollout_errors(model, [world()])
    assert model.encoded == 0
    rollout_errors(model, [world(latents=False)], Readers({}, black))
    assert model.encoded == 1


def test_without_states_or_readers_there_are_fewer_metrics():
    batch = world()
    probe = probe_of(batch)
    def metrics(batch, **how): return errors_at(Drift(), batch, [1], probe, **how).keys()
    assert metrics(world(states=False), position=[0]) == {"latent"}
    assert metrics(batch, position=[]) == {"latent"}
    assert metrics(batch, position=[1], std=torch.ones(2)) == {"latent", "position_std"}


def test_positions_of_different_units_count_in_standard_deviations():
    batch = world(B=200)
    def errors():
        how = dict(position=[0, 1], std=batch.states.flatten(0, 1).std(0, correction=0))
        return errors_at(Drift(.5), batch, [6], probe_of(batch), **how)["position_std"]
    plain = errors()
    batch.states = batch.states * torch.tensor([1000., .001])
    other = errors()
    for whose in plain: assert torch.allclose(plain[whose], other[whose], rtol=1e-2, atol=1e-3)
    std = batch.latents.double().flatten(0, 2).std(0, correction=0)
    off = (batch.latents[:, 6] - batch.latents[:, 0])[:, 0].double() / std
    assert torch.allclose(plain[STILL][:, 0], off.square().mean(-1).sqrt(), atol=1e-2)


def test_pixel_errors_by_hand():
    batch = world()
    def decoder(z): return black(z) + .5
    means = TrainingMeans(torch.full((1, 8, 8), .25))
    grey = errors_at(Drift(), batch, [2, 5], decoder=decoder, means=means)["pixel"]
    frames = batch.frames.double() / 255
    def off(said): return (frames[:, [2, 5]] - said).square().mean((-3, -2, -1))
    assert torch.allclose(grey[MODEL], off(.5), atol=1e-6)
    assert torch.allclose(grey[STILL], off(frames[:, :1]), atol=1e-6)
    assert torch.allclose(grey[MEAN_FRAME], off(.25), atol=1e-6)
    assert torch.equal(grey[DECODER], grey[MODEL])


def test_the_mean_position_is_that_of_training():
    batch = world()
    means = TrainingMeans(torch.zeros(1, 8, 8), torch.tensor([3., -1.]))
    errors = errors_at(Drift(), batch, [4], probe_of(batch), position=[0, 1], means=means)["position"]
    off = (batch.states[:, 4] - torch.tensor([3., -1.])).norm(dim=-1).double()
    assert torch.allclose(errors[MEAN_POSITION][:, 0], off)


def test_training_means_are_those_of_the_training_frames(sample):
    means, rows = training_means(sample, np.array([1, 3])), sample.frame_indices(np.array([1, 3]))
    assert np.allclose(means.frame, sample.frames[rows].mean(0) / 255, atol=1e-6)
    assert np.allclose(means.state, sample.states[rows].mean(0), atol=1e-4)
    std = sample.states[rows].std(0)
    assert np.allclose(means.std, np.where(std > 0, std, np.inf), rtol=1e-4)
    assert torch.isinf(means.std[2:]).all()


@pytest.mark.parametrize("history, steps", [(3, 2), (8, 6), (2, 1)])
def test_windows_without_a_step_to_predict_are_refused(history, steps):
    with pytest.raises(EvaluationError, match=f"behind a history of {history}; lower evaluation.history"):
        rollout_errors(Drift(), [upto(world(), steps)], history=history)


def test_one_window_or_none_are_refused():
    for batches in ([world(B=1)], []):
        with pytest.raises(EvaluationError, match="evaluation.n_windows"):
            rollout_errors(Drift(), batches)


# ---------------------------------------------------------------- history

class Trend(Drift):
    "Goes on by the mean of the moves that it can look back on; `seen` says how far that was."
    def __init__(self, context_length): self.context_length = context_length

    def rollout(self, z, past_actions, actions):
        self.seen = z.shape[1], past_actions.shape[1], actions.shape[1]
        move = (z[:, 1:] - z[:, :-1]).mean(1, keepdim=True) if z.shape[1] > 1 else torch.zeros_like(z[:, :1])
        return z[:, -1:] + move * torch.arange(1, actions.shape[1] + 1)[:, None, None]


@pytest.mark.parametrize("context_length", [1, 2, 4, 9])
@pytest.mark.parametrize("history", [1, 2, 4])
def test_a_model_is_handed_as_much_history_as_it_looks_at(context_length, history):
    model, batch, known = Trend(context_length), world(T=7), min(context_length, history)
    ahead = roll_ahead(model, batch.latents[:, :history], batch.actions[:, :history - 1 + 3])
    assert model.seen == (known, known - 1, 3) and ahead.shape == (12, 3, 1, 2)


def rolled_behind(model, batch, history, first):
    "Model errors at three steps from frame 3 on, with `history` steps of which the first is frame `first`."
    def part(array, n): return array[:, first:first + n]
    T = history - 1 + 3
    acts = (part(array, T) for array in (batch.actions, batch.rewards, batch.terminated))
    batch = Batch(None, *acts, part(batch.states, T + 1), part(batch.latents, T + 1))
    rolled = open_loop(model, batch.latents, batch.actions, history)
    return (rolled[MODEL] - rolled[TRUTH]).square().sum((-2, -1))


@pytest.mark.parametrize("model", [Drift(.7), Trend(1)])
def test_older_history_changes_nothing_for_a_model_of_context_length_one(model):
    batch = world(T=8)
    present = rolled_behind(model, batch, 1, 3)
    assert torch.equal(rolled_behind(model, batch, 4, 0), present)
    assert torch.equal(rolled_behind(model, batch, 2, 2), present)


def test_a_model_that_looks_back_uses_its_history():
    batch = world(T=8)
    alone, short, long = (rolled_behind(Trend(4), batch, h, 4 - h) for h in (1, 2, 4))
    assert not torch.allclose(alone, short) and not torch.allclose(short, long)
    straight = Batch(None, batch.actions, batch.rewards, batch.terminated, batch.states,
                     torch.arange(9.)[None, :, None, None].expand(12, -1, 1, 2))
    assert rolled_behind(Trend(4), straight, 4, 0).max() == 0 < rolled_behind(Trend(4), straight, 1, 3).min()


@pytest.mark.parametrize("name, changes", [("vjepa2", {}), ("jepa", {}), ("jepa", {"model.frame_stack": 2})])
def test_registered_models_use_their_history(name, changes, sample):
    small = {"model.latent_dim": 16, "encoder.patch.channels": 8, "predictor.hidden": [16],
             "vjepa2.pretrain.dim": 24, "vjepa2.pretrain.depth": 1, "vjepa2.action.dim": 24,
             "vjepa2.action.heads": 2, "vjepa2.action.depth": 1}
    torch.manual_seed(0)
    model = freeze(build_model(name, load_settings(overrides=small | changes), sample.spec))
    windows = Windows(sample, np.arange(8), 6, model.frame_stack)
    batch = windows.batch(np.arange(4))
    with torch.no_grad():
        z = model.encode(batch.frames)
        other = torch.cat([z[:, :3].flip(0), z[:, 3:]], 1)      # the same present, another past
        ahead, changed = (roll_ahead(model, past[:, :4], batch.actions) for past in (z, other))
    assert torch.equal(ahead, changed) == (model.context_length == 1)


def test_no_window_with_history_crosses_an_episode(sample):
    windows = Windows(sample, np.arange(8), 3 + 2)
    for row, first in zip(windows.begin, windows.first):
        episode = int(np.searchsorted(sample.starts, row, side="right")) - 1
        assert sample.starts[episode] == first <= row
        assert row + 5 <= first + sample.lengths[episode]


def test_a_real_model_with_stacked_frames():
    settings = load_settings(overrides={"model.frame_stack": 2, "model.latent_dim": 16,
                                        "encoder.patch.channels": 8, "loss.inverse": 0.0})
    spec = DataSpec((3, 16, 16), ActionSpec("discrete", 4), [], [])
    torch.manual_seed(0)
    model, decoder = freeze(build_model("jepa", settings, spec)), StateDecoder((1, 16), (3, 16, 16), 4).eval()
    B, T = 6, 4
    frames = torch.randint(0, 256, (B, 1 + T + 1, 3, 16, 16), dtype=torch.uint8)
    actions = torch.randint(0, 4, (B, T))
    batch = Batch(frames, actions, torch.zeros(B, T), torch.zeros(B, T).bool(), None, None)
    for history in (1, 3):
        errors = rollout_errors(model, [batch], Readers({}, decoder), history)
        own = batch.frames[:, 1:] / 255                                                # the first is context
        still = (own[:, -1] - own[:, history - 1]).square().mean((-3, -2, -1)).double()
        assert torch.allclose(errors["pixel"][STILL], still)
        shapes = {metric: values[MODEL].shape for metric, values in errors.items()}
        assert shapes == {"latent": (B,), "pixel": (B,)}
        assert not errors["latent"][MODEL].requires_grad


class Cut(Windows):
    "Windows of episodes that need no dataset."
    def __init__(self, counts): self.first = self.begin = np.repeat(np.arange(len(counts)) * 100, counts)

    def batch(self, indices):
        return Batch(*(torch.zeros(len(indices), 1) for _ in range(4)), None, None)


@pytest.mark.parametrize("n, size, expected", [(10, 4, [4, 3, 3]), (65, 64, [33, 32]), (3, 64, [3])])
def test_no_window_is_left_alone_in_a_batch(n, size, expected):
    assert [len(b.rewards) for b in rollout_batches(Cut([n]), np.arange(n), size)] == expected


def test_sources_say_what_goes_through_the_model():
    batch = world(B=4)
    rolled = open_loop(Drift(), batch.latents, batch.actions)
    assert list(rolled) == [TRUTH, MODEL, PERSISTENCE, SHUFFLED]
    means = TrainingMeans(torch.zeros(1, 8, 8), torch.zeros(2))
    values = errors_at(Drift(), batch, [2], probe_of(batch), black, [0, 1], means=means)
    assert list(values["latent"]) == [MODEL, PERSISTENCE, SHUFFLED]
    assert list(values["position"]) == [PROBE, MODEL, SHUFFLED, STILL, MEAN_POSITION]
    assert list(values["pixel"]) == [DECODER, MODEL, SHUFFLED, STILL, MEAN_FRAME]
    free = {source for errors in values.values() for source in errors if not source.through_model}
    assert free == {STILL, MEAN_FRAME, MEAN_POSITION}
    assert STILL != PERSISTENCE and STILL.name == PERSISTENCE.name


def rows_at(h, seed=0, gain=.8, mean=0., names=("", "mlp")):
    "Rows of one horizon, by whose, metric."
    batch = world(B=20, seed=seed)
    means = TrainingMeans(torch.zeros(1, 8, 8), torch.full((2,), float(mean)))
    readers = Readers(dict.fromkeys(names, probe_of(batch)), black, means, [0, 1])
    values = rollout_errors(Drift(gain), [upto(batch, h)], readers)
    errors = HorizonErrors(h, np.arange(20), np.repeat(np.arange(10), 2), values)
    rows = rollout_rows(errors, "drift", seed=5, resamples=50)
    assert len({(row["model"], row["head"], row["metric"]) for row in rows}) == len(rows)
    return rows


def test_rows_say_whose_they_are():
    rows = rows_at(6)
    whose = {(row["model"], row["kind"], row["head"]) for row in rows}
    assert whose == {("drift", "model", ""), ("", "baseline", "persistence"), ("", "baseline", "mean_frame"),
                     ("", "baseline", "mean_position"), ("drift", "baseline", "persistence"),
                     ("drift", "baseline", "shuffled_actions"), ("drift", "reference", "probe"),
                     ("drift", "reference", "decoder")}
    places = {f"{name}position{ratio}" for name in ("", "mlp_") for ratio in ("", "_ratio")}
    assert {row["metric"] for row in rows} == {"latent", "pixel", "pixel_ratio"} | places
    own = [row["metric"] for row in rows if (row["model"], row["head"]) == ("drift", "persistence")]
    assert own == ["latent"], "persistence through the model stands beside latent errors only"
    assert {(row["n"], row["protocol"], row["horizon"]) for row in rows} == {(20, "rollout", 6)}
    assert {row["unit"] for row in rows if row["metric"] in ("position", "mlp_position")} == {"px"}
    assert {row["unit"] for row in rows if row["metric"] not in ("position", "mlp_position")} == {""}
    assert type(rows[0]["horizon"]) is int and type(rows[0]["value"]) is float


@pytest.mark.parametrize("h", [1, 2, 6])
@pytest.mark.parametrize("gain", [1.1, .5])
@pytest.mark.parametrize("mean", [0., 50.])
def test_a_ratio_row_equals_its_two_parts(h, gain, mean):
    "Whichever baseline is the best one: far from the data, the mean position never is."
    for seed in range(3):
        rows = rows_at(h, seed, gain, mean)
        for metric in ("position", "mlp_position", "pixel"):
            here = [row for row in rows if row["metric"] == metric]
            own = next(row["value"] for row in here if row["kind"] == "model")
            free = {row["head"]: row["value"] for row in here if not row["model"]}
            ratio = next(row for row in rows if row["metric"] == f"{metric}_ratio")
            assert len(free) == 2 and ratio["model"] == "drift"
            assert ratio["value"] == pytest.approx(own / min(free.values()), rel=1e-9)
            assert ratio["low"] <= ratio["value"] <= ratio["high"]
            if metric != "pixel" and mean: assert min(free, key=free.get) == "persistence"


def test_the_best_baseline_is_not_always_persistence():
    "Far ahead, a random walk is nearer to the middle than to where it was."
    batch = world(B=200, T=40)
    batch.states = batch.states - batch.states[:, -1:] * .9     # all walks end near the middle
    means = TrainingMeans(torch.zeros(1, 8, 8), torch.zeros(2))
    readers = Readers({"": probe_of(batch)}, None, means, [0, 1])
    values = rollout_errors(Drift(), [batch], readers)["position"]
    rows = rollout_rows(HorizonErrors(40, np.arange(200), np.arange(200), dict(position=values)), "drift")
    ratio = next(row["value"] for row in rows if row["metric"] == "position_ratio")
    assert values[MEAN_POSITION].mean() < values[STILL].mean()
    assert ratio == pytest.approx((values[MODEL].mean() / values[MEAN_POSITION].mean()).item())


def test_baselines_are_the_same_for_all_models():
    one, other = ({(row["head"], row["metric"]): row for row in rows_at(4, gain=gain) if not row["model"]}
                  for gain in (.3, 1.))
    assert one == other and len(one) == 6


def test_a_model_that_has_lost_the_agent_is_not_forgiven():
    "Its own persistence reads as badly as it does; the true one does not."
    batch, g = world(B=400), torch.Generator().manual_seed(1)
    batch.states = batch.states + 10 * torch.randn(400, 1, 2, generator=g)
    batch.latents = torch.ones(400, 7, 1, 2) * torch.randn(400, 1, 1, 1, generator=g)
    class Kept:
        context_length = 1
        def rollout(self, z, past, actions): return z[:, -1:].expand(-1, actions.shape[1], -1, -1)
    probe = fit_probe(readout(batch.latents).flatten(0, 1), batch.states.flatten(0, 1), .1)
    errors = errors_at(Kept(), batch, [1], probe, position=[0, 1])
    own, still = (errors["position"][source].mean() for source in (MODEL, STILL))
    assert errors["latent"][MODEL].max() == 0 and own > 5 * still


def test_errors_are_kept_with_their_windows():
    batch = world(B=8)
    values = rollout_errors(Drift(.5), [batch], Readers({"": probe_of(batch)}, black, position=[0, 1]))
    arrays = HorizonErrors(6, np.arange(8) * 7, np.zeros(8, int), values).arrays()
    assert set(arrays) == {"error_latent_6", "error_position_6", "error_pixel_6", "window_6", "episode_6"}
    assert arrays["error_position_6"].dtype == np.float32 and arrays["window_6"].dtype == np.int64
    assert np.allclose(arrays["error_position_6"], values["position"][MODEL])
    assert arrays["window_6"].tolist() == list(range(0, 56, 7))


def test_undefined_errors_stay_undefined():
    unknown = torch.full((4,), math.nan)
    values = {"latent": {MODEL: unknown, PERSISTENCE: unknown}, "pixel": {MODEL: unknown, STILL: unknown}}
    rows = rollout_rows(HorizonErrors(1, np.arange(4), np.arange(4), values), "point")
    assert all(math.isnan(row[key]) for row in rows for key in ("value", "low", "high"))


def test_the_picture_has_a_line_per_model_and_baseline():
    rows = [result_row("rollout", "position", h, h - .5, h + .5, 9, h, "jepa", source)
            for source in (MODEL, PERSISTENCE, STILL) for h in (4, 1)]
    ax = plot_rollouts(rows, "position", "px").axes[0]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 4]] * 3 and "n = 9" in ax.get_ylabel()
    assert [line.get_label() for line in ax.lines] == ["jepa", "persistence (jepa)", "persistence"]
    styles = [(line.get_color(), line.get_linestyle()) for line in ax.lines]
    assert styles[0][0] != styles[1][0] == styles[2][0]
    assert styles[0][1] == "-" and "-" not in (styles[1][1], styles[2][1])
    with pytest.raises(EvaluationError, match="no row has the metric 'pixel'; there are position"):
        plot_rollouts(rows, "pixel", "")


def test_what_has_no_model_in_it_comes_with_each_and_is_drawn_once():
    rows = [result_row("reward", "mse", h, n=5, horizon=h, model=model, source=source)
            for model in ("a", "b") for source in (Source("model", "larp"), STILL) for h in (1, 2)]
    ax = plot_rollouts(rows, "mse", "").axes[0]
    assert [line.get_label() for line in ax.lines] == ["a larp", "persistence", "b larp"]


class Simulated:
    "The rooms themselves as a model, whose latents are scaled states; perhaps with a fault."
    decodes, frame_stack, context_length = False, 1, 1

    def __init__(self, gain=1.): self.gain, self.sim = gain, TwoRooms()

    def move(self, s, a): return self.sim.step(s, a * self.gain)[0]

    def rollout(self, z, past_actions, actions):
        s, steps = z[:, -1, 0].numpy() * 16 + 32, []
        for a in actions.unbind(1): steps.append(s := self.move(s, a.numpy()))
        return (torch.from_numpy(np.stack(steps, 1)) - 32)[:, :, None] / 16


class Ghost(Simulated):
    def move(self, s, a): return s + np.pad(a * self.sim.max_step, ((0, 0), (0, 2)))


def render(z):
    s = z[..., 0, :].flatten(0, -2).numpy() * 16 + 32
    return torch.from_numpy(TwoRooms().render(s) / 255).float().unflatten(0, z.shape[:-2])


@pytest.fixture(scope="module")
def walks():
    "128 walks of 16 steps through two rooms, as one batch."
    rng, sim, B, T = np.random.default_rng(0), TwoRooms(), 128, 16
    heading = rng.uniform(0, 2 * np.pi, (B, 1)) + rng.vonmises(0, 5, (B, T)).cumsum(1)
    moves = (np.stack([np.cos(heading), np.sin(heading)], -1) * .6).astype(np.float32)
    path = [sim.reset(B, rng)]
    for t in range(T): path.append(sim.step(path[-1], moves[:, t])[0])
    frames, states = (np.stack(part, 1) for part in ([sim.render(s) for s in path], path))
    frames, moves, states = map(torch.from_numpy, (frames, moves, states))
    nothing = torch.zeros(B, T)
    return Batch(frames, moves, nothing, nothing.bool(), states, (states - 32)[:, :, None] / 16)


def test_errors_of_simulators_whose_faults_are_known(walks):
    z, horizons = walks.latents, [1, 2, 4, 8, 16]
    probe = fit_probe(readout(z).flatten(0, 1), walks.states.flatten(0, 1))
    models = dict(perfect=Simulated(), short=Simulated(gain=.9), ghost=Ghost())
    means = TrainingMeans(walks.frames.float().mean((0, 1)) / 255, walks.states.mean((0, 1)))
    errors = {name: errors_at(model, walks, horizons, probe, render, [0, 1], means=means)
              for name, model in models.items()}
    assert errors["perfect"]["latent"][MODEL].abs().max() < 1e-6
    assert errors["perfect"]["pixel"][MODEL].abs().max() < 1e-4
    assert (errors["short"]["position"][MODEL].mean(0).diff() > 0).all()
    variance = readout(z).flatten(0, 1).var(0, correction=0).sum()
    moved = (z[:, 16] - z[:, 0]).square().sum((-2, -1)) / variance
    assert torch.allclose(errors["short"]["latent"][PERSISTENCE][:, -1], moved.double(), rtol=0, atol=1e-5)
    assert errors["ghost"]["pixel"].keys() == {MODEL, SHUFFLED, DECODER, STILL, MEAN_FRAME}


def test_the_probe_of_the_metrics_name_reads_it(walks):
    z, truth = readout(walks.latents).flatten(0, 1), walks.states.flatten(0, 1)
    probes = {"": fit_probe(z, truth), "mlp": fit_probe(z, truth.roll(1, 0))}
    found = rollout_errors(Simulated(.9), [walks], Readers(probes, position=[0, 1]))
    for metric, probe in (("position", probes[""]), ("mlp_position", probes["mlp"])):
        off = (probe.predict(z) - truth)[:, :2].norm(dim=-1).unflatten(0, walks.states.shape[:2])[:, -1]
        assert torch.allclose(found[metric][PROBE], off.double(), atol=1e-4)
        assert torch.equal(found[metric][STILL], found["position"][STILL])
    assert not torch.allclose(found["mlp_position"][MODEL], found["position"][MODEL])


def test_a_point_has_no_latent_error(walks):
    class Point:
        context_length = 1
        def rollout(self, z, past, actions): return torch.full((len(z), actions.shape[1], *z.shape[2:]), .3)
    walks = Batch(walks.frames, walks.actions, walks.rewards, walks.terminated, walks.states,
                  torch.full((128, 17, 1, 32), .3))
    assert rollout_errors(Point(), [walks])["latent"][MODEL].isnan().all()


@pytest.mark.parametrize("history, longest", [(1, 11), (4, 8), (2, 10)])
def test_horizons_are_those_that_two_episodes_reach_behind_their_history(history, longest, sample):
    some, beyond = np.arange(6, 8), f"beyond {longest} are left out.*evaluation.history = {history}"
    with pytest.warns(UserWarning, match=f"evaluation.horizons {beyond}"):
        assert evaluation_horizons(sample, some, [4, 1, 16], history) == [4, 1]
    assert evaluation_horizons(sample, some, [1, longest], history) == [1, longest]
    words = rf"evaluation.horizons = \[{longest + 1}\] behind evaluation.history = {history} \(.* has 11"
    with pytest.raises(EvaluationError, match=words):
        evaluation_horizons(sample, some, [longest + 1], history)
    with pytest.raises(EvaluationError, match="only one validation episode.*collect.episodes"):
        evaluation_horizons(sample, np.array([3]), [1], history)


@pytest.fixture
def windows_of(sample):
    latents = ((np.array(sample.states) - 32) / 16)[:, None]
    return lambda h, history=1: Windows(sample, np.arange(8), history - 1 + h, latents=latents)


@pytest.fixture
def readers(sample):
    states = torch.from_numpy(np.array(sample.states))
    return Readers({"": fit_probe((states - 32) / 16, states)}, render, None, [0, 1])


@pytest.mark.parametrize("history", [1, 3])
def test_results_are_the_rows_of_each_horizons_windows(history, windows_of, readers):
    s = EvaluationSettings(n_windows=6, bootstrap=50, history=history)
    def cut(h): return windows_of(h, history)
    rows, arrays = rollout_results(Ghost(), cut, [1, 9], readers, "ghost", s, seed=3, device="cpu")
    expected, kept = [], {}
    for h in (1, 9):
        chosen, episode = independent_windows(cut(h), 6, 3)
        values = rollout_errors(Ghost(), [cut(h).batch(chosen)], readers, history)
        errors = HorizonErrors(h, cut(h).begin[chosen], episode, values)
        expected += rollout_rows(errors, "ghost", 3, 50) + data_rows(cut(h), chosen, h)
        kept |= errors.arrays()
        assert len(set(episode.tolist())) == 6
    assert repr(rows) == repr(expected) and arrays.keys() == kept.keys()
    assert all(np.array_equal(arrays[key], kept[key]) for key in kept)


def test_states_of_mixed_units_count_in_standard_deviations(windows_of, readers):
    s = EvaluationSettings(n_windows=6, bootstrap=50, history=1)
    readers = replace(readers, std=torch.ones(4))
    rows, _ = rollout_results(Ghost(), windows_of, [1], readers, "ghost", s, seed=0, device="cpu")
    assert {row["unit"] for row in rows if row["metric"] == "position_std"} == {"std"}
    assert "position" not in {row["metric"] for row in rows}


@pytest.mark.parametrize("history", [1, 3])
def test_strips_begin_with_the_present_and_a_decoder_of_its_own_adds_one(history, windows_of):
    class Dreamer(Ghost):
        decodes = True
        def imagine(self, frames, actions): return torch.full((len(frames), actions.shape[1], 3, 64, 64), 2.)
    s, windows = EvaluationSettings(n_windows=6, filmstrips=8, history=history), windows_of(8, history)
    plain = rollout_strips(Simulated(), render, windows, s, seed=1, device="cpu")
    assert plain.keys() == {"truth", "decoded"}
    assert all(strip.dtype == np.uint8 and strip.shape == (8, 9, 3, 64, 64) for strip in plain.values())
    chosen = independent_windows(windows, 6, 1)[0]
    six_and_two = windows.batch(np.resize(chosen, 8))
    assert np.array_equal(plain["truth"], six_and_two.frames[:, history - 1:])
    assert np.abs(plain["truth"].astype(int) - plain["decoded"]).max() <= 1
    imagined = rollout_strips(Dreamer(), render, windows, s, seed=1, device="cpu")["imagined"]
    assert np.array_equal(imagined[:, 0], plain["truth"][:, 0]) and (imagined[:, 1:] == 255).all()
