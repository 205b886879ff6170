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
from worldmodels_nb.eval.results import MODEL, EvaluationError, Source, independent_windows, result_row
from worldmodels_nb.eval.rollouts import (
    MEAN_FRAME,
    PERSISTENCE,
    SHUFFLED,
    STILL,
    TRUTH,
    RolloutErrors,
    evaluation_horizons,
    open_loop,
    plot_rollouts,
    rollout_batches,
    rollout_errors,
    rollout_results,
    rollout_rows,
    rollout_strips,
)
from worldmodels_nb.models import jepa  # noqa: F401  (registers itself)
from worldmodels_nb.models.base import build_model
from worldmodels_nb.settings import EvaluationSettings, load_settings
from worldmodels_nb.training.fit import freeze

PROBE, DECODER = Source("reference", "probe"), Source("reference", "decoder")


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
    s = torch.cat([torch.randn(B, 1, 2, generator=g), moves], 1).cumsum(1)             # (B, T+1, 2)
    frames = torch.randint(0, 256, (B, T + 1, 1, 8, 8), dtype=torch.uint8, generator=g)
    nothing, z = torch.zeros(B, T), scale * s[:, :, None]
    return Batch(frames, actions if discrete else actions * scale, nothing, nothing.bool(),
                 s if states else None, z if latents else None)


def black(z): return torch.zeros(*z.shape[:2], 1, 8, 8)


def probe_of(batch):
    return fit_probe(readout(batch.latents).flatten(0, 1), batch.states.flatten(0, 1), 1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_a_perfect_model_has_no_error_and_baselines_have_theirs(discrete):
    batch = world(discrete=discrete)
    errors = rollout_errors(Drift(), [batch], [1, 3, 6], probe_of(batch), position=[0, 1]).values
    assert errors["latent"][MODEL].max() < 1e-10 and errors["latent"][MODEL].shape == (12, 3)
    assert errors["position"][MODEL].max() < 1e-3 and errors["position"][PROBE].max() < 1e-3
    moved = (batch.states[:, [1, 3, 6]] - batch.states[:, :1])
    assert torch.allclose(errors["position"][PERSISTENCE], moved.norm(dim=-1).double(), atol=1e-3)
    variance = batch.latents.double().flatten(0, 2).var(0, correction=0).sum()
    assert torch.allclose(errors["latent"][PERSISTENCE], moved.double().square().sum(-1) / variance)


def test_shuffled_actions_are_those_of_another_window():
    batch = world(B=5)
    rolled = open_loop(Drift(), batch.latents, batch.actions, [2])
    other = batch.latents[:, :1] + batch.actions.roll(2, 0)[:, :2].sum(1)[:, None, None]
    assert torch.allclose(rolled[SHUFFLED], other, atol=1e-6)
    assert (rolled[SHUFFLED] - rolled[MODEL]).abs().amax((1, 2, 3)).min() > 1e-3


def test_errors_at_a_horizon_do_not_depend_on_the_other_horizons():
    batch = world()
    far = rollout_errors(Drift(.7), [batch], [1, 2, 6]).values["latent"][MODEL]
    def at(horizons): return rollout_errors(Drift(.7), [batch], horizons).values["latent"][MODEL]
    assert torch.allclose(at([2]), far[:, 1:2])
    assert torch.allclose(at([6, 1]), far[:, [2, 0]])


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(.1, .9))
def test_the_latent_error_has_no_unit(scale, gain):
    plain = rollout_errors(Drift(gain), [world()], [1, 6]).values["latent"]
    scaled = rollout_errors(Drift(gain), [world(scale=scale)], [1, 6]).values["latent"]
    for whose in plain: assert torch.allclose(plain[whose], scaled[whose], rtol=1e-3, atol=1e-6)


def test_saying_the_mean_latent_scores_one_and_a_point_scores_nothing():
    batch = world(B=400)
    class Mean:
        def rollout(self, z, past, actions):
            return batch.latents.mean((0, 1)).expand(len(z), actions.shape[1], 1, 2)
    batch.latents = torch.randn(400, 7, 1, 2, generator=torch.Generator().manual_seed(1))
    errors = rollout_errors(Mean(), [batch], [1, 6]).values["latent"]
    assert torch.allclose(errors[MODEL].mean(0), torch.ones(2, dtype=torch.float64), atol=.1)
    assert torch.allclose(errors[PERSISTENCE].mean(0), torch.full((2,), 2., dtype=torch.float64), atol=.25)
    batch.latents = torch.full((400, 7, 1, 2), .3)
    assert rollout_errors(Mean(), [batch], [1]).values["latent"][MODEL].isnan().all()


def test_batches_are_only_a_way_to_save_memory():
    batch = world(B=12)
    def part(i): return Batch(*(None if v is None else v[i] for v in vars(batch).values()))
    parts = [part(slice(0, 5)), part(slice(5, 12))]
    whole, cut = (rollout_errors(Drift(.5), batches, [1, 6], probe_of(batch), position=[0]).values
                  for batches in ([batch], parts))
    for metric in whole:
        for whose in set(whole[metric]) - {SHUFFLED}:
            assert torch.allclose(whole[metric][whose], cut[metric][whose])


def test_cached_latents_are_used_and_frames_are_encoded_once_otherwise():
    model = Drift()
    rollout_errors(model, [world()], [1])
    assert model.encoded == 0
    rollout_errors(model, [world(latents=False)], [1], decoder=black)
    assert model.encoded == 1


def test_without_states_or_readers_there_are_fewer_metrics():
    batch = world()
    probe = probe_of(batch)
    def metrics(batch, **how): return rollout_errors(Drift(), [batch], [1], probe, **how).values.keys()
    assert metrics(world(states=False), position=[0]) == {"latent"}
    assert metrics(batch, position=[]) == {"latent"}
    assert metrics(batch, position=[1], same_unit=False) == {"latent", "position_std"}


def test_positions_of_different_units_count_in_standard_deviations():
    batch = world(B=200)
    def errors():
        how = dict(position=[0, 1], same_unit=False)
        return rollout_errors(Drift(.5), [batch], [6], probe_of(batch), **how).values["position_std"]
    plain = errors()
    batch.states = batch.states * torch.tensor([1000., .001])
    other = errors()
    for whose in plain: assert torch.allclose(plain[whose], other[whose], rtol=1e-2, atol=1e-3)
    std = batch.latents.double().flatten(0, 2).std(0, correction=0)
    off = (batch.latents[:, 6] - batch.latents[:, 0])[:, 0].double() / std
    assert torch.allclose(plain[PERSISTENCE][:, 0], off.square().mean(-1).sqrt(), atol=1e-2)


def test_pixel_errors_by_hand():
    batch = world()
    def decoder(z): return black(z) + .5
    grey = rollout_errors(Drift(), [batch], [2, 5], decoder=decoder).values["pixel"]
    frames = batch.frames.double() / 255
    def off(said): return (frames[:, [2, 5]] - said).square().mean((-3, -2, -1))
    assert torch.allclose(grey[MODEL], off(.5), atol=1e-6)
    assert torch.allclose(grey[STILL], off(frames[:, :1]), atol=1e-6)
    assert torch.allclose(grey[MEAN_FRAME], off(frames.mean((0, 1))), atol=1e-6)
    assert torch.equal(grey[DECODER], grey[MODEL]) and torch.equal(grey[PERSISTENCE], grey[MODEL])


@pytest.mark.parametrize("horizons", [[], [0], [7], [-1, 2]])
def test_horizons_outside_the_window_are_refused(horizons):
    batches = [world()]
    with pytest.raises(EvaluationError, match="evaluation.horizons"):
        rollout_errors(Drift(), batches, horizons)


def test_one_window_or_none_are_refused():
    for batches in ([world(B=1)], []):
        with pytest.raises(EvaluationError, match="evaluation.n_windows"):
            rollout_errors(Drift(), batches, [1])


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
    errors = rollout_errors(model, [batch], [1, 4], decoder=decoder)
    frames = batch.frames[:, 1:] / 255                                                 # the first is context
    still = (frames[:, [1, 4]] - frames[:, :1]).square().mean((-3, -2, -1)).double()
    assert torch.allclose(errors.values["pixel"][STILL], still)
    shapes = {metric: values[MODEL].shape for metric, values in errors.values.items()}
    assert shapes == {"latent": (B, 2), "pixel": (B, 2)}
    assert not errors.values["latent"][MODEL].requires_grad


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
    rolled = open_loop(Drift(), batch.latents, batch.actions, [2])
    assert list(rolled) == [TRUTH, MODEL, PERSISTENCE, SHUFFLED]
    values = rollout_errors(Drift(), [batch], [2], probe_of(batch), black, position=[0, 1]).values
    assert list(values["latent"]) == [MODEL, PERSISTENCE, SHUFFLED]
    assert list(values["position"]) == [PROBE, MODEL, PERSISTENCE, SHUFFLED, STILL]
    assert list(values["pixel"]) == [DECODER, MODEL, PERSISTENCE, SHUFFLED, STILL, MEAN_FRAME]
    free = {source for errors in values.values() for source in errors if not source.through_model}
    assert free == {STILL, MEAN_FRAME} and STILL != PERSISTENCE and STILL.name == PERSISTENCE.name


def test_rows_say_whose_they_are_and_ratios_are_over_persistence_through_the_model():
    batch, ms = world(B=20), ("latent", "position", "pixel")
    errors = rollout_errors(Drift(.8), [batch], [1, 6], probe_of(batch), black, [0, 1])
    rows = rollout_rows(errors, "drift", seed=5, resamples=50, groups=np.repeat(np.arange(10), 2))
    whose = {(row["model"], row["kind"], row["head"]) for row in rows}
    assert whose == {("drift", "model", ""), ("", "baseline", "persistence"), ("", "baseline", "mean_frame"),
                     ("drift", "baseline", "persistence"), ("drift", "baseline", "shuffled_actions"),
                     ("drift", "reference", "probe"), ("drift", "reference", "decoder")}
    assert {row["metric"] for row in rows} == set(ms) | {f"{m}_ratio" for m in ms}
    assert {(row["n"], row["protocol"]) for row in rows} == {(20, "rollout")}
    assert {row["unit"] for row in rows if row["metric"] == "position"} == {"px"}
    assert {row["unit"] for row in rows if row["metric"] != "position"} == {""}
    by = {(row["model"], row["head"], row["metric"], row["horizon"]): row for row in rows}
    assert len(by) == len(rows) == 2 * (3 + 5 + 6 + 3)
    own, ratio = by["drift", "", "position", 6], by["drift", "", "position_ratio", 6]
    still = by["drift", "persistence", "position", 6]
    assert ratio["value"] == pytest.approx(own["value"] / still["value"])
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert type(own["horizon"]) is int and type(own["value"]) is float


def test_undefined_errors_stay_undefined():
    unknown = torch.full((4, 1), math.nan)
    rows = rollout_rows(RolloutErrors([1], {"latent": {MODEL: unknown, PERSISTENCE: unknown}}), "point")
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
    decodes, frame_stack = False, 1

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
    errors = {name: rollout_errors(model, [walks], horizons, probe, render, [0, 1]).values
              for name, model in models.items()}
    assert errors["perfect"]["latent"][MODEL].abs().max() < 1e-6
    assert errors["perfect"]["pixel"][MODEL].abs().max() < 1e-4
    assert (errors["short"]["position"][MODEL].mean(0).diff() > 0).all()
    variance = readout(z).flatten(0, 1).var(0, correction=0).sum()
    moved = (z[:, horizons] - z[:, :1]).square().sum((-2, -1)) / variance
    assert torch.allclose(errors["short"]["latent"][PERSISTENCE], moved.double(), rtol=0, atol=1e-5)
    assert errors["ghost"]["pixel"].keys() == {MODEL, PERSISTENCE, SHUFFLED, DECODER, STILL, MEAN_FRAME}


def test_windows_too_short_or_too_few_are_refused_in_a_sentence(walks):
    z, actions = walks.latents, walks.actions
    with pytest.raises(EvaluationError, match="evaluation.horizons"): open_loop(Simulated(), z, actions, [17])
    with pytest.raises(EvaluationError, match="evaluation.n_windows"):
        open_loop(Simulated(), z[:1], actions[:1], [1])


def test_a_point_has_no_latent_error(walks):
    class Point:
        def rollout(self, z, past, actions): return torch.full((len(z), actions.shape[1], *z.shape[2:]), .3)
    walks = Batch(walks.frames, walks.actions, walks.rewards, walks.terminated, walks.states,
                  torch.full((128, 17, 1, 32), .3))
    assert rollout_errors(Point(), [walks], [1]).values["latent"][MODEL].isnan().all()


def test_horizons_are_those_that_two_episodes_reach(sample):
    with pytest.warns(UserWarning, match="evaluation.horizons beyond 11 are left out"):
        assert evaluation_horizons(sample, np.arange(6, 8), [4, 1, 16]) == [4, 1]
    assert evaluation_horizons(sample, np.arange(6, 8), [1, 11]) == [1, 11]
    with pytest.raises(EvaluationError, match=r"evaluation.horizons = \[16\] \(the second longest has 11"):
        evaluation_horizons(sample, np.arange(6, 8), [16])
    with pytest.raises(EvaluationError, match="only one validation episode.*collect.episodes"):
        evaluation_horizons(sample, np.array([3]), [1])


@pytest.fixture
def windows(sample):
    return Windows(sample, np.arange(8), 10, latents=((np.array(sample.states) - 32) / 16)[:, None])


def test_results_are_the_rows_of_the_chosen_windows(sample, windows):
    s, all_states = EvaluationSettings(n_windows=6, bootstrap=50), torch.from_numpy(np.array(sample.states))
    probe = fit_probe((all_states - 32) / 16, all_states)
    rows = rollout_results(Ghost(), windows, [1, 10], probe, render, "ghost", s, seed=3, device="cpu")
    chosen, episode = independent_windows(windows, 6, 3)
    errors = rollout_errors(Ghost(), [windows.batch(chosen)], [1, 10], probe, render, [0, 1])
    assert rows == rollout_rows(errors, "ghost", 3, 50, groups=episode)
    assert len(set(episode.tolist())) == 6


def test_states_of_mixed_units_count_in_standard_deviations(sample, windows, monkeypatch):
    monkeypatch.setattr(sample, "spec", replace(sample.spec, position=[0, 1, 2, 3]))
    all_states = torch.from_numpy(np.array(sample.states))
    s, probe = EvaluationSettings(n_windows=6, bootstrap=50), fit_probe((all_states - 32) / 16, all_states)
    rows = rollout_results(Ghost(), windows, [1], probe, render, "ghost", s, seed=0, device="cpu")
    assert {row["unit"] for row in rows if row["metric"] == "position_std"} == {"std"}
    assert "position" not in {row["metric"] for row in rows}


def test_strips_begin_with_the_truth_and_a_decoder_of_its_own_adds_one(sample, windows):
    class Dreamer(Ghost):
        decodes = True
        def imagine(self, frames, actions): return torch.full((len(frames), actions.shape[1], 3, 64, 64), 2.)
    s = EvaluationSettings(n_windows=6, filmstrips=8)
    plain = rollout_strips(Simulated(), render, windows, s, seed=1, device="cpu")
    assert plain.keys() == {"truth", "decoded"}
    assert all(strip.dtype == np.uint8 and strip.shape == (8, 11, 3, 64, 64) for strip in plain.values())
    chosen = independent_windows(windows, 6, 1)[0]
    six_and_two = windows.batch(np.resize(chosen, 8))
    assert np.array_equal(plain["truth"], six_and_two.frames)
    assert np.abs(plain["truth"].astype(int) - plain["decoded"]).max() <= 1
    imagined = rollout_strips(Dreamer(), render, windows, s, seed=1, device="cpu")["imagined"]
    assert np.array_equal(imagined[:, 0], plain["truth"][:, 0]) and (imagined[:, 1:] == 255).all()
