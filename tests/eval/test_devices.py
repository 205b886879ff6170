"Evaluation of a model that is on another device than the CPU: the same numbers, whatever is where."
import copy
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_tools import ELSEWHERE, Device, numbers

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.eval import collapse, heads, latents, results, rewards, rollouts
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.settings import EvaluationSettings, ProbeSettings, TrainingSettings, make_settings
from worldmodels_nb.training.fit import freeze

EVALUATION = EvaluationSettings(n_windows=8, bootstrap=20, filmstrips=2, history=2)
RECIPE = TrainingSettings(steps=3, batch_size=8)
VJEPA2 = {"vjepa2.pretrain": {"dim": 24, "depth": 1}, "vjepa2.action": {"dim": 24, "heads": 2, "depth": 1}}
SMALL = {"model": {"latent_dim": 16}, "encoder.patch": {"channels": 8}, "predictor": {"hidden": [16]}}
SMALL |= {"decoder": {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}} | VJEPA2
TOKENS = {"model": {"latent_dim": 16, "tokens": True, "frame_stack": 2}}
KINDS = {"jepa": {}, "jepa tokens": TOKENS, "encdec": {}, "vjepa2": {}}


class Scene:
    "A model with its latents, heads and windows; heads stay on the CPU, where they are fitted."
    def __init__(self, kind, sample):
        name, settings = kind.split()[0], make_settings(SMALL | KINDS[kind])
        frames = torch.from_numpy(sample.frames[:32].copy())
        self.world = freeze(fresh_model(name, settings, sample.spec, frames))
        self.sample, episodes, n = sample, np.arange(len(sample)), len(sample.frames)
        with torch.no_grad():
            stills = Windows(sample, episodes, 0, self.world.frame_stack)
            self.latents = self.world.encode(stills.batch(np.arange(n)).frames)[:, 0].numpy()
        stack, cached = self.world.frame_stack, self.latents
        self.windows = Windows(sample, episodes, 4, stack, cached)
        self.steps = Windows(sample, episodes, 1, latents=cached, frames=False)
        torch.manual_seed(0)
        self.probe = heads.fit_state_probe(cached, sample, episodes, ProbeSettings(), 0)
        self.decoder = freeze(heads.StateDecoder(cached.shape[1:], sample.spec.frame_shape, 4))
        shape, action = cached.shape[1:], sample.spec.action
        self.larp = rewards.LookAheadRewardPredictor(shape, action, hidden=[8], dropout=0.0)
        self.oracle = freeze(rewards.RewardMLP((1, sample.states.shape[1]), action, hidden=[8]))
        self.mlp = freeze(rewards.RewardMLP(shape, action, hidden=[8]))

    def batch(self, device): return self.windows.batch(np.arange(8)).to(device)

    def rolled(self, device):
        b = self.batch(device)
        with torch.no_grad(): return rollouts.open_loop(self.world, b.latents, b.actions, 2), b


def readings(scene, device):
    x, y = (torch.from_numpy(a).to(device) for a in (scene.latents.reshape(len(scene.latents), -1),
                                                     scene.sample.states.astype(np.float32)))
    mlp = heads.fit_mlp_probe(x, y, 8, RECIPE)
    linear = heads.fit_probe(x, y)
    assert mlp.mean.device == linear.mean.device == scene.probe.predict(x).device == torch.device(device)
    rows = heads.probe_results(scene.latents, scene.sample, np.arange(8), copy.deepcopy(linear), 0, 20)
    here = [probe.predict(x.cpu()) for probe in (linear, mlp)]                  # a probe there, latents here
    scores = [probe.r2(x, y) for probe in (linear, mlp, scene.probe)]
    return [heads.spread(x), heads.r_squared(y, y), scores, rows, here]


def decodings(scene, device):
    b, learner = scene.batch(device), heads.StateDecoder(scene.latents.shape[1:], (3, 64, 64), 4).to(device)
    for p in learner.parameters(): torch.nn.init.constant_(p, 0.01)
    losses = [learner.train(mode).loss(b).total for mode in (True, False)]
    return [losses, learner.background, copy.deepcopy(scene.decoder).to(device)(b.latents)]


def instruments(scene, device):
    b = scene.steps.batch(np.arange(40)).to(device)
    z, z_next, x = b.latents[:, 0], b.latents[:, 1], heads.readout(b.latents[:, 0])
    said, named = z + 0.5 * (z_next - z), (b.actions[:, 0, 0] > 0).long()
    score = scene.probe.r2(x, b.states[:, 0]).float().to(device)
    found = [collapse.fit_inverse_probe(collapse.Transitions(z, z_next, a)) for a in (b.actions[:, 0], named)]
    panels = [collapse.collapse_panel(z, z_next, a, said, score, inverse=inverse)
              for a, inverse in zip((b.actions[:, 0], named), found, strict=True)]
    return [collapse.rankme(x), collapse.centred(x), collapse.spectrum(x), *panels,
            collapse.collapse_results(scene.world, scene.steps, scene.probe, "m", 0, device, scene.steps)]


def readers_of(scene):
    means = rollouts.training_means(scene.sample, np.arange(8))
    return rollouts.Readers({"": scene.probe, "mlp": scene.probe}, scene.decoder, means, [0, 1])


def errors(scene, device):
    rolled, b = scene.rolled(device)
    frames, readers = b.frames[:, scene.world.frame_stack:], readers_of(scene)
    there = [rollouts.position_errors(rolled, b.states[:, 1:], scene.probe, [0, 1], std, readers.means.state)
             for std in (None, readers.means.std)]
    there += [rollouts.pixel_errors(rolled, frames, scene.decoder, readers.means.frame)]
    batches = list(rollouts.rollout_batches(scene.windows, np.arange(8), size=4))      # on the CPU
    values = rollouts.rollout_errors(scene.world, batches, readers, 2)
    again = rollouts.rollout_errors(scene.world, [replace(part, latents=None) for part in batches], history=2)
    assert {(t.dtype, t.device.type) for m in values.values() for t in m.values()} == {(torch.float64, "cpu")}
    return [*there, values, again]


def reports(scene, device):
    stack, cached = scene.world.frame_stack, scene.latents
    def windows_of(h): return Windows(scene.sample, np.arange(8), 1 + h, stack, cached)
    own = "m", EVALUATION, 0, device
    rows, arrays = rollouts.rollout_results(scene.world, windows_of, [1, 3], readers_of(scene), *own)
    strips = rollouts.rollout_strips(scene.world, scene.decoder, scene.windows, *own[1:])
    return [rows, list(arrays.values()), strips]


def earnings(scene, device):
    b, larp = scene.batch(device), scene.larp.to(device)
    larp.fit_normalization(rewards.RewardWindows(scene.sample, np.arange(8), scene.latents))
    losses = larp.train().loss(b).total
    own = dict(larp=freeze(larp), mlp=scene.mlp)
    batches = [scene.windows.batch(np.arange(8))]                                      # on the CPU
    errors = rewards.reward_errors(scene.world, own, batches, 3, dict(oracle=scene.oracle))
    def windows_of(h): return Windows(scene.sample, np.arange(8), 1 + h, latents=scene.latents, frames=False)
    rows = rewards.reward_results(scene.world, own, {}, windows_of, [1, 2], "m", EVALUATION, 0, device)
    said = rewards.reward_rows(errors, 3, "m", 0, 20)
    return [losses, errors, rows, larp(b.latents, b.actions), said]


def caches(scene, device):
    with tempfile.TemporaryDirectory() as folder:
        name = latents.cache_name(scene.world, scene.sample, "float32")
        z = np.array(latents.encode_dataset(scene.world, scene.sample, folder, progress=False))
        ahead = np.array(rewards.predict_dataset(scene.world, scene.sample, z, folder, progress=False))
        assert latents.device_of(scene.world) == torch.device(device)                  # it stays where it is
    return [name, z, ahead]


def intervals(scene, device):
    top, bottom = scene.batch(device).rewards + 2, scene.batch(device).latents[:, 0, 0, :4].abs() + 1
    return [results.bootstrap_interval(top), results.bootstrap_ratio(top, bottom), results.as_float64(top)]


def flat(found):
    if isinstance(found, dict): return [v for key in found for v in (str(key), *flat(found[key]))]
    if isinstance(found, (list, tuple)): return [v for each in found for v in flat(each)]
    return [numbers(found) if isinstance(found, torch.Tensor) else found]


@pytest.fixture(scope="module", params=KINDS)
def scene(request, sample): return Scene(request.param, sample)


CALLS = [readings, decodings, instruments, errors, reports, earnings, caches, intervals]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_elsewhere_it_measures_what_it_measures_here(call, scene):
    here, there = copy.deepcopy(scene), copy.deepcopy(scene)
    expected = flat(call(here, "cpu"))
    with Device():
        there.world.to(ELSEWHERE)
        found = flat(call(there, ELSEWHERE))
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        if isinstance(b, (str, type(None))): assert a == b
        else: np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-3, atol=1e-4)
