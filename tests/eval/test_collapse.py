"The collapse panel: closed forms of the rank, invariances, encoders whose health is known."
import json
import math

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.eval.collapse import (
    centred,
    collapse_panel,
    collapse_results,
    inverse_probe,
    plot_collapse,
    prediction_ratio,
    rankme,
    spectrum,
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


def test_inverse_probe_reads_a_linear_action():
    z, a = noise(200, 1, 6), noise(200, 2, seed=1)
    z_next = z + (a @ noise(2, 6, seed=2))[:, None]
    scores = inverse_probe(z, z_next, a, z_predicted=z)
    assert scores["inverse_r2"] > .98 and scores["inverse_r2_predicted"] < .05
    assert scores["inverse_baseline"] == 0
    assert inverse_probe(z, z_next, a.roll(7, 0))["inverse_r2"] < .1


def test_inverse_probe_names_discrete_actions_beside_the_commonest():
    z, a = noise(400, 2, 4), torch.arange(400) % 5 % 3         # actions 0, 1, 2, 0, 1, …: 0, 1 are commonest
    z_next = z.clone()
    z_next[:, 0, :3] += torch.nn.functional.one_hot(a)
    scores = inverse_probe(z, z_next, a, z_predicted=z_next)
    assert scores["inverse_accuracy"] == 1 == scores["inverse_accuracy_predicted"]
    assert scores["inverse_baseline"] == pytest.approx(.4)
    assert inverse_probe(z, z + noise(400, 2, 4, seed=3), a)["inverse_accuracy"] < .55


def test_inverse_probe_wants_both_halves():
    z = noise(3, 1, 2)
    with pytest.raises(EvaluationError, match="four transitions"): inverse_probe(z, z, noise(3, 1))


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
    full = collapse_panel(z, z_next, actions, z, r2)
    assert full["prediction_ratio"] == pytest.approx(1) and full["probe_r2"] == pytest.approx(.6)
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
    panels = {"jepa": collapse_panel(z, z + 1, noise(30, 2), z), "untrained": collapse_panel(z),
              "encdec": collapse_panel(torch.zeros(30, 1, 4))}
    figure = plot_collapse(panels, baselines=["untrained"])
    titles = [ax.get_title().split()[0] for ax in figure.axes]
    assert titles == ["spectrum,", "mean", "RankMe", "RankMe,", "inverse", "prediction"]
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in figure.axes[1].patches]
    assert [color == BASELINE_COLOR for color in colors] == [False, True, False]
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()] == ["jepa", "untrained", "encdec"]
    assert figure._repr_png_()[:4] == b"\x89PNG"


class Still:
    "Says that nothing changes."
    def rollout(self, z, past_actions, actions):
        assert past_actions.shape[1] == 0 and not torch.is_grad_enabled()
        return z[:, -1:].expand(-1, actions.shape[1], -1, -1)


def test_rows_are_the_panel_of_validation_transitions(sample):
    latents = np.array(sample.states, np.float32)[:, None] @ noise(4, 6).numpy()
    windows = Windows(sample, np.arange(3, 8), 1, latents=latents, frames=False)
    x, y = readout(torch.from_numpy(latents)), torch.from_numpy(np.array(sample.states))
    probe = fit_probe(x[:36], y[:36])
    rows = collapse_results(Still(), windows, probe, "jepa", seed=2, device="cpu")
    batch = windows.batch(np.sort(independent_windows(windows, len(windows), 2)[0]))
    z = batch.latents
    score = probe.r2(readout(z[:, 0]), batch.states[:, 0])
    panel = collapse_panel(z[:, 0], z[:, 1], batch.actions[:, 0], z[:, 0], score)
    numbers = {name: value for name, value in panel.items() if name not in ("n", "spectrum")}
    assert {row["metric"]: row["value"] for row in rows} == numbers
    whose = {(row["protocol"], row["model"], row["kind"], row["n"]) for row in rows}
    assert whose == {("collapse", "jepa", "model", 55)}


def test_without_states_the_panel_has_no_probe_and_wide_latents_are_few(sample):
    wide = np.broadcast_to(np.array(sample.states, np.float32)[:, :1, None], (len(sample.states), 1, 2**17))
    windows = Windows(sample, np.arange(8), 1, latents=wide, frames=False)
    rows = collapse_results(Still(), windows, None, "m", 0, "cpu")
    assert "probe_r2" not in {row["metric"] for row in rows} and {row["n"] for row in rows} == {32}


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("alike", [False, True])
def test_of_a_handful_of_transitions_there_is_no_inverse_probe_and_all_else_is_there(n, alike):
    z = torch.ones(n, 2, 3) if alike else noise(n, 2, 3)
    panel = collapse_panel(z, z if alike else z + 1, noise(n, 2, seed=1), z, probe_r2=0.5)
    assert ("inverse_r2" in panel) == (n >= 4)
    numbers = {name: value for name, value in panel.items() if name not in ("spectrum", "prediction_ratio")}
    assert all(math.isfinite(value) for value in numbers.values())
    assert math.isnan(panel["prediction_ratio"]) == alike                    # nothing ever changes
