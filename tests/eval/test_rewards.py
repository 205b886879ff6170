"Reward heads: no encoder call in training, closed forms, the ablation, paths of k steps, floors, and rewards that cannot be predicted."
import errno
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worldmodels_nb.data.episodes import Episode
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.datasets import Batch, Windows, open_dataset, sample_dataset
from worldmodels_nb.data.episodes import DataSpec, EpisodeWriter
from worldmodels_nb.eval import rewards as module
from worldmodels_nb.eval.heads import EvaluationError
from worldmodels_nb.eval.rewards import ConstantReward, LookAheadRewardPredictor, RewardMLP, RewardWindows, path_ahead, predict_dataset, reader, reward_errors, reward_rows, reward_scale
from worldmodels_nb.eval.rollouts import RolloutErrors, independent_windows, rollout_batches
from worldmodels_nb.models.base import WorldModel, build_model
from worldmodels_nb.training.fit import freeze
from worldmodels_nb.models import encdec, jepa# noqa: F401  (they register themselves)
from worldmodels_nb.settings import TrainingSettings, make_settings
from worldmodels_nb.training.parts import train
from worldmodels_nb.training.fit import fit, load_weights, save_weights
from worldmodels_nb.eval.latents import LatentsError, encode_dataset

CONTINUOUS, DISCRETE = ActionSpec("continuous", 2, [-1, -1], [1, 1]), ActionSpec("discrete", 3, None, None)
PLAIN = dict(hidden=(32,), dropout=0.)
LENGTHS = [6, 1, 9, 4] + [8] * 8


@pytest.fixture(autouse=True)
def one_thread():
    "These networks are too small to share."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moves_of(actions):
    "Each action as a step in the plane."
    return actions if actions.ndim and actions.dtype.kind == "f" else np.array([[1., 0], [0, 1], [-1, -1]], np.float32)[actions]


class Drift(WorldModel):
    "Latent = state = a place in the plane, in one token; every action is added to it, times `gain`."
    def __init__(self, gain=1.):
        nn.Module.__init__(self)
        self.gain, self.frame_stack, self.latent_shape, self.calls = nn.Parameter(torch.tensor(gain), requires_grad=False), 1, (1, 2), 0

    def encode(self, frames): raise AssertionError("nothing is to be encoded")

    def rollout(self, z, past_actions, actions):
        assert past_actions.shape[1] == z.shape[1] - 1 == 0
        self.calls += 1
        steps = torch.from_numpy(moves_of(actions.numpy()))
        return z[:, -1:] + self.gain * steps.cumsum(1)[:, :, None]


def write(folder, action=CONTINUOUS, pay=None, seed=0, dtype=np.float32):
    "Walks of `LENGTHS` steps; `pay(state, move, next state)` gives the rewards, the first number of the next state if it is None."
    rng, spec = np.random.default_rng(seed), DataSpec((1, 4, 4), action, ["x", "y"], [0, 1])
    with EpisodeWriter(folder, spec, {"seed": seed, "kind": action.kind}) as writer:
        for L in LENGTHS:
            a = rng.uniform(-1, 1, (L, 2)).astype(np.float32) if action.kind == "continuous" else rng.integers(0, 3, L)
            s = np.concatenate([rng.normal(size=(1, 2)), moves_of(a)]).cumsum(0).astype(dtype)
            r = s[1:, 0] if pay is None else pay(s[:-1], moves_of(a), s[1:])
            writer.add(Episode(rng.integers(0, 256, (L + 1, 1, 4, 4), np.uint8), a, np.asarray(r, np.float32), False, s))
    return open_dataset(folder)


@pytest.fixture(scope="module", params=["continuous", "discrete"])
def data(request, tmp_path_factory): return write(tmp_path_factory.mktemp("rewards") / "set", CONTINUOUS if request.param == "continuous" else DISCRETE)


def learn(head, windows, steps=250, lr=1e-2, size=64):
    torch.manual_seed(0)
    return fit(head.fit_normalization(windows), lambda step: windows.sample(size, 0, step), TrainingSettings(steps=steps, batch_size=size, learning_rate=lr, weight_decay=0.)).model.eval()


def everything(windows): return windows.batch(np.arange(len(windows)))


def ratio(head, windows):
    "Squared error over that of the mean reward."
    with torch.no_grad(): return head.loss(everything(windows)).total.item()


class Unread:
    "Frames that have a number and must never be looked at."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getattr__(self, name): raise AssertionError("a frame was read")
    def __getitem__(self, rows): raise AssertionError("a frame was read")


@pytest.mark.parametrize("name", ["jepa", "encdec"])
def test_training_heads_calls_no_encoder_runs_no_model_and_reads_no_frame(name, tmp_path):
    data = sample_dataset()
    sizes = {"patch": {"channels": 4}, "model": {"latent_dim": 8}, "decoder": {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}}
    model, encoded, ran = freeze(build_model(name, make_settings(sizes), data.spec)), [], []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for part in model.modules(): part.register_forward_hook(lambda *_: ran.append(1))
    latents = encode_dataset(model, data, tmp_path, progress=False)
    assert len(encoded) == 1
    paths = predict_dataset(model, data, latents, tmp_path, progress=False)
    data.frames, recipe = Unread(len(latents)), TrainingSettings(steps=6, batch_size=8, validate_every=3, checkpoint_every=6)
    encoded.clear(); ran.clear()
    for kind in (RewardMLP, LookAheadRewardPredictor):
        windows = [RewardWindows(data, episodes, latents, paths) for episodes in (np.arange(6), np.arange(6, 8))]
        head = kind(model.latent_shape, data.spec.action, hidden=(8,)).fit_normalization(windows[0])
        assert train(head, *windows, recipe, tmp_path / kind.__name__, progress=False)["steps"] == 6
    assert (len(encoded), len(ran)) == (0, 0)


def test_a_pixel_models_predictions_encode_each_painted_frame_once(tmp_path):
    data, seen = sample_dataset(), []
    model = freeze(build_model("encdec", make_settings({"patch": {"channels": 4}, "model": {"latent_dim": 8}, "decoder": {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}}), data.spec))
    latents = encode_dataset(model, data, tmp_path, progress=False)
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    for _ in range(2): predict_dataset(model, data, latents, tmp_path, steps=3, progress=False)
    assert sum(seen) == 3 * len(latents)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_paths_equal_those_made_one_by_one_and_end_with_their_episode(data, steps, tmp_path):
    latents, model = data.states[:, None].astype(np.float32), Drift(.5)
    paths = predict_dataset(model, data, latents, tmp_path, steps, batch=7, progress=False)
    assert paths.shape == (len(latents), steps, 1, 2) and paths.dtype == np.float32 and not paths.flags.writeable
    for start, L in zip(data.starts, data.lengths):
        for t in range(L + 1):
            place = data.states[start + t].copy()
            for k in range(steps):
                if t + k >= L: assert np.isnan(paths[start + t, k]).all()
                else:
                    place += .5 * moves_of(np.asarray(data.actions))[start + t + k]
                    assert np.allclose(paths[start + t, k, 0], place, atol=1e-5)


def test_paths_are_made_once_for_each_model_length_and_type(data, tmp_path):
    latents, model = data.states[:, None].astype(np.float32), Drift(.5)
    first, calls = predict_dataset(model, data, latents, tmp_path, progress=False), model.calls
    again = predict_dataset(model, data, latents, tmp_path, progress=False)
    assert isinstance(again, np.memmap) and model.calls == calls and np.array_equal(first, again, equal_nan=True)
    predict_dataset(Drift(.7), data, latents, tmp_path, progress=False)
    one = predict_dataset(model, data, latents, tmp_path, steps=1, progress=False)
    half = predict_dataset(model, data, latents.astype(np.float16), tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert np.array_equal(one, first[:, :1], equal_nan=True) and half.dtype == np.float16 and np.allclose(half, first, atol=2e-2, equal_nan=True)


def test_half_a_cache_is_never_left_and_a_broken_one_is_made_again(data, tmp_path, monkeypatch):
    latents, model = data.states[:, None].astype(np.float32), Drift()
    with pytest.raises(EvaluationError, match="not finite"): predict_dataset(Drift(math.nan), data, latents, tmp_path, progress=False)
    assert os.listdir(tmp_path) == []
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(LatentsError, match="No space left"): predict_dataset(model, data, latents, tmp_path, progress=False)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    whole = np.array(predict_dataset(model, data, latents, tmp_path, progress=False))
    path = next(tmp_path.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:200])
    assert np.array_equal(predict_dataset(model, data, latents, tmp_path, progress=False), whole, equal_nan=True)


def test_steps_are_those_of_plain_windows_and_never_cross_an_end(data):
    latents = data.states[:, None].astype(np.float32)
    episodes, marked = np.array([0, 2, 3]), -np.arange(len(latents), dtype=np.float32)[:, None, None, None].repeat(2, 3)
    steps, plain = RewardWindows(data, episodes, latents), Windows(data, episodes, 1, latents=latents)
    ours, theirs = everything(steps), everything(plain)
    assert len(steps) == sum(LENGTHS[e] for e in episodes)
    for name in ("latents", "actions", "rewards", "terminated"): assert torch.equal(getattr(ours, name), getattr(theirs, name))
    told = everything(RewardWindows(data, episodes, latents, marked)).latents
    assert torch.equal(told[:, 0], ours.latents[:, 0]) and torch.equal(told[:, 1, 0, 0], -torch.from_numpy(steps.begin).float())
    for wrong in (marked[:-1], marked[..., :1], marked[:, 0]):
        with pytest.raises(EvaluationError, match="predict this dataset anew"): RewardWindows(data, episodes, latents, wrong)


def test_longer_paths_stay_in_their_episode(data, tmp_path):
    latents, episodes = data.states[:, None].astype(np.float32), np.array([0, 1, 2, 3])
    windows = RewardWindows(data, episodes, latents, predict_dataset(Drift(), data, latents, tmp_path, steps=3, progress=False))
    assert len(windows) == sum(max(LENGTHS[e] - 2, 0) for e in episodes)
    ours, theirs = everything(windows), everything(Windows(data, episodes, 3, latents=latents))
    assert ours.latents.shape == (len(windows), 4, 1, 2) and torch.allclose(ours.latents, theirs.latents, atol=1e-5)        # a perfect model
    for name in ("actions", "rewards", "terminated"): assert torch.equal(getattr(ours, name), getattr(theirs, name))
    head = RewardMLP((1, 2), data.spec.action, **PLAIN).fit_normalization(windows)
    losses = [head.loss(Batch(None, ours.actions[:, k:k + 1], ours.rewards[:, k:k + 1], None, latents=ours.latents[:, k:k + 2])).total for k in range(3)]
    assert torch.allclose(head.loss(ours).total, torch.stack(losses).mean())


def test_without_a_hidden_layer_the_head_is_least_squares(data, monkeypatch):
    latents = data.states[:, None].astype(np.float32)
    windows = RewardWindows(data, np.arange(len(LENGTHS)), latents)
    noisy = np.asarray(data.rewards) + np.random.default_rng(1).normal(size=len(latents)).astype(np.float32)
    monkeypatch.setattr(data, "rewards", noisy)
    head, batch = RewardMLP((1, 2), data.spec.action, hidden=()).fit_normalization(windows), everything(windows)
    fit(head, lambda step: batch, TrainingSettings(steps=300, learning_rate=.05, weight_decay=0.))
    act = batch.actions[:, 0] if batch.actions.ndim == 3 else nn.functional.one_hot(batch.actions[:, 0], 3).float()
    design = torch.cat([batch.latents[:, 0, 0], act, torch.ones(len(act), 1)], 1).double()
    target = torch.from_numpy(noisy[windows.begin]).double()
    by_hand = design @ torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    assert (head(batch.latents, batch.actions) - by_hand).abs().max() < .02 * target.std()


@pytest.mark.parametrize("action", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_the_ablation_learns_nothing_of_a_reward_that_the_action_makes(action, tmp_path):
    data = write(tmp_path / "set", action, lambda s, move, after: np.abs(move).sum(1) * move[:, 0])
    windows = RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None])
    with_action, without = (learn(RewardMLP((1, 2), action, use_action=use, hidden=(16,), dropout=0.), windows, 200) for use in (True, False))
    assert ratio(with_action, windows) < .05 and ratio(without, windows) > .7       # even on the steps it was trained on
    batch = everything(windows)
    other = batch.actions.flip(0)
    assert torch.equal(without(batch.latents, batch.actions), without(batch.latents, other)) and not torch.equal(with_action(batch.latents, batch.actions), with_action(batch.latents, other))


@pytest.mark.parametrize("size", [1., .02])
def test_looking_ahead_sees_what_only_the_next_latent_says_however_small_the_change(size, tmp_path):
    data = write(tmp_path / "set", CONTINUOUS)
    latents, hidden = data.states[:, None], np.random.default_rng(5).normal(size=(len(data.states), 1, 2)).astype(np.float32)
    data.rewards = hidden[:, 0, 0]                                          # the reward is in the prediction and nowhere else
    windows = RewardWindows(data, np.arange(len(LENGTHS)), latents, (latents + np.float32(size) * hidden)[:, None])
    assert ratio(learn(LookAheadRewardPredictor((1, 2), CONTINUOUS, **PLAIN), windows), windows) < .05
    assert ratio(learn(RewardMLP((1, 2), CONTINUOUS, hidden=(8,), dropout=0.), windows, 100), windows) > .5


def test_the_reward_mlp_never_looks_at_the_latent_a_step_leads_to(data):
    latents = data.states[:, None].astype(np.float32)
    windows, batch = RewardWindows(data, np.arange(4), latents), everything(RewardWindows(data, np.arange(4), latents))
    head, larp = (kind((1, 2), data.spec.action, **PLAIN).fit_normalization(windows).eval() for kind in (RewardMLP, LookAheadRewardPredictor))
    other = torch.stack([batch.latents[:, 0], batch.latents[:, 1] + 5], 1)
    assert torch.equal(head(other, batch.actions), head(batch.latents, batch.actions))
    assert not torch.allclose(larp(other, batch.actions), larp(batch.latents, batch.actions))


def test_saying_the_mean_costs_one_and_answers_are_in_units_of_reward(data):
    windows = RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None])
    head = RewardMLP((1, 2), data.spec.action, **PLAIN).fit_normalization(windows)
    nn.init.zeros_(head.read[-1].weight); nn.init.zeros_(head.read[-1].bias)
    rewards = torch.from_numpy(np.asarray(data.rewards)[windows.begin]).double()
    assert ratio(head, windows) == pytest.approx(1, abs=1e-5)
    batch = everything(windows)
    assert torch.allclose(head(batch.latents, batch.actions), rewards.mean().float().expand(len(rewards), 1))
    nn.init.ones_(head.read[-1].bias)
    assert torch.allclose(head(batch.latents, batch.actions), (rewards.mean() + rewards.std(correction=0)).float().expand(len(rewards), 1))


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-50, 50), st.floats(1e-3, 1e3), st.booleans())
def test_scales_of_latents_and_rewards_do_not_matter(unit, shift, scale, ahead):
    from types import SimpleNamespace
    g = np.random.default_rng(0)
    z, r = g.normal(size=(40, 1, 3)).astype(np.float32), g.normal(size=40).astype(np.float32)
    def calibrated(z, r):
        data = SimpleNamespace(frames=z, starts=np.array([0]), lengths=np.array([39]), actions=g.normal(size=(40, 2)).astype(np.float32) * 0, rewards=r, terminated=r > 9)
        torch.manual_seed(0)
        windows = RewardWindows(data, np.array([0]), z)
        head = (LookAheadRewardPredictor if ahead else RewardMLP)((1, 3), CONTINUOUS, **PLAIN).fit_normalization(windows).eval()
        return head(everything(windows).latents, everything(windows).actions).detach()
    plain, other = calibrated(z, r), calibrated(scale * z + scale * shift, unit * r + unit * shift)
    assert torch.allclose(unit * plain + unit * shift, other, rtol=1e-3, atol=2e-2 * unit)


def test_a_coordinate_that_does_not_vary_is_never_looked_at(data):
    latents = np.concatenate([data.states[:, None], np.full((len(data.states), 1, 1), .7)], 2).astype(np.float32)
    windows = RewardWindows(data, np.arange(4), latents)
    for kind in (RewardMLP, LookAheadRewardPredictor):
        head, batch = kind((1, 3), data.spec.action, **PLAIN).fit_normalization(windows).eval(), everything(windows)
        elsewhere = batch.latents.clone(); elsewhere[..., 2] = 1e6 * torch.arange(len(elsewhere))[:, None, None]
        assert torch.equal(head(elsewhere, batch.actions), head(batch.latents, batch.actions))


@pytest.mark.parametrize("value", [0., 1., -1e6, 1e-30])
def test_a_constant_reward_is_refused_in_one_sentence(value, tmp_path):
    data = write(tmp_path / "set", pay=lambda s, move, after: np.full(len(s), value))
    windows = RewardWindows(data, np.arange(4), data.states[:, None])
    for kind in (RewardMLP, LookAheadRewardPredictor):
        with pytest.raises(ConstantReward, match=r"earn .*standard deviation 0.*leave reward heads out"): kind((1, 2), CONTINUOUS).fit_normalization(windows)
    assert issubclass(ConstantReward, EvaluationError)


def test_a_rare_reward_is_not_a_constant_one_and_only_training_steps_count(tmp_path):
    data = write(tmp_path / "set", pay=lambda s, move, after: np.zeros(len(s)))
    rare = np.zeros(len(data.rewards), np.float32); rare[data.starts[2] + 3] = 1
    data.rewards = rare
    n = sum(LENGTHS)
    mean, std = reward_scale(RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None]))
    assert mean == pytest.approx(1 / n) and std == pytest.approx(math.sqrt((1 - 1 / n) / n))
    last = np.zeros(len(rare), np.float32); last[data.starts[0] + LENGTHS[0] - 1] = 1     # paid for the last step of an episode, which begins no path of two
    data.rewards = last
    two = reward_scale(Windows(data, np.array([0]), 2))
    assert two == reward_scale(Windows(data, np.array([0]), 1)) == pytest.approx((1 / 6, math.sqrt(5) / 6))
    data.rewards = rare
    with pytest.raises(ConstantReward): reward_scale(RewardWindows(data, np.array([0, 1, 3]), data.states[:, None]))
    rare[data.starts[2] + 3] = np.nan
    with pytest.raises(EvaluationError, match="not finite"): reward_scale(RewardWindows(data, np.arange(4), data.states[:, None]))


def test_latents_that_are_not_finite_are_refused(data):
    latents = data.states[:, None].astype(np.float32).copy(); latents[3] = np.inf
    with pytest.raises(EvaluationError, match="not finite"): RewardMLP((1, 2), data.spec.action).fit_normalization(RewardWindows(data, np.arange(4), latents))


def test_batch_norm_stands_before_each_activation_and_refuses_a_batch_of_one(data):
    kinds = [type(layer).__name__ for layer in reader([4, 8, 8, 1], "tanh", batch_norm=True, dropout=.1)]
    assert kinds == ["Linear", "BatchNorm1d", "Tanh", "Dropout"] * 2 + ["Linear"]
    windows = RewardWindows(data, np.arange(4), data.states[:, None])
    head = RewardMLP((1, 2), data.spec.action, hidden=(8,), batch_norm=True).fit_normalization(windows)
    with pytest.raises(EvaluationError, match="at least two"): head.loss(windows.batch(np.array([0])))
    assert head.loss(windows.batch(np.array([0, 1]))).total.isfinite() and head.eval().loss(windows.batch(np.array([0]))).total.isfinite()


@pytest.mark.parametrize("how", [dict(), dict(batch_norm=True), dict(activation="silu", dropout=0.)])
@pytest.mark.parametrize("kind", [RewardMLP, LookAheadRewardPredictor])
def test_a_saved_head_answers_the_same(kind, how, data, tmp_path):
    windows = RewardWindows(data, np.arange(4), data.states[:, None])
    head = learn(kind((1, 2), data.spec.action, hidden=(8, 8), **how), windows, steps=5)
    save_weights(head, tmp_path / "head.safetensors")
    fresh = kind((1, 2), data.spec.action, hidden=(8, 8), **how)
    load_weights(fresh, tmp_path / "head.safetensors")
    batch = everything(windows)
    assert torch.equal(fresh.eval()(batch.latents, batch.actions), head(batch.latents, batch.actions))


def paths(data, T=5, n=64):
    windows = Windows(data, np.arange(len(LENGTHS)), T, latents=data.states[:, None].astype(np.float32))
    chosen, episode = independent_windows(windows, n)
    return list(rollout_batches(windows, chosen, size=10)), episode


def heads_of(data, gain=1.):
    states = data.states[:, None].astype(np.float32)
    predicted = (states + gain * moves_of(np.asarray(data.actions))[:, None])[:, None]
    built = {}
    for name, kind, after in (("reward_mlp", RewardMLP, predicted), ("larp", LookAheadRewardPredictor, predicted), ("oracle", RewardMLP, None), ("oracle-ahead", LookAheadRewardPredictor, None)):
        torch.manual_seed(1)
        built[name] = kind((1, 2), data.spec.action, **PLAIN).fit_normalization(RewardWindows(data, np.arange(8), states, after)).eval()
    return {n: built[n] for n in ("reward_mlp", "larp")}, {n: built[n] for n in ("oracle", "oracle-ahead")}


def test_rewards_along_a_path_by_hand(data):
    model, (heads, oracles), (batches, _) = Drift(.8), heads_of(data, .8), paths(data)
    mse = reward_errors(model, heads, batches, [1, 3, 4], oracles).values["mse"]
    row, batch = 0, batches[0]
    z = batch.latents[row, 1]                                              # the second latent of the window is the present
    for k in range(1, 5):
        action = batch.actions[row:row + 1, k:k + 1]
        ahead = Drift(.8).rollout(z[None, None], action[:, :0], action)[0, 0]
        pair, truth = torch.stack([z, ahead])[None], batch.rewards[row, k]
        states = batch.states[row:row + 1, k:k + 2, None]
        if k in (1, 3, 4):
            column = [1, 3, 4].index(k)
            for name, head in heads.items(): assert mse[name][row, column] == pytest.approx((head(pair, action)[0, 0] - truth).square().item(), rel=1e-3, abs=1e-6)
            for name, head in oracles.items(): assert mse[f"floor:{name}"][row, column] == pytest.approx((head(states, action)[0, 0] - truth).square().item(), rel=1e-3, abs=1e-6)
            assert mse["floor:last-reward"][row, column] == pytest.approx((batch.rewards[row, 0] - truth).square().item(), rel=1e-4, abs=1e-7)
            assert mse["floor:mean-reward"][row, column] == pytest.approx((heads["reward_mlp"].centre - truth).square().item(), rel=1e-4, abs=1e-7)
        z = ahead


def test_with_a_perfect_model_heads_are_oracles_at_every_horizon(data):
    heads, oracles = heads_of(data)
    mse = reward_errors(Drift(), heads, paths(data)[0], [1, 2, 3, 4], oracles).values["mse"]
    for name, oracle in (("reward_mlp", "floor:oracle"), ("larp", "floor:oracle-ahead")): assert torch.allclose(mse[name], mse[oracle], rtol=1e-2, atol=1e-4)
    wrong = reward_errors(Drift(-1.), heads, paths(data)[0], [1, 4], oracles).values["mse"]
    assert torch.allclose(wrong["reward_mlp"][:, 0], mse["reward_mlp"][:, 0]) and not torch.allclose(wrong["larp"][:, 0], mse["larp"][:, 0])   # the first step needs no model
    assert not torch.allclose(wrong["reward_mlp"][:, 1], mse["reward_mlp"][:, 3])


def test_an_error_does_not_depend_on_how_far_is_asked(data):
    heads, _ = heads_of(data)
    near, far = (reward_errors(Drift(.5), heads, paths(data)[0], horizons).values["mse"] for horizons in ([1, 2], [4, 2, 1]))
    for name in near: assert torch.allclose(near[name], far[name][:, [2, 1]], atol=1e-6)


def test_a_path_begins_with_the_present_and_goes_where_the_model_goes():
    z, actions = torch.randn(4, 1, 2), torch.randn(4, 3, 2)
    path = path_ahead(Drift(), z, actions)
    assert path.shape == (4, 4, 1, 2) and torch.equal(path[:, 0], z) and torch.allclose(path[:, 3, 0], z[:, 0] + actions.sum(1), atol=1e-6)


class Accent(Drift):
    "Knows every move. All it says is shifted, always alike, and it understands its own words by their third number."
    def rollout(self, z, past_actions, actions):
        shift = torch.tensor([3., 0, 4])
        plain = super().rollout((z - (z[..., 2:] > 2) * shift)[..., :2], past_actions, actions)
        return nn.functional.pad(plain, (0, 1)) + shift


def test_heads_trained_on_paths_of_two_understand_predictions_of_predictions(tmp_path):
    data = write(tmp_path / "set", CONTINUOUS, lambda s, move, after: move[:, 0])
    latents = np.pad(data.states, ((0, 0), (0, 1)))[:, None]
    windows = Windows(data, np.arange(len(LENGTHS)), 5, latents=latents)
    heads = {}
    for P in (1, 2):
        steps = RewardWindows(data, np.arange(len(LENGTHS)), latents, predict_dataset(Accent(), data, latents, tmp_path, P, progress=False))
        heads[f"paths of {P}"] = learn(LookAheadRewardPredictor((1, 3), CONTINUOUS, use_action=False, **PLAIN), steps)
    mse = {who: error.mean(0) for who, error in reward_errors(Accent(), heads, [everything(windows)], [1, 2, 4]).values["mse"].items()}
    assert mse["paths of 1"][0] < .1 * mse["floor:mean-reward"][0] and mse["paths of 1"][1:].min() > mse["floor:mean-reward"].max()
    assert (mse["paths of 2"] < .1 * mse["floor:mean-reward"]).all()


def test_byte_states_serve_oracles(data):
    states = (np.asarray(data.states) * 10 + 128).clip(0, 255).astype(np.uint8)
    windows = RewardWindows(data, np.arange(8), states[:, None])
    assert everything(windows).latents.dtype == torch.float32
    assert ratio(learn(RewardMLP((1, 2), data.spec.action, **PLAIN), windows), windows) < .2


@pytest.mark.parametrize("horizons", [[], [0], [5], [1, 9]])
def test_horizons_that_do_not_fit_are_refused(horizons, data):
    heads, _ = heads_of(data)
    with pytest.raises(EvaluationError, match="evaluation.horizons"): reward_errors(Drift(), heads, paths(data)[0], horizons)


def test_nothing_to_evaluate_is_refused(data):
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): reward_errors(Drift(), heads_of(data)[0], [], [1])


def test_rows_are_tidy_and_ratios_are_paired(data):
    heads, oracles = heads_of(data)
    blind = RewardMLP((1, 2), data.spec.action, use_action=False, **PLAIN).fit_normalization(RewardWindows(data, np.arange(8), data.states[:, None])).eval()
    batches, episode = paths(data)
    errors = reward_errors(Drift(.5), heads | {"mlp-blind": blind}, batches, [1, 4], oracles)
    rows = reward_rows(errors, "Drift-v0", "jepa", seed=3, resamples=200, groups=episode)
    assert all(list(row) == ["env", "model", "protocol", "metric", "horizon", "seed", "value", "low", "high", "n"] for row in rows)
    assert {(row["env"], row["protocol"], row["seed"], row["n"]) for row in rows} == {("Drift-v0", "reward", 3, len(episode))}
    models = ["jepa reward_mlp", "jepa larp", "jepa mlp-blind", "floor:oracle", "floor:oracle-ahead", "floor:mean-reward", "floor:last-reward"]
    assert list(dict.fromkeys(row["model"] for row in rows)) == models
    assert len({tuple(list(row.values())[:6]) for row in rows}) == len(rows) == 2 * (2 * 7 + 2)
    found = {(row["model"], row["metric"], row["horizon"]): row for row in rows}
    floor = found["floor:mean-reward", "mse_ratio", 4]
    assert (floor["value"], floor["low"], floor["high"]) == (1, 1, 1)
    for name in ("larp", "mlp-blind"):
        row = found[f"jepa {name}", "mse_vs_mlp", 4]
        assert row["value"] == pytest.approx(errors.values["mse"][name][:, 1].mean().item() / errors.values["mse"]["reward_mlp"][:, 1].mean().item()) and row["low"] <= row["value"] <= row["high"]
    assert not any(row["metric"] == "mse_vs_mlp" for row in rows if "reward_mlp" in row["model"].split() or row["model"].startswith("floor:"))


def test_a_floor_without_error_gives_no_ratio_and_no_crash():
    zero, some = torch.zeros(6, 1).double(), torch.rand(6, 1).double()
    rows = reward_rows(RolloutErrors([1], {"mse": {"larp": some, "floor:mean-reward": zero}}), "e", "m", resamples=20)
    found = {(row["model"], row["metric"]): row["value"] for row in rows}
    assert math.isnan(found["m larp", "mse_ratio"]) and found["floor:mean-reward", "mse"] == 0 and ("m larp", "mse_vs_mlp") not in found
