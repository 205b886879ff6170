"The collapse panel: closed forms of the rank, invariances, encoders whose health is known."
import json
import math
import re

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.data.tworooms import TwoRooms
from worldmodels_nb.eval.collapse import (
    Transitions,
    centred,
    collapse_panel,
    collapse_results,
    collapse_words,
    fit_inverse_probe,
    inverse_scores,
    plot_collapse,
    prediction_ratio,
    rankme,
    spectrum,
    within_share,
)
from worldmodels_nb.eval.heads import fit_probe, readout
from worldmodels_nb.eval.results import EvaluationError, independent_windows
from worldmodels_nb.viz import BASELINE_COLOR


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equal_directions_count_as_many(k):
    q = torch.linalg.qr(noise(20, 5))[0]
    assert rankme(q[:, :k] @ torch.linalg.qr(noise(5, 5, seed=1))[0][:k]) == pytest.approx(k, rel=1e-4)


@pytest.mark.parametrize("shares, rank", [([1., 1, 1, 1], 4), ([2., 1, 1, 0], 2**1.5), ([7., 0, 0, 0], 1)])
def test_ranks_worked_by_hand(shares, rank):
    assert abs(rankme(torch.diag(torch.tensor(shares))) - rank) < 1e-4


def test_rankme_is_the_entropy_of_numpy_singular_values():
    x = noise(200, 12) * torch.linspace(.1, 3, 12) + 1
    p = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = p / p.sum() + 1e-7
    assert rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 9), st.floats(1e-4, 1e4))
def test_rank_is_bounded_and_blind_to_scale_and_rotation(n, width, seed, scale):
    x = noise(n, width, seed=seed)
    turn = torch.linalg.qr(noise(width, width, seed=seed + 1))[0]
    assert .99 < rankme(x) < min(n, width) + 1e-3
    assert rankme(scale * x @ turn) == pytest.approx(rankme(x), rel=1e-3)


def test_degenerate_ranks():
    assert rankme(torch.zeros(5, 3)) == 0
    same = torch.full((50, 8), .3)
    assert rankme(same) == pytest.approx(1, abs=1e-3) and rankme(centred(same)) == 0
    assert spectrum(same).max() == 0
    panel = collapse_panel(same[:, None], same[:, None], z_predicted=same[:, None])
    assert panel["std_mean"] == panel["rankme_centred"] == 0 and math.isnan(panel["prediction_ratio"])


def test_spectrum_holds_all_the_variance():
    x = noise(300, 7) * torch.arange(1, 8) + 5
    sigma = spectrum(x)
    assert sigma.square().sum().item() == pytest.approx(x.double().var(0, correction=0).sum().item())
    assert (sigma.diff() <= 0).all()
    assert torch.allclose(sigma, torch.linalg.eigvalsh(torch.cov(x.double().T, correction=0)).flip(0).sqrt())


def test_a_high_centred_rank_does_not_mean_health():
    place = noise(400, 2)
    healthy = torch.cos(place @ noise(2, 16, seed=1))
    whisper = .3 + .001 * noise(400, 16, seed=2)
    assert rankme(centred(whisper)) > 15 > rankme(centred(healthy))
    assert rankme(whisper) < 2
    assert abs(rankme(healthy / 100) - rankme(healthy)) < 1e-3


def halves(z, z_next, actions):
    n = len(z) // 2
    return [Transitions(z[part], z_next[part], actions[part]) for part in (slice(n), slice(n, None))]


def inverse(z, z_next, actions, said=None):
    "Scores on the second half of a probe of the first."
    learn, judge = halves(z, z_next, actions)
    return inverse_scores(fit_inverse_probe(learn), judge, None if said is None else said[len(z) // 2:])


def test_inverse_probe_reads_a_linear_action():
    z, a = noise(200, 1, 6), noise(200, 2, seed=1)
    z_next = z + (a @ noise(2, 6, seed=2))[:, None]
    scores = inverse(z, z_next, a, z)
    assert scores["inverse_r2"] > .98 and scores["inverse_r2_predicted"] < .05
    assert scores["inverse_baseline"] == 0
    assert inverse(z, z_next, a.roll(7, 0))["inverse_r2"] < .1


def test_inverse_probe_names_discrete_actions_beside_the_commonest():
    z, a = noise(400, 2, 4), torch.arange(400) % 5 % 3         # actions 0, 1, 2, 0, 1, …: 0, 1 are commonest
    z_next = z.clone()
    z_next[:, 0, :3] += torch.nn.functional.one_hot(a)
    scores = inverse(z, z_next, a, z_next)
    assert scores["inverse_accuracy"] == 1 == scores["inverse_accuracy_predicted"]
    assert scores["inverse_baseline"] == pytest.approx(.4)
    assert inverse(z, z + noise(400, 2, 4, seed=3), a)["inverse_accuracy"] < .55


@pytest.mark.parametrize("form", [
    lambda z: z.repeat(1, 1, 8), lambda z: 1000 * z, lambda z: z / 1000, lambda z: z.flip(2),
    lambda z: z @ torch.linalg.qr(noise(*[z.shape[2]] * 2, seed=5))[0]])
@pytest.mark.parametrize("width", [6, 300])
def test_copying_scaling_or_rotating_latents_changes_no_inverse_score(form, width):
    z, a = noise(800, 1, width), noise(800, 2, seed=1)
    z_next = z + .1 * (a @ noise(2, width, seed=2) + .5 * noise(800, width, seed=3))[:, None]
    said = z_next + .02 * noise(800, 1, width, seed=4)
    plain, other = inverse(z, z_next, a, said), inverse(form(z), form(z_next), a, form(said))
    assert plain["inverse_r2"] > .3
    assert [*plain.values()] == pytest.approx([*other.values()], rel=.01)


def test_inverse_probe_wants_two_transitions_and_takes_what_stands_still():
    z = noise(3, 1, 2)
    with pytest.raises(EvaluationError, match="two training transitions"):
        fit_inverse_probe(Transitions(z[:1], z[:1], noise(1, 1)))
    still = torch.ones(6, 1, 4)
    found = fit_inverse_probe(Transitions(still, still, noise(6, 2)))
    assert found.probe.predict(torch.zeros(1, 4)).isfinite().all()


@pytest.mark.parametrize("inside, between", [(1., 0.), (0., 1.), (.1, 2.), (3., 1.)])
@pytest.mark.parametrize("steps", [2, 3, 20])
def test_the_share_within_episodes_does_not_depend_on_how_long_they_are(inside, between, steps):
    episodes = np.repeat(np.arange(3000 // steps), steps)
    own = between * noise(3000 // steps, 4, seed=1)[episodes]
    x = own + inside * noise(len(episodes), 4, seed=2)
    expected = inside**2 / (inside**2 + between**2)
    assert within_share(x, episodes).item() == pytest.approx(expected, abs=.05)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert within_share(x[order] * 9 + 2, episodes[order] * 7).item() == pytest.approx(
        within_share(x, episodes).item())


def test_without_variance_or_a_second_frame_there_is_no_share_within_episodes():
    assert within_share(torch.ones(6, 2), np.arange(6) // 2).isnan()
    assert within_share(noise(6, 2), np.arange(6)).isnan()
    assert "within_episode_share" not in collapse_panel(noise(6, 1, 2), episodes=np.arange(6))


@pytest.mark.parametrize("scale", [1e-3, 1., 50.])
def test_prediction_ratio(scale):
    z, z_next = noise(50, 2, 3) * scale, noise(50, 2, 3, seed=1) * scale
    assert prediction_ratio(z, z_next, z) == pytest.approx(1) and prediction_ratio(z, z_next, z_next) == 0
    assert prediction_ratio(z, z_next, (z + z_next) / 2) == pytest.approx(.25)
    assert math.isnan(prediction_ratio(z, z, z_next))


def test_predicting_the_mean_of_pure_noise_halves_persistence():
    z, z_next = noise(5000, 1, 8), noise(5000, 1, 8, seed=1)
    assert prediction_ratio(z, z_next, torch.zeros_like(z)) == pytest.approx(.5, abs=.02)


def test_the_panel_has_what_it_was_given():
    z = noise(30, 2, 4)
    panel = collapse_panel(z)
    assert panel.keys() == {"n", "rank_limit", "std_mean", "std_min", "rankme", "rankme_centred", "spectrum"}
    assert panel["n"] == 30 and panel["rank_limit"] == 8 and collapse_panel(z[:5])["rank_limit"] == 5
    z_next, actions, r2 = z + noise(30, 2, 4, seed=1), noise(30, 2, seed=2), torch.tensor([.5, math.nan, .7])
    found = fit_inverse_probe(Transitions(z_next, z, -actions))
    full = collapse_panel(z, z_next, actions, z, r2, np.array([True, True, False]), np.arange(30) // 5, found)
    assert full["prediction_ratio"] == pytest.approx(1) and full["probe_r2"] == pytest.approx(.6)
    assert full["probe_r2_moving"] == pytest.approx(.5) and full["probe_r2_standing"] == pytest.approx(.7)
    assert full["within_episode_share"] > .8
    assert "inverse_r2_predicted" in full
    json.dumps(full)
    assert all(isinstance(v, float) for k, v in full.items() if k != "spectrum")


def test_half_a_collapse_shows_in_the_minimum():
    z = noise(100, 1, 6)
    z[:, :, 3:] = .2
    panel = collapse_panel(z)
    assert panel["std_min"] == 0 and .3 < panel["std_mean"] < .7 and panel["rankme_centred"] < 3.01


def test_unusable_latents_are_refused():
    few = noise(1, 1, 4)
    with pytest.raises(EvaluationError, match="two frames.*evaluation.n_windows"): collapse_panel(few)
    with pytest.raises(EvaluationError, match="not finite"): collapse_panel(torch.full((5, 1, 4), torch.nan))


def test_the_figure_has_a_column_per_instrument_that_somebody_has():
    z = noise(30, 1, 4)
    found = fit_inverse_probe(Transitions(z, z + 1, noise(30, 2)))
    jepa = collapse_panel(z, z + 1, noise(30, 2), z, inverse=found)
    panels = {"untrained": collapse_panel(z), "jepa": jepa,
              "encdec": collapse_panel(torch.zeros(30, 1, 4))}
    figure = plot_collapse(panels, baselines=["untrained"])
    titles = [ax.get_title().split()[0] for ax in figure.axes]
    assert titles == ["spectrum,", "mean", "RankMe", "RankMe,", "inverse", "prediction"]
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in figure.axes[1].patches]
    assert [color == BASELINE_COLOR for color in colors] == [True, False, False]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["untrained", "jepa", "encdec"]
    assert figure._repr_png_()[:4] == b"\x89PNG"


class Still:
    "Says that nothing changes."
    def rollout(self, z, past_actions, actions):
        assert past_actions.shape[1] == 0 and not torch.is_grad_enabled()
        return z[:, -1:].expand(-1, actions.shape[1], -1, -1)


def one_step(dataset, episodes, latents):
    return Windows(dataset, np.array(episodes), 1, latents=latents, frames=False)


def test_rows_are_the_panel_of_validation_transitions_and_the_inverse_probe_knows_none_of_them(sample):
    latents = np.array(sample.states, np.float32)[:, None] @ noise(4, 6).numpy()
    learn, windows = one_step(sample, range(3), latents), one_step(sample, range(3, 8), latents)
    x, y = readout(torch.from_numpy(latents)), torch.from_numpy(np.array(sample.states))
    probe = fit_probe(x[:36], y[:36])
    rows = collapse_results(Still(), windows, probe, "jepa", 2, "cpu", learn)
    chosen, episodes = independent_windows(windows, len(windows), 2)
    batch = windows.batch(chosen)
    z, score = batch.latents, probe.r2(readout(batch.latents[:, 0]), batch.states[:, 0])
    t = learn.batch(np.arange(len(learn)))
    found = fit_inverse_probe(Transitions(t.latents[:, 0], t.latents[:, 1], t.actions[:, 0], learn.first))
    moving = np.array([True, True, False, False])
    panel = collapse_panel(z[:, 0], z[:, 1], batch.actions[:, 0], z[:, 0], score, moving, episodes, found)
    numbers = {name: value for name, value in panel.items() if name not in ("n", "spectrum")}
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(numbers, rel=1e-3, abs=1e-6)
    assert {"within_episode_share", "probe_r2_moving", "inverse_r2"} < set(numbers)
    assert "probe_r2_standing" not in numbers                                # the wall of the sample is fixed
    whose = {(row["protocol"], row["model"], row["kind"], row["n"]) for row in rows}
    assert whose == {("collapse", "jepa", "model", 55)}
    other = latents.copy()
    other[:sample.starts[3]] = noise(len(other), 1, 6).numpy()[:sample.starts[3]]  # of training episodes only
    sides = [one_step(sample, part, other) for part in (range(3, 8), range(3))]
    rows = collapse_results(Still(), sides[0], probe, "jepa", 2, "cpu", sides[1])
    again = {row["metric"]: row["value"] for row in rows}
    changed = {name for name in again if again[name] != numbers[name]}
    assert changed == {"inverse_r2", "inverse_r2_predicted"}


def test_without_states_the_panel_has_no_probe_and_wide_latents_are_few(sample):
    wide = np.broadcast_to(np.array(sample.states, np.float32)[:, :1, None], (len(sample.states), 1, 2**17))
    windows = one_step(sample, range(8), wide)
    rows = collapse_results(Still(), windows, None, "m", 0, "cpu", windows)
    assert "probe_r2" not in {row["metric"] for row in rows} and {row["n"] for row in rows} == {32}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_of_a_handful_of_transitions_all_is_there(n, alike):
    z = torch.ones(n, 2, 3) if alike else noise(n, 2, 3)
    found = fit_inverse_probe(Transitions(z, z if alike else z + 1, noise(n, 2, seed=1)))
    panel = collapse_panel(z, z if alike else z + 1, noise(n, 2, seed=1), z, probe_r2=0.5, inverse=found)
    numbers = {name: value for name, value in panel.items() if name not in ("spectrum", "prediction_ratio")}
    assert "inverse_r2" in numbers and all(math.isfinite(value) for value in numbers.values())
    assert math.isnan(panel["prediction_ratio"]) == alike                    # nothing ever changes


def room_panel(sees, seed, wall="random"):
    "The panel of an encoder of Two Rooms that sees so much of agent x, agent y, wall x and door y."
    rng, sim = np.random.default_rng(seed), TwoRooms(wall=wall)
    states, actions = [sim.reset(160, rng)], rng.uniform(-1, 1, (8, 160, 2)).astype(np.float32)
    for action in actions: states.append(sim.step(states[-1], action)[0])
    states = torch.from_numpy(np.stack(states, 1))                           # (160, 9, 4)
    x = torch.cos(states * torch.tensor(sees) @ noise(4, 32, seed=seed) / 30 + noise(32, seed=seed + 1))
    x = (x + .001 * noise(160, 9, 32, seed=seed + 2))[:, :, None]
    actions, episode = torch.from_numpy(actions.swapaxes(0, 1)), np.repeat(np.arange(160), 8)
    def steps(a, b):
        z, z_next = (part.flatten(0, 1) for part in (x[a:b, :-1], x[a:b, 1:]))
        return Transitions(z, z_next, actions[a:b].flatten(0, 1), episode[8 * a:8 * b])
    learn, judge, now = steps(0, 120), steps(120, 160), states[:, :-1]
    probe = fit_probe(readout(learn.z), now[:120].flatten(0, 1), groups=learn.episodes)
    score, moving = probe.r2(readout(judge.z), now[120:].flatten(0, 1)), np.array([True, True, False, False])
    said = judge.z_next.lerp(judge.z, .1)
    return collapse_panel(*judge[:3], said, score, moving, judge.episodes, fit_inverse_probe(learn))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_that_dropped_the_agent_is_named_though_its_variance_and_rank_are_fine(seed):
    whole, dropped = room_panel([1., 1., 1., 1.], seed), room_panel([0., 0., 2., 2.], seed)
    assert dropped["std_mean"] > .35 and dropped["rankme_centred"] > 4 and dropped["prediction_ratio"] < .5
    assert dropped["probe_r2_standing"] > .8 > .1 > dropped["probe_r2_moving"]
    (said,) = collapse_words(dropped)
    assert said.startswith("has lost what moves: ") and "variance lies within episodes" in said
    assert collapse_words(whole) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_that_dropped_the_walls_is_named_too_and_one_of_fixed_walls_has_none_to_lose(seed):
    (said,) = collapse_words(room_panel([1., 1., 0., 0.], seed))
    assert said.startswith("has lost what stands still in an episode")
    assert collapse_words(room_panel([1., 1., 0., 0.], seed, wall="fixed")) == []


HEALTHY = dict(rankme=9., rankme_centred=8., rank_limit=32., std_mean=.5, std_min=.1, probe_r2=.9,
               probe_r2_moving=.9, within_episode_share=.5, inverse_r2=.8, inverse_r2_predicted=.7,
               inverse_baseline=0.,
               prediction_ratio=.1)


@pytest.mark.parametrize("change, match", [
    ({}, None), (dict(within_episode_share=1e-5), None), (dict(rankme=1.1, rankme_centred=30.), None),
    (dict(std_mean=1e-6), None), (dict(prediction_ratio=math.nan), None),
    (dict(prediction_ratio=1.2), "1.2 times"), (dict(rankme_centred=0.), "every frame"),
    (dict(rankme_centred=1.1), "one line"), (dict(probe_r2_moving=-.001), "R² 0.00$"),
    (dict(rankme=1.1, rankme_centred=30., probe_r2=.1), "nearly the same"),
    (dict(inverse_r2_predicted=.01), "does not depend on the action"),
    (dict(inverse_r2=.1, inverse_r2_predicted=0.), None),
    (dict(probe_r2_standing=.2), "stands still"), (dict(probe_r2_standing=.9), None)])
def test_words_say_what_is_wrong_and_nothing_else(change, match):
    found = collapse_words(HEALTHY | change)
    assert len(found) == (match is not None)
    if match: assert re.search(match, found[0]) and "\n" not in found[0] and not found[0].endswith(".")


@pytest.mark.parametrize("share, named", [(.5, 0), (.01, 0), (1e-4, 1), (1e-7, 1)])
def test_without_states_a_share_of_next_to_nothing_is_named(share, named):
    panel = {name: value for name, value in HEALTHY.items() if "probe" not in name}
    found = collapse_words(panel | dict(within_episode_share=share))
    assert len(found) == named and all("may have lost what moves" in said for said in found)
