"Open-loop rollouts: errors by hand, floors, invariances, and intervals that cover what they should."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.datasets import Batch, Windows
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.eval.heads import EvaluationError, StateDecoder, fit_probe, readout
from worldmodels_nb.eval.rollouts import RolloutErrors, bootstrap_interval, bootstrap_ratio, independent_windows, open_loop, plot_rollouts, rollout_batches, rollout_errors, rollout_rows, tidy_row
from worldmodels_nb.models.base import build_model
from worldmodels_nb.training.fit import freeze
from worldmodels_nb.models import jepa# noqa: F401  (registers itself)
from worldmodels_nb.settings import load_settings


class Drift:
    "Every action is added to the latent; `gain` scales what the model believes of it."
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
    s = torch.cat([torch.randn(B, 1, 2, generator=g), moves], 1).cumsum(1)                 # (B, T+1, 2)
    frames = torch.randint(0, 256, (B, T + 1, 1, 8, 8), dtype=torch.uint8, generator=g)
    return Batch(frames, actions if discrete else actions * scale, torch.zeros(B, T), torch.zeros(B, T).bool(), s if states else None, scale * s[:, :, None] if latents else None)


def probe_of(batch):
    return fit_probe(readout(batch.latents).flatten(0, 1), batch.states.flatten(0, 1), 1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_perfect_model_has_no_error_and_floors_have_theirs(discrete):
    batch = world(discrete=discrete)
    errors = rollout_errors(Drift(), [batch], [1, 3, 6], probe_of(batch), position=[0, 1]).values
    assert errors["latent"]["model"].max() < 1e-10 and errors["latent"]["model"].shape == (12, 3)
    assert errors["position"]["model"].max() < 1e-3 and errors["position"]["floor:probe"].max() < 1e-3
    moved = (batch.states[:, [1, 3, 6]] - batch.states[:, :1])
    assert torch.allclose(errors["position"]["floor:persistence"], moved.norm(dim=-1).double(), atol=1e-3)
    variance = batch.latents.double().flatten(0, 2).var(0, correction=0).sum()
    assert torch.allclose(errors["latent"]["floor:persistence"], moved.double().square().sum(-1) / variance)


def test_shuffled_actions_are_those_of_another_window():
    batch = world(B=5)
    rolled = open_loop(Drift(), batch.latents, batch.actions, [2])
    other = batch.latents[:, :1] + batch.actions.roll(2, 0)[:, :2].sum(1)[:, None, None]
    assert torch.allclose(rolled["floor:shuffled-actions"], other, atol=1e-6)
    assert (rolled["floor:shuffled-actions"] - rolled["model"]).abs().amax((1, 2, 3)).min() > 1e-3


def test_errors_at_a_horizon_do_not_depend_on_the_other_horizons():
    batch = world()
    far = rollout_errors(Drift(.7), [batch], [1, 2, 6]).values["latent"]["model"]
    assert torch.allclose(rollout_errors(Drift(.7), [batch], [2]).values["latent"]["model"], far[:, 1:2])
    assert torch.allclose(rollout_errors(Drift(.7), [batch], [6, 1]).values["latent"]["model"], far[:, [2, 0]])


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(.1, .9))
def test_the_latent_error_has_no_unit(scale, gain):
    plain = rollout_errors(Drift(gain), [world()], [1, 6]).values["latent"]
    scaled = rollout_errors(Drift(gain), [world(scale=scale)], [1, 6]).values["latent"]
    for who in plain: assert torch.allclose(plain[who], scaled[who], rtol=1e-3, atol=1e-6)


def test_saying_the_mean_latent_scores_one_and_a_point_scores_nothing():
    batch = world(B=400)
    class Mean:
        def rollout(self, z, past, actions): return batch.latents.mean((0, 1)).expand(len(z), actions.shape[1], 1, 2)
    batch.latents = torch.randn(400, 7, 1, 2, generator=torch.Generator().manual_seed(1))
    errors = rollout_errors(Mean(), [batch], [1, 6]).values["latent"]
    assert torch.allclose(errors["model"].mean(0), torch.ones(2, dtype=torch.float64), atol=.1)
    assert torch.allclose(errors["floor:persistence"].mean(0), 2 * torch.ones(2, dtype=torch.float64), atol=.25)
    batch.latents = torch.full((400, 7, 1, 2), .3)
    assert rollout_errors(Mean(), [batch], [1]).values["latent"]["model"].isnan().all()


def test_batches_are_only_a_way_to_save_memory():
    batch = world(B=12)
    parts = [Batch(*(None if v is None else v[i] for v in vars(batch).values())) for i in (slice(0, 5), slice(5, 12))]
    whole, cut = (rollout_errors(Drift(.5), b, [1, 6], probe_of(batch), position=[0]).values for b in ([batch], parts))
    for metric in whole:
        for who in set(whole[metric]) - {"floor:shuffled-actions"}: assert torch.allclose(whole[metric][who], cut[metric][who])


def test_cached_latents_are_used_and_frames_are_encoded_once_otherwise():
    model = Drift()
    rollout_errors(model, [world()], [1]); assert model.encoded == 0
    rollout_errors(model, [world(latents=False)], [1], decoder=lambda z: torch.zeros(*z.shape[:2], 1, 8, 8)); assert model.encoded == 1


def test_without_states_or_readers_there_are_fewer_metrics():
    batch = world()
    probe = probe_of(batch)
    assert rollout_errors(Drift(), [world(states=False)], [1], probe, position=[0]).values.keys() == {"latent"}
    assert rollout_errors(Drift(), [batch], [1], probe, position=[]).values.keys() == {"latent"}
    assert rollout_errors(Drift(), [batch], [1], probe, position=[1], same_unit=False).values.keys() == {"latent", "position_std"}


def test_positions_of_different_units_count_in_standard_deviations():
    batch = world(B=200)
    plain = rollout_errors(Drift(.5), [batch], [6], probe_of(batch), position=[0, 1], same_unit=False).values["position_std"]
    batch.states = batch.states * torch.tensor([1000., .001])
    other = rollout_errors(Drift(.5), [batch], [6], probe_of(batch), position=[0, 1], same_unit=False).values["position_std"]
    for who in plain: assert torch.allclose(plain[who], other[who], rtol=1e-2, atol=1e-3)
    off = (batch.latents[:, 6] - batch.latents[:, 0])[:, 0].double() / batch.latents.double().flatten(0, 2).std(0, correction=0)
    assert torch.allclose(plain["floor:persistence"][:, 0], off.square().mean(-1).sqrt(), atol=1e-2)


def test_pixel_errors_by_hand():
    batch = world()
    grey = rollout_errors(Drift(), [batch], [2, 5], decoder=lambda z: torch.full((*z.shape[:2], 1, 8, 8), .5)).values["pixel"]
    frames = batch.frames.double() / 255
    assert torch.allclose(grey["model"], (frames[:, [2, 5]] - .5).square().mean((-3, -2, -1)), atol=1e-6)
    assert torch.allclose(grey["floor:last-frame"], (frames[:, [2, 5]] - frames[:, :1]).square().mean((-3, -2, -1)), atol=1e-6)
    assert torch.allclose(grey["floor:mean-frame"], (frames[:, [2, 5]] - frames.mean((0, 1))).square().mean((-3, -2, -1)), atol=1e-6)
    assert torch.equal(grey["floor:decoder"], grey["model"]) and torch.equal(grey["floor:persistence"], grey["model"])


@pytest.mark.parametrize("horizons", [[], [0], [7], [-1, 2]])
def test_horizons_outside_the_window_are_refused(horizons):
    with pytest.raises(EvaluationError, match="evaluation.horizons"): rollout_errors(Drift(), [world()], horizons)


def test_one_window_or_none_are_refused():
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): rollout_errors(Drift(), [world(B=1)], [1])
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): rollout_errors(Drift(), [], [1])
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): bootstrap_interval(np.ones(1))
    with pytest.raises(EvaluationError, match="independent"): bootstrap_interval(np.ones(5), groups=np.zeros(5))
    with pytest.raises(EvaluationError, match="labels"): bootstrap_interval(np.ones(5), groups=np.zeros(4))


def test_a_real_model_with_stacked_frames():
    settings = load_settings(overrides={"model.frame_stack": 2, "model.latent_dim": 16, "encoder.patch.channels": 8, "loss.inverse": 0.0})
    spec = DataSpec((3, 16, 16), ActionSpec("discrete", 4), [], [])
    torch.manual_seed(0)
    model, decoder = freeze(build_model("jepa", settings, spec)), StateDecoder((1, 16), (3, 16, 16), 4).eval()
    B, T = 6, 4
    batch = Batch(torch.randint(0, 256, (B, 1 + T + 1, 3, 16, 16), dtype=torch.uint8), torch.randint(0, 4, (B, T)), torch.zeros(B, T), torch.zeros(B, T).bool(), None, None)
    errors = rollout_errors(model, [batch], [1, 4], decoder=decoder)
    frames = batch.frames[:, 1:] / 255                                                     # the first is context
    assert torch.allclose(errors.values["pixel"]["floor:last-frame"], (frames[:, [1, 4]] - frames[:, :1]).square().mean((-3, -2, -1)).double())
    assert {metric: whos["model"].shape for metric, whos in errors.values.items()} == {"latent": (B, 2), "pixel": (B, 2)}
    assert not errors.values["latent"]["model"].requires_grad


def test_intervals_cover_the_known_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    samples = rng.exponential(2., size=(60, 300))                                          # 300 experiments of 60 windows each
    mean, low, high = bootstrap_interval(samples, seed=1, resamples=500)
    assert np.allclose(mean, samples.mean(0)) and (low < mean).all() and (mean < high).all()
    assert .88 < ((low < 2) & (2 < high)).mean() < .98


def test_the_bootstrap_equals_drawing_one_by_one():
    values = np.random.default_rng(0).exponential(size=40)
    rng = np.random.default_rng(1)
    means = [values[rng.integers(40, size=40)].mean() for _ in range(4000)]
    _, low, high = bootstrap_interval(values, resamples=4000)
    assert np.allclose([low, high], np.quantile(means, [.025, .975]), atol=.03)


def test_bootstrap_shapes_seeds_and_levels():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3)))
    whole = bootstrap_interval(values, seed=3)
    assert all(part.shape == (3,) for part in whole) and np.shape(bootstrap_interval(values[:, 0])[1]) == ()
    for k in range(3): assert np.allclose([part[k] for part in whole], bootstrap_interval(values[:, k], seed=3))
    assert np.array_equal(whole[1], bootstrap_interval(values, seed=3)[1]) and not np.array_equal(whole[1], bootstrap_interval(values, seed=4)[1])
    narrow = bootstrap_interval(values, seed=3, level=.5)
    assert (narrow[1] > whole[1]).all() and (narrow[2] < whole[2]).all()


def test_groups_of_one_are_no_groups_and_copies_add_no_certainty():
    values = np.random.default_rng(0).normal(size=30)
    alone = bootstrap_interval(values, seed=2)
    assert np.allclose(alone, bootstrap_interval(values, seed=2, groups=np.arange(30)))
    copies = bootstrap_interval(np.repeat(values, 7), seed=2, groups=np.repeat(np.arange(30), 7))
    assert np.allclose(alone, copies)
    fooled = bootstrap_interval(np.repeat(values, 7), seed=2)
    assert fooled[2] - fooled[1] < .6 * (alone[2] - alone[1])


def test_clustered_intervals_cover_where_plain_ones_do_not():
    rng = np.random.default_rng(0)
    episode = np.repeat(np.arange(25), 8)
    hits = {True: 0, False: 0}
    for trial in range(100):
        values = rng.normal(size=25)[episode] + .3 * rng.normal(size=200)
        for grouped in hits:
            _, low, high = bootstrap_interval(values, trial, 200, groups=episode if grouped else None)
            hits[grouped] += low < 0 < high
    assert hits[True] >= 85 and hits[False] <= 70


def test_ratios_are_paired():
    bottom = np.random.default_rng(0).exponential(size=(80, 2))
    ratio, low, high = bootstrap_ratio(.25 * bottom, bottom)
    assert np.allclose([ratio, low, high], .25)
    assert np.isnan(bootstrap_ratio(bottom, 0 * bottom)).all()
    noisy = bottom + .1 * np.random.default_rng(1).normal(size=bottom.shape)
    paired, torn = bootstrap_ratio(noisy, bottom), bootstrap_ratio(noisy, np.random.default_rng(2).permutation(bottom))
    assert (paired[2] - paired[1] < .5 * (torn[2] - torn[1])).all() and np.allclose(paired[0], torn[0])


class Cut(Windows):
    "Windows of episodes that need no dataset."
    def __init__(self, counts): self.first = self.begin = np.repeat(np.arange(len(counts)) * 100, counts)

    def batch(self, indices):
        return Batch(*(torch.zeros(len(indices), 1) for _ in range(4)), None, None)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60), st.integers(0, 3))
def test_windows_come_from_as_many_episodes_as_there_are(counts, n, seed):
    chosen, episodes = independent_windows(Cut(counts), n, seed)
    total = min(n, sum(counts))
    assert len(chosen) == len(set(chosen.tolist())) == total and np.array_equal(Cut(counts).first[chosen], episodes)
    assert len(set(episodes[:len(counts)].tolist())) == min(total, len(counts))
    taken = {e: (episodes == e).sum() for e in np.arange(len(counts)) * 100}
    full = {e: counts[e // 100] for e in taken}
    most = max(taken.values())
    assert all(t >= min(most - 1, full[e]) for e, t in taken.items())
    assert np.array_equal(chosen, independent_windows(Cut(counts), n, seed)[0])


@pytest.mark.parametrize("n, size, expected", [(10, 4, [4, 3, 3]), (65, 64, [33, 32]), (3, 64, [3])])
def test_no_window_is_left_alone_in_a_batch(n, size, expected):
    assert [len(b.rewards) for b in rollout_batches(Cut([n]), np.arange(n), size)] == expected


def test_rows_are_tidy():
    batch = world(B=20)
    errors = rollout_errors(Drift(.8), [batch], [1, 6], probe_of(batch), lambda z: torch.zeros(*z.shape[:2], 1, 8, 8), [0, 1])
    rows = rollout_rows(errors, "Toy-v0", "drift", seed=5, resamples=50, groups=np.repeat(np.arange(10), 2))
    assert all(list(row) == ["env", "model", "protocol", "metric", "horizon", "seed", "value", "low", "high", "n"] for row in rows)
    assert {row["model"] for row in rows} == {"drift", "floor:persistence", "floor:mean-frame"} | {f"floor:{f} (drift)" for f in ("persistence", "shuffled-actions", "probe", "decoder")}
    assert {row["metric"] for row in rows} == {"latent", "position", "pixel"} | {f"{m}_ratio" for m in ("latent", "position", "pixel")}
    assert {(row["n"], row["seed"], row["protocol"]) for row in rows} == {(20, 5, "rollout")}
    assert len({(row["model"], row["metric"], row["horizon"]) for row in rows}) == len(rows) == 2 * (3 + 5 + 6 + 3)
    by = {(row["model"], row["metric"], row["horizon"]): row for row in rows}
    own, still, ratio = by["drift", "position", 6], by["floor:persistence (drift)", "position", 6], by["drift", "position_ratio", 6]
    assert ratio["value"] == pytest.approx(own["value"] / still["value"]) and ratio["low"] <= ratio["value"] <= ratio["high"]
    assert type(own["horizon"]) is int and type(own["value"]) is float


def test_undefined_errors_stay_undefined():
    errors = RolloutErrors([1], {"latent": {"model": torch.full((4, 1), math.nan), "floor:persistence": torch.full((4, 1), math.nan)}})
    assert all(math.isnan(row[key]) for row in rollout_rows(errors, "Toy-v0", "point") for key in ("value", "low", "high"))


def test_a_row_without_an_interval_says_so():
    row = tidy_row("Toy-v0", "floor:random", "planning", "success", 0, 1, .5)
    assert math.isnan(row["low"]) and math.isnan(row["high"]) and row["n"] == 1


def test_the_picture_has_a_line_per_model_and_floor():
    rows = [tidy_row("Toy-v0", name, "rollout", "position", h, 0, h, h - .5, h + .5, 9) for name in ("jepa", "floor:persistence (jepa)") for h in (4, 1)]
    ax = plot_rollouts(rows, "position", "px").axes[0]
    assert [line.get_xdata().tolist() for line in ax.lines] == [[1, 4], [1, 4]] and "n = 9" in ax.get_ylabel()
    with pytest.raises(EvaluationError, match="no row has the metric 'pixel'; there are position"): plot_rollouts(rows, "pixel", "")
