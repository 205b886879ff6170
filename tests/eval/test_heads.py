"Probes and the state decoder: closed forms, invariances, degenerate input."
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.eval.axes import spread
from worldmodels_nb.eval.heads import (
    RAW_PIXELS,
    LinearProbe,
    MLPProbe,
    StateDecoder,
    fit_mlp_probe,
    fit_probe,
    fit_state_probe,
    pixel_features,
    probe_frames,
    probe_results,
    r_squared,
    readout,
)
from worldmodels_nb.eval.results import MODEL, EvaluationError, Source
from worldmodels_nb.settings import ProbeSettings, TrainingSettings
from worldmodels_nb.training.fit import fit


def sample(n=60, width=5, outputs=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g) * torch.arange(1, width + 1) + 2
    return x, x @ torch.randn(width, outputs, generator=g) + .3 * torch.randn(n, outputs, generator=g)


def pixels(latents, frames):
    return Batch(frames, None, None, None, None, latents)


def test_readout_lays_tokens_side_by_side():
    z = torch.arange(24.).view(2, 3, 4)
    assert readout(z).tolist() == [list(range(12)), list(range(12, 24))]
    assert readout(torch.zeros(5, 7, 3, 4)).shape == (5, 7, 12)


def test_r_squared_against_the_formula():
    x, y = sample()
    guess = y + torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    p, t = guess.double().numpy(), y.double().numpy()
    assert np.allclose(r_squared(guess, y), 1 - ((p - t) ** 2).sum(0) / ((t - t.mean(0)) ** 2).sum(0))
    assert torch.allclose(r_squared(y, y), torch.ones(3, dtype=torch.float64))
    none = torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(r_squared(y.mean(0).expand_as(y), y), none, atol=1e-9)


def test_r_squared_of_what_does_not_vary_is_nan():
    y = torch.cat([torch.full((10, 1), 32.1), torch.arange(10.)[:, None]], 1)
    assert r_squared(y, y).isnan().tolist() == [True, False]
    with pytest.raises(EvaluationError, match="two samples"): r_squared(y[:1], y[:1])


@pytest.mark.parametrize("n, width", [(60, 5), (8, 30), (12, 12)])
@pytest.mark.parametrize("ridge", [.03, 1.])
def test_probe_equals_least_squares_with_ridge_rows(n, width, ridge):
    x, y = sample(n, width)
    a, t = x.double().numpy(), y.double().numpy()
    a = a - a.mean(0)
    inputs = np.vstack([a, math.sqrt(ridge * n * a.var(0).sum()) * np.eye(width)])   # of the total variance
    w = np.linalg.lstsq(inputs, np.vstack([t - t.mean(0), np.zeros((width, 3))]), rcond=None)[0]
    assert np.allclose(fit_probe(x, y, ridge).predict(x), a @ w + t.mean(0), atol=1e-4)


def test_each_number_of_the_state_has_its_own_ridge_and_nothing_to_read_the_largest():
    g = torch.Generator().manual_seed(0)
    loud, quiet = torch.randn(400, 8, generator=g), torch.randn(400, 1, generator=g)
    x = torch.cat([10 * loud, .003 * quiet], 1)
    noise = torch.randn(400, 2, generator=g)
    y = torch.cat([loud[:, :1] + noise[:, :1], quiet, noise[:, 1:]], 1)
    probe = fit_probe(x[:300], y[:300])
    noisy, whisper, nothing = probe.ridge.tolist()
    assert whisper < 1e-8 < 1e-4 < noisy < nothing
    alone = [fit_probe(x[:300], y[:300, i:i + 1]).ridge.item() for i in range(3)]
    assert alone == probe.ridge.tolist()
    assert probe.r2(x[300:], y[300:])[1] > .99 and abs(probe.r2(x[300:], y[300:])[2]) < .05


def test_whole_episodes_are_left_out_where_frames_of_one_resemble_each_other():
    g = torch.Generator().manual_seed(0)
    episode = np.arange(400) // 20
    own = torch.randn(20, 40, generator=g)[episode] + .05 * torch.randn(400, 40, generator=g)
    y = torch.randn(20, 1, generator=g)[episode]                     # the latent says which episode, no more
    assert fit_probe(own, y, groups=episode).ridge > 10 > 1e-2 > fit_probe(own, y).ridge


def a_generator(seed): return torch.Generator().manual_seed(seed)


FORMS = {
    "copied": lambda x: x.repeat(1, 8), "loud": lambda x: 1000 * x, "quiet": lambda x: x / 1000,
    "rotated": lambda x: x @ torch.linalg.qr(torch.randn(len(x.T), len(x.T), generator=a_generator(9)))[0],
    "permuted": lambda x: x.flip(1), "mirrored": lambda x: -x,
}


def waves_of(y, width, kind):
    "Latents that hold two numbers: waves, with noise, or a random network's."
    g = torch.Generator().manual_seed(width)
    z = y @ torch.randn(2, width, generator=g) + 6.28 * torch.rand(width, generator=g)
    z = z.tanh() if kind == "net" else z.cos()
    return z + (.1 * torch.randn(z.shape, generator=g) if kind == "noisy" else 0)


def figures(x, y):
    "R² and the distance of both probes, on samples that neither has seen."
    episode = np.arange(300) // 10
    mlp = fit_mlp_probe(x[:300], y[:300], 32, TrainingSettings(steps=60, batch_size=64), groups=episode)
    found = []
    for probe in (mlp.linear, mlp):
        read = probe.predict(x[300:]).detach()
        found += [*r_squared(read, y[300:]).tolist(), (read - y[300:]).norm(dim=1).mean().item()]
    return np.array(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width, kind", [(16, "clean"), (24, "noisy"), (48, "net")])
def test_copying_scaling_or_rotating_latents_changes_no_figure_of_a_probe(form, width, kind):
    y = 2 * torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) - 1
    x = waves_of(y, width, kind)
    plain, other = figures(x, y), figures(FORMS[form](x), y)
    assert plain[:2].min() > .5 and np.allclose(plain, other, rtol=.01)


@pytest.mark.parametrize("width, kind", [(16, "clean"), (24, "noisy"), (48, "net")])
@pytest.mark.parametrize("seed", [0, 1])
def test_unequal_scales_of_coordinates_change_no_figure_of_the_linear_probe(width, kind, seed):
    g = torch.Generator().manual_seed(seed)
    y = 2 * torch.rand(500, 2, generator=g) - 1
    x = waves_of(y, width, kind)
    scales = .3 + 2.7 * torch.rand(width, generator=g)
    plain, other = (fit_probe(z[:400], y[:400]).r2(z[400:], y[400:]) for z in (x, x * scales))
    assert torch.allclose(plain, other, rtol=.01)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-100, 100), st.floats(1e-2, 1e2), st.integers(0, 5))
def test_scale_and_shift_of_latents_do_not_matter_and_units_of_states_do(scale, shift, unit, seed):
    x, y = sample(seed=seed)
    shift = shift * scale
    plain, moved = fit_probe(x, y), fit_probe(x * scale + shift, y * unit)
    read = moved.predict(x * scale + shift)
    assert torch.allclose(plain.predict(x) * unit, read, rtol=1e-3, atol=2e-2 * unit)


def test_order_of_samples_does_not_matter():
    x, y = sample()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(fit_probe(x, y).predict(x), fit_probe(x[order], y[order]).predict(x), atol=1e-4)


def test_inputs_that_do_not_vary_are_never_looked_at():
    x, y = sample()
    constant, rounding = torch.full((60, 1), .7), 1000 + 1e-4 * torch.randn(60, 1)
    wide = torch.cat([x, constant, rounding], 1)
    elsewhere = wide.clone()
    elsewhere[:, 5:] = 1e6
    assert torch.equal(fit_probe(wide, y).predict(wide), fit_probe(wide, y).predict(elsewhere))
    assert torch.allclose(fit_probe(wide, y).predict(wide), fit_probe(x, y).predict(x), atol=1e-4)
    assert spread(wide)[5:].tolist() == [0, 0]


def test_a_collapsed_latent_reads_as_the_mean():
    x, y = torch.full((60, 5), .3), sample()[1]
    probe = fit_probe(x, y)
    assert torch.allclose(probe.predict(x), y.mean(0).expand_as(y), atol=1e-5)
    assert torch.allclose(probe.r2(x, y), torch.zeros(3, dtype=torch.float64), atol=1e-6)


def test_constant_targets_are_read_exactly():
    x, _ = sample()
    y = torch.tensor([[32., 24.]]).expand(60, 2)
    assert torch.equal(fit_probe(x, y).predict(torch.randn(7, 5) * 100), y[:7])


def test_byte_states_are_targets_too():
    x, y = sample()
    y = (y * 10 + 128).clamp(0, 255).byte()
    assert torch.equal(fit_probe(x, y).predict(x), fit_probe(x, y.float()).predict(x))


@pytest.mark.parametrize("x, y, match", [
    (torch.zeros(1, 3), torch.zeros(1, 2), "two samples"),
    (torch.zeros(4, 3), torch.zeros(5, 2), "equal n"),
    (torch.zeros(4, 1, 3), torch.zeros(4, 2), "readouts"),
    (torch.full((4, 3), torch.nan), torch.zeros(4, 2), "not finite"),
    (torch.zeros(4, 3), torch.full((4, 2), torch.inf), "not finite")])
def test_unusable_samples_are_refused_in_one_sentence(x, y, match):
    for fitter in (fit_probe, fit_mlp_probe):
        with pytest.raises(EvaluationError, match=match): fitter(x, y)


@pytest.mark.parametrize("n", [3, 60])
def test_without_ridge_repeated_inputs_are_least_squares_too(n):
    x, y = sample(n)
    once, twice = fit_probe(x, y, 0.), fit_probe(torch.cat([x, x], 1), y, 0.)
    assert torch.allclose(once.predict(x), twice.predict(torch.cat([x, x], 1)), atol=1e-3)
    assert once.r2(x, y).min() > .9


def test_a_real_ridge_survives_errors_in_predicted_latents():
    g = torch.Generator().manual_seed(0)
    y = 3.6 * torch.rand(400, 2, generator=g) - 1.8
    q = torch.linalg.qr(torch.randn(32, 32, generator=g))[0]
    true = torch.tanh(1.5 * y) @ q[:2] + .003 * y @ q[2:4]
    predicted = true + .05 * torch.randn(400, 32, generator=g)
    small, real = fit_probe(true, y, 1e-8), fit_probe(true, y, .03)
    assert small.r2(true, y).min() > .999 and real.r2(true, y).min() > .8
    assert small.r2(predicted, y).max() < 0 and real.r2(predicted, y).min() > .8


def test_mlp_probe_depends_on_its_seed_alone():
    x, y = sample()
    recipe = TrainingSettings(steps=5, batch_size=16)
    state = torch.get_rng_state()
    first = fit_mlp_probe(x, y, 8, recipe, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (fit_mlp_probe(x, y, 8, recipe, seed=seed) for seed in (1, 2))
    assert torch.equal(first.predict(x), again.predict(x))
    assert not torch.equal(first.predict(x), other.predict(x))
    assert not first.training


def test_mlp_probe_reads_what_is_folded():
    x = torch.rand(600, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.cat([x.square(), torch.full_like(x, 5.)], 1)
    recipe = TrainingSettings(steps=200, batch_size=64, learning_rate=1e-2)
    mlp = fit_mlp_probe(x[:400], y[:400], 32, recipe)
    assert fit_probe(x[:400], y[:400]).r2(x[400:], y[400:])[0] < .1 < .95 < mlp.r2(x[400:], y[400:])[0]
    assert torch.allclose(mlp.predict(x)[:, 1], torch.tensor(5.))


def test_heads_are_what_their_weights_say():
    x, y = sample()
    linear, mlp = fit_probe(x, y), fit_mlp_probe(x, y, 8, TrainingSettings(steps=3, batch_size=16))
    for fresh, fitted in ((LinearProbe(5, 3), linear), (MLPProbe(5, 3, 8), mlp)):
        fresh.load_state_dict(fitted.state_dict())
        assert torch.equal(fresh.predict(x), fitted.predict(x))
    assert torch.equal(mlp.linear.predict(x), linear.predict(x))


@pytest.mark.parametrize("n, width", [(400, 40), (100, 200)])
def test_where_there_is_nothing_to_read_an_mlp_probe_adds_next_to_nothing(n, width):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2 * n, width, generator=g), torch.randn(2 * n, 2, generator=g)
    mlp = fit_mlp_probe(x[:n], y[:n], 64, TrainingSettings(steps=100, batch_size=64))
    assert mlp.r2(x[n:], y[n:]).min() > -.2 and mlp.linear.r2(x[n:], y[n:]).min() > -.1


def test_a_collapsed_latent_is_the_mean_to_an_mlp_probe_too():
    x, y = torch.full((60, 5), .3), sample()[1]
    assert torch.allclose(fit_mlp_probe(x, y, 8).predict(x), y.mean(0).expand_as(y), atol=1e-5)


@pytest.mark.parametrize("frame_shape", [(3, 8, 8), (1, 50, 50), (3, 64, 64), (1, 84, 84), (3, 40, 24)])
def test_decoder_decodes_every_size(frame_shape):
    decoder = StateDecoder((2, 3), frame_shape, 4)
    frames = torch.randint(0, 256, (4, 2, *frame_shape), dtype=torch.uint8)
    decoder.loss(pixels(torch.randn(4, 2, 2, 3), frames)).total.backward()
    decoded = decoder.eval()(100 * torch.randn(3, 2, 2, 3))
    assert decoded.shape == (3, 2, *frame_shape) and 0 <= decoded.min() and decoded.max() <= 1
    assert decoder(torch.randn(2, 3)[None]).shape == (1, *frame_shape)
    assert StateDecoder((4, 5), (1, 84, 84), 4)(torch.randn(2, 3, 4, 5)).shape == (2, 3, 1, 84, 84)


def test_frames_too_small_are_refused():
    for size in (4, 7):
        with pytest.raises(EvaluationError, match="env.size"): StateDecoder((1, 4), (3, size, size))


def test_a_fresh_decoder_shows_the_mean_of_the_frames_it_saw():
    decoder = StateDecoder((1, 4), (3, 16, 16), 4)
    batches = torch.randint(0, 256, (3, 8, 1, 3, 16, 16), dtype=torch.uint8)
    for frames in batches: decoder.loss(pixels(torch.randn(8, 1, 1, 4), frames))
    expected = (batches.float() / 255).mean((0, 1, 2))
    assert torch.allclose(decoder.eval()(torch.randn(5, 1, 4)), expected.expand(5, 3, 16, 16), atol=1e-5)
    decoder.loss(pixels(torch.randn(8, 1, 1, 4), 0 * batches[0]))
    assert torch.allclose(decoder.background, expected, atol=1e-5) and decoder.seen == 3


def test_decoder_loss_is_the_pixel_error_of_the_newest_frames():
    decoder = StateDecoder((1, 4), (3, 16, 16), 4).eval()
    z, frames = torch.randn(6, 2, 1, 4), torch.randint(0, 256, (6, 4, 3, 16, 16), dtype=torch.uint8)
    loss = decoder.loss(pixels(z, frames))
    newest = frames[:, 2:].flatten(0, 1) / 255
    assert torch.allclose(loss.total, F.mse_loss(decoder.decode(z.flatten(0, 1)), newest))
    assert loss.terms.keys() == {"pixels"} and not loss.terms["pixels"].requires_grad


def test_decoder_learns_what_the_latent_says_whatever_its_scale():
    g = torch.Generator().manual_seed(0)
    where = torch.randint(2, 14, (512, 2), generator=g)
    frames = torch.zeros(512, 1, 16, 16, dtype=torch.uint8)
    for d in (-1, 0, 1): frames[torch.arange(512), 0, where[:, 0] + d, where[:, 1]] = 255
    latents = F.one_hot(where, 16).float().flatten(1)[:, None]
    def train(scale):
        torch.manual_seed(0)
        def batch(step):
            i = np.random.default_rng(step).integers(512, size=64)
            return pixels(scale * latents[i, None], frames[i, None])
        recipe = TrainingSettings(steps=80, batch_size=64, learning_rate=1e-2)
        decoder = fit(StateDecoder((1, 32), (1, 16, 16), 8), batch, recipe).model.eval()
        return F.mse_loss(decoder(scale * latents), frames / 255).item()
    blind = (frames / 255).var(0, correction=0).mean().item()
    assert train(1.) < .3 * blind and train(100.) < .3 * blind


def test_a_decoder_for_tokens_stays_small():
    assert sum(p.numel() for p in StateDecoder((64, 128), (3, 64, 64), 32).parameters()) < 4e6


@pytest.fixture
def waves(sample):
    "Latents (n, 1, 16) of the sample that hold the dot's position."
    g = torch.Generator().manual_seed(0)
    states = torch.from_numpy(np.array(sample.states))[:, :2]
    return torch.cos(states @ torch.randn(2, 16, generator=g) / 10)[:, None].numpy()


def test_the_probe_of_a_dataset_is_that_of_its_training_frames(sample, waves):
    probe = fit_state_probe(waves, sample, np.arange(6), ProbeSettings(), seed=0)
    rows = np.arange(sample.starts[6])
    episode = np.repeat(np.arange(6), sample.lengths[:6] + 1)
    x, y = readout(torch.from_numpy(waves[rows])), torch.from_numpy(sample.states[rows])
    assert torch.equal(probe.predict(x), fit_probe(x, y, groups=episode).predict(x))
    fixed = fit_state_probe(waves, sample, np.arange(6), ProbeSettings(ridge=.03), seed=0)
    assert torch.equal(fixed.predict(x), fit_probe(x, y, .03).predict(x))
    s = ProbeSettings(mlp_steps=4, mlp_hidden=8)
    recipe = TrainingSettings(steps=4, batch_size=256, learning_rate=4e-3)
    hidden = fit_state_probe(waves, sample, np.arange(6), s, seed=3, hidden=True)
    assert torch.equal(hidden.predict(x), fit_mlp_probe(x, y, 8, recipe, seed=3, groups=episode).predict(x))
    assert torch.equal(hidden.linear.predict(x), probe.predict(x))
    assert not any(p.requires_grad for p in hidden.parameters())


@pytest.mark.parametrize("width, most", [
    (4, 20_000), (1024, 20_000), (2048, 16_384), (4096, 4096), (2**18, 128)])
def test_wide_latents_are_probed_on_fewer_frames(width, most):
    asked = []
    def frame_indices(episodes, at_most):
        asked.append(at_most)
        return np.arange(3)
    states = np.zeros((3, 2), np.float32)
    dataset = SimpleNamespace(states=states, starts=np.arange(3), frame_indices=frame_indices)
    latents = np.broadcast_to(np.float32(1), (3, 1, width))
    fit_state_probe(latents, dataset, np.arange(1), ProbeSettings(), seed=0)
    assert asked == [most] == [probe_frames(width)]


@pytest.mark.parametrize("side", [8, 32, 64])
def test_raw_pixels_are_grey_means_of_squares(sample, side):
    rows = np.array([3, 0, 40])
    found = pixel_features(sample, rows, side)
    assert found.shape == (3, 1, side**2)
    grey = sample.frames[rows].mean(1) / 255
    by_hand = grey.reshape(3, side, 64 // side, side, 64 // side).mean((2, 4))
    assert np.allclose(found.numpy().reshape(by_hand.shape), by_hand, atol=1e-6)


def test_raw_pixels_are_probed_like_latents_and_belong_to_no_model(sample):
    asked = []
    def pixels(rows):
        asked.append(len(rows))
        return pixel_features(sample, rows, 16)
    probe = fit_state_probe(pixels, sample, np.arange(6), ProbeSettings(), seed=0)
    rows = probe_results(pixels, sample, np.arange(6, 8), probe, 0, 50, source=RAW_PIXELS, model="jepa")
    assert asked == [1, 72, 24]                                              # never the whole dataset
    whole = pixel_features(sample, np.arange(96), 16).numpy()
    same = fit_state_probe(whole, sample, np.arange(6), ProbeSettings(), seed=0)
    assert rows == probe_results(whole, sample, np.arange(6, 8), same, 0, 50, source=RAW_PIXELS)
    assert {(row["model"], row["kind"], row["head"]) for row in rows} == {("", "baseline", "raw_pixels")}


def test_without_states_there_is_no_probe(sample, waves, monkeypatch):
    monkeypatch.setattr(sample, "states", None)
    assert fit_state_probe(waves, sample, np.arange(6), ProbeSettings(), seed=0) is None


def test_rows_of_a_probe_are_r2_on_held_out_episodes(sample, waves):
    probe = fit_state_probe(waves, sample, np.arange(6), ProbeSettings(), seed=0)
    rows = probe_results(waves, sample, np.arange(6, 8), probe, seed=0, resamples=200, model="jepa")
    assert [row["metric"] for row in rows] == ["r2 agent x", "r2 agent y", "r2 position"]  # no wall
    held_out = slice(sample.starts[6], None)
    true = torch.from_numpy(np.array(sample.states[held_out]))
    by_hand = probe.r2(readout(torch.from_numpy(waves[held_out])), true)[:2].tolist()
    assert [row["value"] for row in rows[:2]] == pytest.approx(by_hand, rel=1e-5)
    assert rows[2]["value"] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 2 for row in rows)
    whose = {(row["protocol"], row["kind"], row["model"], row["head"]) for row in rows}
    assert whose == {("probe", "model", "jepa", "")}


def test_rows_of_an_untrained_encoder_are_a_baseline_with_the_same_numbers(sample, waves):
    probe = fit_state_probe(waves, sample, np.arange(6), ProbeSettings(), seed=0)
    how = dict(seed=0, resamples=50, metric="mlp r2", model="jepa")
    own, other = (probe_results(waves, sample, np.arange(6, 8), probe, source=source, **how)
                  for source in (MODEL, Source("baseline", "untrained")))
    assert [row["value"] for row in own] == [row["value"] for row in other]
    assert {(row["kind"], row["head"], row["model"]) for row in other} == {("baseline", "untrained", "jepa")}
    assert own[0]["metric"] == "mlp r2 agent x"


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (4, 8)])
def test_one_frame_normalises_nothing_in_training_and_is_decoded_in_evaluation(shape):
    decoder, frames = StateDecoder(shape, (3, 16, 16), 4), torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8)
    lone = Batch(frames, None, None, None, None, torch.randn(1, 1, *shape))
    with pytest.raises(EvaluationError, match="train.state_decoder.batch_size"): decoder.train().loss(lone)
    assert decoder.seen == 0                                                 # refused before anything changed
    assert decoder.eval().loss(lone).total.isfinite()
