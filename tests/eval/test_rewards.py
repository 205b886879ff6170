"Reward heads: no encoder call in training, closed forms, the ablation, paths, rewards nobody can predict."
import errno
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worldmodels_nb.data.datasets import Windows, open_dataset, sample_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.eval.latents import LatentsError, encode_dataset
from worldmodels_nb.eval.results import EvaluationError, Source, independent_windows
from worldmodels_nb.eval.rewards import (
    LAST_REWARD,
    MEAN_REWARD,
    ConstantReward,
    LookAheadRewardPredictor,
    RewardMLP,
    RewardWindows,
    predict_dataset,
    reward_errors,
    reward_horizons,
    reward_mlp_net,
    reward_results,
    reward_rows,
    reward_scale,
)
from worldmodels_nb.eval.rollouts import roll_ahead, rollout_batches
from worldmodels_nb.models import encdec, jepa  # noqa: F401  (they register themselves)
from worldmodels_nb.models.base import WorldModel, build_model
from worldmodels_nb.settings import EvaluationSettings, TrainingSettings, make_settings
from worldmodels_nb.training.fit import fit, freeze, load_weights, save_weights
from worldmodels_nb.training.parts import train

LARP, REWARD_MLP = Source("model", "larp"), Source("model", "reward_mlp")
CONTINUOUS, DISCRETE = ActionSpec("continuous", 2, [-1, -1], [1, 1]), ActionSpec("discrete", 3, None, None)
KINDS = (RewardMLP, LookAheadRewardPredictor)
PLAIN = dict(hidden=(32,), dropout=0.)
LENGTHS = [6, 1, 9, 4] + [8] * 8
SIZES = {"encoder.patch": {"channels": 4}, "model": {"latent_dim": 8},
         "decoder": {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8}}


@pytest.fixture(autouse=True)
def one_thread():
    "These networks are too small to share."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moves_of(actions):
    "Each action as a step in the plane."
    if actions.ndim and actions.dtype.kind == "f": return actions
    return np.array([[1., 0], [0, 1], [-1, -1]], np.float32)[actions]


class Drift(WorldModel):
    "Latent = state = a place in the plane, in one token; every action is added to it, times `gain`."
    def __init__(self, gain=1.):
        nn.Module.__init__(self)
        self.gain = nn.Parameter(torch.tensor(gain), requires_grad=False)
        self.frame_stack, self.latent_shape, self.calls = 1, (1, 2), 0

    def encode(self, frames): raise AssertionError("nothing is to be encoded")

    def rollout(self, z, past_actions, actions):
        assert past_actions.shape[1] == z.shape[1] - 1 == 0
        self.calls += 1
        steps = torch.from_numpy(moves_of(actions.numpy()))
        return z[:, -1:] + self.gain * steps.cumsum(1)[:, :, None]


def write(folder, action=CONTINUOUS, pay=None, seed=0, dtype=np.float32):
    "Walks of `LENGTHS` steps, paid by `pay(state, move, next state)`, or by the next state's first number."
    rng, spec = np.random.default_rng(seed), DataSpec((1, 4, 4), action, ["x", "y"], [0, 1])
    with EpisodeWriter(folder, spec, {"seed": seed, "kind": action.kind}) as writer:
        for L in LENGTHS:
            if action.kind == "continuous": a = rng.uniform(-1, 1, (L, 2)).astype(np.float32)
            else: a = rng.integers(0, 3, L)
            s = np.concatenate([rng.normal(size=(1, 2)), moves_of(a)]).cumsum(0).astype(dtype)
            r = s[1:, 0] if pay is None else pay(s[:-1], moves_of(a), s[1:])
            frames = rng.integers(0, 256, (L + 1, 1, 4, 4), np.uint8)
            writer.add(Episode(frames, a, np.asarray(r, np.float32), False, s))
    return open_dataset(folder)


@pytest.fixture(scope="module", params=["continuous", "discrete"])
def data(request, tmp_path_factory):
    kind = CONTINUOUS if request.param == "continuous" else DISCRETE
    return write(tmp_path_factory.mktemp("rewards") / "set", kind)


def learn(head, windows, steps=250, lr=1e-2, size=64):
    torch.manual_seed(0)
    recipe = TrainingSettings(steps=steps, batch_size=size, learning_rate=lr, weight_decay=0.)
    head = head.fit_normalization(windows)
    return fit(head, lambda step: windows.sample(size, 0, step), recipe).model.eval()


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
    model, encoded, ran = freeze(build_model(name, make_settings(SIZES), data.spec)), [], []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for part in model.modules(): part.register_forward_hook(lambda *_: ran.append(1))
    latents = encode_dataset(model, data, tmp_path, progress=False)
    assert len(encoded) == 1
    paths = predict_dataset(model, data, latents, tmp_path, progress=False)
    data.frames = Unread(len(latents))
    recipe = TrainingSettings(steps=6, batch_size=8, validate_every=3, checkpoint_every=6)
    encoded.clear()
    ran.clear()
    for kind in KINDS:
        windows = [RewardWindows(data, part, latents, paths) for part in (np.arange(6), np.arange(6, 8))]
        head = kind(model.latent_shape, data.spec.action, hidden=(8,)).fit_normalization(windows[0])
        assert train(head, *windows, recipe, tmp_path / kind.__name__, progress=False)["steps"] == 6
    assert (len(encoded), len(ran)) == (0, 0)


def test_a_pixel_models_predictions_encode_each_decoded_frame_once(tmp_path):
    data, seen = sample_dataset(), []
    model = freeze(build_model("encdec", make_settings(SIZES), data.spec))
    latents = encode_dataset(model, data, tmp_path, progress=False)
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    for _ in range(2): predict_dataset(model, data, latents, tmp_path, steps=3, progress=False)
    assert sum(seen) == 3 * len(latents)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_paths_equal_those_made_one_by_one_and_end_with_their_episode(data, steps, tmp_path):
    latents, model = data.states[:, None].astype(np.float32), Drift(.5)
    paths = predict_dataset(model, data, latents, tmp_path, steps, batch=7, progress=False)
    assert paths.shape == (len(latents), steps, 1, 2) and paths.dtype == np.float32
    assert not paths.flags.writeable
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
    assert isinstance(again, np.memmap) and model.calls == calls
    assert np.array_equal(first, again, equal_nan=True)
    predict_dataset(Drift(.7), data, latents, tmp_path, progress=False)
    one = predict_dataset(model, data, latents, tmp_path, steps=1, progress=False)
    half = predict_dataset(model, data, latents.astype(np.float16), tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert np.array_equal(one, first[:, :1], equal_nan=True)
    assert half.dtype == np.float16 and np.allclose(half, first, atol=2e-2, equal_nan=True)


def test_half_a_cache_is_never_left_and_a_broken_one_is_made_again(data, tmp_path, monkeypatch):
    latents, model = data.states[:, None].astype(np.float32), Drift()
    with pytest.raises(EvaluationError, match="not finite"):
        predict_dataset(Drift(math.nan), data, latents, tmp_path, progress=False)
    assert os.listdir(tmp_path) == []
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    for rename in ("replace", "rename"): monkeypatch.setattr(os, rename, full)
    with pytest.raises(LatentsError, match="No space left"):
        predict_dataset(model, data, latents, tmp_path, progress=False)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    whole = np.array(predict_dataset(model, data, latents, tmp_path, progress=False))
    path = next(tmp_path.glob("*.npy"))
    path.write_bytes(path.read_bytes()[:200])
    again = predict_dataset(model, data, latents, tmp_path, progress=False)
    assert np.array_equal(again, whole, equal_nan=True)


def test_steps_are_those_of_plain_windows_and_never_cross_an_end(data):
    latents = data.states[:, None].astype(np.float32)
    episodes = np.array([0, 2, 3])
    marked = -np.arange(len(latents), dtype=np.float32)[:, None, None, None].repeat(2, 3)
    steps, plain = RewardWindows(data, episodes, latents), Windows(data, episodes, 1, latents=latents)
    ours, theirs = everything(steps), everything(plain)
    assert len(steps) == sum(LENGTHS[e] for e in episodes)
    for name in ("latents", "actions", "rewards", "terminated"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    shown = everything(RewardWindows(data, episodes, latents, marked)).latents
    assert torch.equal(shown[:, 0], ours.latents[:, 0])
    assert torch.equal(shown[:, 1, 0, 0], -torch.from_numpy(steps.begin).float())
    for wrong in (marked[:-1], marked[..., :1], marked[:, 0]):
        with pytest.raises(EvaluationError, match="predict this dataset anew"):
            RewardWindows(data, episodes, latents, wrong)


def test_every_step_is_learnt_from_once_at_each_place_of_a_path(data, tmp_path):
    latents, episodes = data.states[:, None].astype(np.float32), np.array([0, 1, 2, 3])
    ahead = predict_dataset(Drift(), data, latents, tmp_path, steps=3, progress=False)
    windows = RewardWindows(data, episodes, latents, ahead)
    want = [(place, data.starts[e] + t) for place in range(3) for e in episodes
            for t in range(place, LENGTHS[e])]
    assert sorted(zip(windows.place, windows.begin)) == sorted(want)
    ours, rows = everything(windows), windows.begin
    assert ours.latents.shape == (len(want), 2, 1, 2) and ours.rewards.shape == (len(want), 1)
    assert torch.allclose(ours.latents[:, 0], torch.from_numpy(latents[rows]), atol=1e-5)  # it is right
    assert torch.allclose(ours.latents[:, 1], torch.from_numpy(latents[rows + 1]), atol=1e-5)
    for name in ("actions", "rewards", "terminated"):
        assert torch.equal(getattr(ours, name)[:, 0], torch.from_numpy(np.asarray(getattr(data, name)[rows])))
    last = np.isin(rows, (data.starts + data.lengths - 1)[episodes])
    assert [int((last & (windows.place == k)).sum()) for k in range(3)] == [4, 3, 3]   # one has a single step


@pytest.mark.parametrize("picked", [[0, 2, 3], [1, 5, 4]])
def test_a_step_at_a_later_place_begins_where_the_path_has_come_to(picked, data, tmp_path):
    latents, rows = data.states[:, None].astype(np.float32), data.frame_indices(np.array(picked))
    ahead = np.array(predict_dataset(Drift(.5), data, latents, tmp_path, 3, progress=False, rows=rows))
    windows = RewardWindows(data, np.array(picked), latents, ahead, rows)
    batch = everything(windows)
    assert batch.latents.isfinite().all()                       # nothing from behind an end
    for i in range(0, len(windows), 5):
        row, k = windows.begin[i], windows.place[i]
        path = ahead[np.flatnonzero(rows == row - k)[0]]
        first = latents[row] if k == 0 else path[k - 1]
        assert np.array_equal(batch.latents[i], np.stack([first, path[k]]))


def test_without_a_hidden_layer_the_head_is_least_squares(data, monkeypatch):
    latents = data.states[:, None].astype(np.float32)
    windows = RewardWindows(data, np.arange(len(LENGTHS)), latents)
    noisy = np.asarray(data.rewards) + np.random.default_rng(1).normal(size=len(latents)).astype(np.float32)
    monkeypatch.setattr(data, "rewards", noisy)
    head = RewardMLP((1, 2), data.spec.action, hidden=()).fit_normalization(windows)
    batch = everything(windows)
    fit(head, lambda step: batch, TrainingSettings(steps=300, learning_rate=.05, weight_decay=0.))
    act = batch.actions[:, 0]
    if act.ndim == 1: act = nn.functional.one_hot(act, 3).float()
    design = torch.cat([batch.latents[:, 0, 0], act, torch.ones(len(act), 1)], 1).double()
    target = torch.from_numpy(noisy[windows.begin]).double()
    by_hand = design @ torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    assert (head(batch.latents, batch.actions) - by_hand).abs().max() < .02 * target.std()


@pytest.mark.parametrize("action", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
def test_the_ablation_learns_nothing_of_a_reward_that_the_action_makes(action, tmp_path):
    data = write(tmp_path / "set", action, lambda s, move, after: np.abs(move).sum(1) * move[:, 0])
    windows = RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None])
    def head(use): return RewardMLP((1, 2), action, use_action=use, hidden=(16,), dropout=0.)
    with_action, without = (learn(head(use), windows, 200) for use in (True, False))
    assert ratio(with_action, windows) < .05 and ratio(without, windows) > .7  # even on what it learnt from
    z, actions = everything(windows).latents, everything(windows).actions
    assert torch.equal(without(z, actions), without(z, actions.flip(0)))
    assert not torch.equal(with_action(z, actions), with_action(z, actions.flip(0)))


@pytest.mark.parametrize("size", [1., .02])
def test_looking_ahead_sees_what_only_the_next_latent_says_however_small_the_change(size, tmp_path):
    data = write(tmp_path / "set", CONTINUOUS)
    latents = data.states[:, None]
    hidden = np.random.default_rng(5).normal(size=(len(data.states), 1, 2)).astype(np.float32)
    data.rewards = hidden[:, 0, 0]                  # the reward is in the prediction and nowhere else
    ahead = (latents + np.float32(size) * hidden)[:, None]
    windows = RewardWindows(data, np.arange(len(LENGTHS)), latents, ahead)
    assert ratio(learn(LookAheadRewardPredictor((1, 2), CONTINUOUS, **PLAIN), windows), windows) < .05
    blind = RewardMLP((1, 2), CONTINUOUS, hidden=(8,), dropout=0.)
    assert ratio(learn(blind, windows, 100), windows) > .5


def test_the_reward_mlp_never_looks_at_the_latent_a_step_leads_to(data):
    latents = data.states[:, None].astype(np.float32)
    windows = RewardWindows(data, np.arange(4), latents)
    batch = everything(windows)
    head, larp = (kind((1, 2), data.spec.action, **PLAIN).fit_normalization(windows).eval() for kind in KINDS)
    other = torch.stack([batch.latents[:, 0], batch.latents[:, 1] + 5], 1)
    assert torch.equal(head(other, batch.actions), head(batch.latents, batch.actions))
    assert not torch.allclose(larp(other, batch.actions), larp(batch.latents, batch.actions))


def test_saying_the_mean_costs_one_and_answers_are_in_units_of_reward(data):
    windows = RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None])
    head = RewardMLP((1, 2), data.spec.action, **PLAIN).fit_normalization(windows)
    nn.init.zeros_(head.read[-1].weight)
    nn.init.zeros_(head.read[-1].bias)
    rewards = torch.from_numpy(np.asarray(data.rewards)[windows.begin]).double()
    assert ratio(head, windows) == pytest.approx(1, abs=1e-5)
    batch = everything(windows)
    def constant(value): return value.float().expand(len(rewards), 1)
    assert torch.allclose(head(batch.latents, batch.actions), constant(rewards.mean()))
    nn.init.ones_(head.read[-1].bias)
    one_up = rewards.mean() + rewards.std(correction=0)
    assert torch.allclose(head(batch.latents, batch.actions), constant(one_up))


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-50, 50), st.floats(1e-3, 1e3), st.booleans())
def test_scales_of_latents_and_rewards_do_not_matter(unit, shift, scale, ahead):
    g = np.random.default_rng(0)
    z, r = g.normal(size=(40, 1, 3)).astype(np.float32), g.normal(size=40).astype(np.float32)
    def answer(z, r):
        actions = g.normal(size=(40, 2)).astype(np.float32) * 0
        data = SimpleNamespace(frames=z, starts=np.array([0]), lengths=np.array([39]), actions=actions,
                               rewards=r, terminated=r > 9)
        torch.manual_seed(0)
        windows = RewardWindows(data, np.array([0]), z)
        head = KINDS[ahead]((1, 3), CONTINUOUS, **PLAIN).fit_normalization(windows).eval()
        return head(everything(windows).latents, everything(windows).actions).detach()
    plain, other = answer(z, r), answer(scale * z + scale * shift, unit * r + unit * shift)
    assert torch.allclose(unit * plain + unit * shift, other, rtol=1e-3, atol=2e-2 * unit)


def test_a_coordinate_that_does_not_vary_is_never_looked_at(data):
    still = np.full((len(data.states), 1, 1), .7)
    latents = np.concatenate([data.states[:, None], still], 2).astype(np.float32)
    windows = RewardWindows(data, np.arange(4), latents)
    for kind in KINDS:
        head = kind((1, 3), data.spec.action, **PLAIN).fit_normalization(windows).eval()
        batch = everything(windows)
        elsewhere = batch.latents.clone()
        elsewhere[..., 2] = 1e6 * torch.arange(len(elsewhere))[:, None, None]
        assert torch.equal(head(elsewhere, batch.actions), head(batch.latents, batch.actions))


@pytest.mark.parametrize("value", [0., 1., -1e6, 1e-30])
def test_a_constant_reward_is_refused_in_one_sentence(value, tmp_path):
    data = write(tmp_path / "set", pay=lambda s, move, after: np.full(len(s), value))
    windows = RewardWindows(data, np.arange(4), data.states[:, None])
    for kind in KINDS:
        with pytest.raises(ConstantReward, match=r"earn .*standard deviation 0.*leave reward heads out"):
            kind((1, 2), CONTINUOUS).fit_normalization(windows)
    assert issubclass(ConstantReward, EvaluationError)


def test_a_rare_reward_is_not_a_constant_one_and_only_training_steps_count(tmp_path):
    data = write(tmp_path / "set", pay=lambda s, move, after: np.zeros(len(s)))
    rare = np.zeros(len(data.rewards), np.float32)
    rare[data.starts[2] + 3] = 1
    data.rewards = rare
    n = sum(LENGTHS)
    mean, std = reward_scale(RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None]))
    assert mean == pytest.approx(1 / n) and std == pytest.approx(math.sqrt((1 - 1 / n) / n))
    last = np.zeros(len(rare), np.float32)
    last[data.starts[0] + LENGTHS[0] - 1] = 1           # an episode's last step, which begins no path of two
    data.rewards = last
    two = reward_scale(Windows(data, np.array([0]), 2))
    assert two == reward_scale(Windows(data, np.array([0]), 1)) == pytest.approx((1 / 6, math.sqrt(5) / 6))
    data.rewards = rare
    def scale(episodes): return reward_scale(RewardWindows(data, np.array(episodes), data.states[:, None]))
    with pytest.raises(ConstantReward): scale([0, 1, 3])
    rare[data.starts[2] + 3] = np.nan
    with pytest.raises(EvaluationError, match="not finite"): scale([0, 1, 2, 3])


def test_latents_that_are_not_finite_are_refused(data):
    latents = data.states[:, None].astype(np.float32).copy()
    latents[3] = np.inf
    head, windows = RewardMLP((1, 2), data.spec.action), RewardWindows(data, np.arange(4), latents)
    with pytest.raises(EvaluationError, match="not finite"): head.fit_normalization(windows)


def test_batch_norm_stands_before_each_activation_and_refuses_a_batch_of_one(data):
    kinds = [type(layer).__name__ for layer in reward_mlp_net([4, 8, 8, 1], "tanh", True, .1)]
    assert kinds == ["Linear", "BatchNorm1d", "Tanh", "Dropout"] * 2 + ["Linear"]
    windows = RewardWindows(data, np.arange(4), data.states[:, None])
    head = RewardMLP((1, 2), data.spec.action, hidden=(8,), batch_norm=True).fit_normalization(windows)
    with pytest.raises(EvaluationError, match="at least two"): head.loss(windows.batch(np.array([0])))
    assert head.loss(windows.batch(np.array([0, 1]))).total.isfinite()
    assert head.eval().loss(windows.batch(np.array([0]))).total.isfinite()


@pytest.mark.parametrize("how", [dict(), dict(batch_norm=True), dict(activation="silu", dropout=0.)])
@pytest.mark.parametrize("kind", KINDS)
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
    for names, after in ((("reward_mlp", "larp"), predicted), (("oracle", "oracle_ahead"), None)):
        for name, kind in zip(names, KINDS):
            torch.manual_seed(1)
            windows = RewardWindows(data, np.arange(8), states, after)
            built[name] = kind((1, 2), data.spec.action, **PLAIN).fit_normalization(windows).eval()
    return {n: built[n] for n in ("reward_mlp", "larp")}, {n: built[n] for n in ("oracle", "oracle_ahead")}


def own(name): return Source("model", name)


def oracle(name): return Source("reference", name, False)


def by_horizon(model, heads, data, horizons, oracles=None, before=1):
    "Errors of windows that are as long as each horizon asks for."
    found = {}
    for k in horizons:
        batches, _ = paths(data, before + k)
        found[k] = reward_errors(model, heads, batches, k, oracles)
    return found


@pytest.mark.parametrize("before", [1, 2])
def test_rewards_along_a_path_by_hand(before, data):
    model, (heads, oracles) = Drift(.8), heads_of(data, .8)
    for k, found in by_horizon(model, heads, data, [1, 3, 4], oracles, before).items():
        batch, row = paths(data, before + k)[0][0], 0
        z, t = batch.latents[row, before], before + k - 1
        for i in range(before, t + 1):
            present, action = z, batch.actions[row:row + 1, i:i + 1]
            z = model.rollout(z[None, None], action[:, :0], action)[0, 0]
        pair, truth = torch.stack([present, z])[None], batch.rewards[row, t]
        states = batch.states[row:row + 1, t:t + 2, None]
        def off(said, truth=truth): return pytest.approx((said - truth).square().item(), rel=1e-3, abs=1e-6)
        for name, head in heads.items(): assert found[own(name)][row] == off(head(pair, action)[0, 0])
        for name, head in oracles.items(): assert found[oracle(name)][row] == off(head(states, action)[0, 0])
        assert found[LAST_REWARD][row] == off(batch.rewards[row, before - 1])
        assert found[MEAN_REWARD][row] == off(heads["reward_mlp"].centre)


def test_with_a_perfect_model_heads_are_oracles_at_every_horizon(data):
    heads, oracles = heads_of(data)
    right = by_horizon(Drift(), heads, data, [1, 2, 3, 4], oracles)
    for mse in right.values():
        for name, like in (("reward_mlp", "oracle"), ("larp", "oracle_ahead")):
            assert torch.allclose(mse[own(name)], mse[oracle(like)], rtol=1e-2, atol=1e-4)
    wrong = by_horizon(Drift(-1.), heads, data, [1, 4], oracles)
    assert torch.allclose(wrong[1][REWARD_MLP], right[1][REWARD_MLP])       # the first step needs no model
    assert not torch.allclose(wrong[1][LARP], right[1][LARP])
    assert not torch.allclose(wrong[4][REWARD_MLP], right[4][REWARD_MLP])


class Looks(Drift):
    "Looks at three latents: each of the two before the present adds a tenth of itself."
    context_length = 3

    def rollout(self, z, past_actions, actions):
        assert past_actions.shape[1] == z.shape[1] - 1 <= 2
        steps = torch.from_numpy(moves_of(actions.numpy())).cumsum(1)[:, :, None]
        return z[:, -1:] + .1 * z[:, :-1].sum(1, keepdim=True) + steps


def test_a_model_that_looks_back_gets_the_history_there_is(data, tmp_path):
    latents = data.states[:, None].astype(np.float32)
    ahead = predict_dataset(Looks(), data, latents, tmp_path, 2, batch=5, progress=False)
    for start, L in zip(data.starts, data.lengths):
        for t in range(L):
            z = torch.from_numpy(latents[None, start:start + t + 1].copy())
            actions = torch.from_numpy(np.array(data.actions[start:start + min(t + 2, L)]))[None]
            said = roll_ahead(Looks(), z, actions)[0]
            assert np.allclose(ahead[start + t, :len(said)], said, atol=1e-5)
    heads, _ = heads_of(data)
    near, far = (by_horizon(Looks(), heads, data, [2], before=before)[2] for before in (2, 4))
    assert near[LARP].isfinite().all() and far[LARP].isfinite().all()


def ending(folder, lengths):
    "Episodes of these lengths, each of which ends itself."
    rng, spec = np.random.default_rng(0), DataSpec((1, 4, 4), CONTINUOUS, ["x", "y"], [0, 1])
    with EpisodeWriter(folder, spec, {"lengths": list(lengths)}) as writer:
        for L in lengths:
            frames, s = np.zeros((L + 1, 1, 4, 4), np.uint8), rng.normal(size=(L + 1, 2)).astype(np.float32)
            a, r = rng.uniform(-1, 1, (L, 2)).astype(np.float32), rng.normal(size=L).astype(np.float32)
            writer.add(Episode(frames, a, r, True, s))
    return open_dataset(folder)


@pytest.mark.parametrize("history", [1, 2, 4])
def test_ends_of_episodes_are_scored_at_every_horizon(history, tmp_path):
    data = ending(tmp_path / "set", [9, 11, 12, 14, 17, 23, 12, 13])
    latents, seen = data.states[:, None], {}
    class Counting(Windows):
        def batch(self, indices):
            batch = super().batch(indices)
            seen[self.steps] = seen.get(self.steps, 0) + int(batch.terminated[:, -1].sum())
            return batch
    before = max(history - 1, 1)
    def windows_of(h): return Counting(data, np.arange(8), before + h, latents=latents, frames=False)
    horizons = reward_horizons(data, np.arange(8), range(1, 9), history)
    assert horizons == list(range(1, 9))
    s = EvaluationSettings(n_windows=1000, bootstrap=10)
    steps = RewardWindows(data, np.arange(8), latents)
    head = RewardMLP((1, 2), CONTINUOUS, **PLAIN).fit_normalization(steps)
    reward_results(Drift(), dict(reward_mlp=head.eval()), {}, windows_of, horizons, "m", s, 0, "cpu")
    assert seen == {before + h: int((data.lengths >= before + h).sum()) for h in horizons}
    assert min(seen.values()) > 0


class Accent(Drift):
    "Knows every move. All it says is shifted, always alike; it knows its own words by their third number."
    def rollout(self, z, past_actions, actions):
        shift = torch.tensor([3., 0, 4])
        plain = super().rollout((z - (z[..., 2:] > 2) * shift)[..., :2], past_actions, actions)
        return nn.functional.pad(plain, (0, 1)) + shift


def test_heads_trained_on_paths_of_two_understand_predictions_of_predictions(tmp_path):
    data = write(tmp_path / "set", CONTINUOUS, lambda s, move, after: move[:, 0])
    latents = np.pad(data.states, ((0, 0), (0, 1)))[:, None]
    heads = {}
    for P in (1, 2):
        ahead = predict_dataset(Accent(), data, latents, tmp_path, P, progress=False)
        steps = RewardWindows(data, np.arange(len(LENGTHS)), latents, ahead)
        heads[P] = learn(LookAheadRewardPredictor((1, 3), CONTINUOUS, use_action=False, **PLAIN), steps)
    def windows(k): return Windows(data, np.arange(len(LENGTHS)), 1 + k, latents=latents)
    errors = [reward_errors(Accent(), heads, [everything(windows(k))], k) for k in (1, 2, 4)]
    def means(source): return torch.stack([error[source].mean() for error in errors])
    mean, one, two = (means(source) for source in (MEAN_REWARD, own(1), own(2)))
    assert one[0] < .1 * mean[0] and one[1:].min() > mean.max()
    assert (two < .1 * mean).all()


def test_byte_states_serve_oracles(data):
    states = (np.asarray(data.states) * 10 + 128).clip(0, 255).astype(np.uint8)
    windows = RewardWindows(data, np.arange(8), states[:, None])
    assert everything(windows).latents.dtype == torch.float32
    assert ratio(learn(RewardMLP((1, 2), data.spec.action, **PLAIN), windows), windows) < .2


@pytest.mark.parametrize("horizon", [0, 5, 9])
def test_a_horizon_that_does_not_fit_is_refused(horizon, data):
    heads, (batches, _) = heads_of(data)[0], paths(data)
    with pytest.raises(EvaluationError, match="evaluation.horizons"):
        reward_errors(Drift(), heads, batches, horizon)


def test_nothing_to_evaluate_is_refused(data):
    heads, _ = heads_of(data)
    with pytest.raises(EvaluationError, match="evaluation.n_windows"): reward_errors(Drift(), heads, [], 1)


@pytest.mark.parametrize("horizon", [1, 4])
def test_rows_say_whose_they_are_and_a_ratio_equals_its_two_parts(horizon, data):
    heads, oracles = heads_of(data)
    plain = RewardWindows(data, np.arange(8), data.states[:, None])
    blind = RewardMLP((1, 2), data.spec.action, use_action=False, **PLAIN).fit_normalization(plain).eval()
    batches, episode = paths(data, 1 + horizon)
    errors = reward_errors(Drift(.5), heads | {"mlp_blind": blind}, batches, horizon, oracles)
    rows = reward_rows(errors, horizon, "jepa", seed=3, resamples=200, groups=episode)
    what = {(row["protocol"], row["n"], row["horizon"]) for row in rows}
    assert what == {("reward", len(episode), horizon)}
    whose = dict.fromkeys((row["model"], row["kind"], row["head"]) for row in rows)
    assert list(whose) == [("jepa", "model", "reward_mlp"), ("jepa", "model", "larp"),
                           ("jepa", "model", "mlp_blind"),
                           ("", "reference", "oracle"), ("", "reference", "oracle_ahead"),
                           ("", "baseline", "mean_reward"), ("", "baseline", "last_reward")]
    assert {row["unit"] for row in rows if row["metric"] == "mse"} == {"reward²"}
    assert {row["unit"] for row in rows if row["metric"] != "mse"} == {""}
    found = {(row["head"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 7 + 2
    best = min(("mean_reward", "last_reward"), key=lambda name: found[name, "mse"]["value"])
    assert {found[best, "mse_ratio"][key] for key in ("value", "low", "high")} == {1}
    for over, metric in ((best, "mse_ratio"), ("reward_mlp", "mse_vs_mlp")):
        for (head, name), row in found.items():
            if name != metric: continue
            parts = found[head, "mse"]["value"], found[over, "mse"]["value"]
            assert row["value"] == pytest.approx(parts[0] / parts[1])
            assert row["low"] <= row["value"] <= row["high"]
    compared = {(row["kind"], row["head"]) for row in rows if row["metric"] == "mse_vs_mlp"}
    assert compared == {("model", "larp"), ("model", "mlp_blind")}


@pytest.mark.parametrize(("mean", "last", "best"), [(4., 1., 1.), (1., 4., 1.), (2., math.nan, 2.)])
def test_the_ratio_is_over_the_better_of_the_two_baselines(mean, last, best):
    errors = {LARP: 3., MEAN_REWARD: mean, LAST_REWARD: last}
    errors = {source: torch.full((6,), value).double() for source, value in errors.items()}
    rows = reward_rows(errors, 1, "m", resamples=20)
    ratio, = [row["value"] for row in rows if row["head"] == "larp" and row["metric"] == "mse_ratio"]
    assert ratio == pytest.approx(3 / best)


@pytest.mark.parametrize("score", [0., math.nan])
def test_a_baseline_without_an_error_gives_no_ratio_and_no_crash(score):
    none, some = torch.full((6,), score).double(), torch.rand(6).double()
    rows = reward_rows({LARP: some, MEAN_REWARD: none}, 1, "m", resamples=20)
    found = {(row["head"], row["metric"]): row["value"] for row in rows}
    assert math.isnan(found["larp", "mse_ratio"])
    assert found["mean_reward", "mse"] == pytest.approx(score, nan_ok=True)
    assert ("larp", "mse_vs_mlp") not in found


def test_results_are_the_rows_of_each_horizons_own_windows(data):
    heads, oracles = heads_of(data)
    latents, rows = data.states[:, None].astype(np.float32), []
    def windows_of(h): return Windows(data, np.arange(4, 12), 1 + h, latents=latents, frames=False)
    s = EvaluationSettings(n_windows=20, bootstrap=50)
    found = reward_results(Drift(.5), heads, oracles, windows_of, [1, 4], "drift", s, seed=2, device="cpu")
    for k in (1, 4):
        chosen, episode = independent_windows(windows_of(k), 20, 2)
        errors = reward_errors(Drift(.5), heads, rollout_batches(windows_of(k), chosen), k, oracles)
        rows += reward_rows(errors, k, "drift", 2, 50, groups=episode)
    assert found == rows
    assert {row["head"] for row in found if row["model"] == "drift"} == {"reward_mlp", "larp"}


def test_horizons_leave_a_step_for_the_last_reward_in_two_episodes(data):
    for history, fits in ((1, [1, 4, 5]), (2, [1, 4, 5]), (4, [1])):          # the second has six steps
        assert reward_horizons(data, np.arange(4), [1, 4, 5, 6, 8], history) == fits
    assert reward_horizons(data, np.array([1, 3]), [1, 4]) == []


WIDE = dict(hidden=(16,), dropout=0., latent_width=8)


def seen_by(head, windows):
    "What the network is given of each step's latents, (n, L, W)."
    inputs = head.inputs(everything(windows).latents)
    return torch.einsum("bplk,lkw->bplw", inputs - head.mean, head.axes)[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 8, 9, 40, 500])
def test_heads_have_as_many_weights_behind_every_latent(width, kind, data):
    def weights(D): return sum(p.numel() for p in kind((1, D), CONTINUOUS, **WIDE).parameters())
    assert weights(width) == weights(8)
    latents = np.random.default_rng(0).normal(size=(len(data.states), 1, width)).astype(np.float32)
    windows = RewardWindows(data, np.arange(len(LENGTHS)), latents)
    head = kind((1, width), data.spec.action, **WIDE).fit_normalization(windows)
    batch = everything(windows)
    x = seen_by(head, windows)
    assert x.shape == (len(windows), kind.latents_per_step, 8) and x.isfinite().all()
    assert (x[..., width:] == 0).all() and (x[..., :min(width, 8)].std(0) > .1).all()
    assert head(batch.latents, batch.actions).isfinite().all()


def widely_turned(z):
    return turned(np.pad(z, ((0, 0), (0, 0), (0, 40))))


def turned(z):
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(z.shape[-1],) * 2))[0]
    return (z.astype(float) @ q).astype(np.float32)


@pytest.mark.parametrize("other", [lambda z: np.tile(z, 8), lambda z: 1e3 * z + 5, lambda z: z / 77, turned,
                                   widely_turned],
                         ids=["copied", "scaled", "shrunk", "turned", "turned in a wide space"])
@pytest.mark.parametrize("kind", KINDS)
def test_copied_scaled_and_turned_latents_are_seen_alike(kind, other, data):
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(len(data.states), 1, 5)) * [4, 2, 1, .3, .05]).astype(np.float32)
    def seen(latents):
        windows = RewardWindows(data, np.arange(len(LENGTHS)), latents)
        head = kind(latents.shape[1:], data.spec.action, **WIDE).fit_normalization(windows)
        return seen_by(head, windows)
    assert torch.allclose(seen(z).abs(), seen(other(z)).abs(), atol=2e-2)      # but for signs


def test_a_small_direction_is_heard_and_none_is_louder_than_a_larger_one(data):
    z = np.random.default_rng(0).normal(size=(len(data.states), 1, 3)) * [1, .1, .01]
    windows = RewardWindows(data, np.arange(len(LENGTHS)), z.astype(np.float32))
    head = RewardMLP((1, 3), data.spec.action, **WIDE).fit_normalization(windows)
    spreads = seen_by(head, windows)[:, 0, :3].std(0, correction=0)
    assert torch.allclose(spreads, torch.tensor([1, .316, .1]), rtol=.2)      # a tenth of it, not a hundredth


def test_what_does_not_vary_and_what_is_only_rounding_is_not_seen(data):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(data.states), 1, 2)).astype(np.float32)
    same = np.concatenate([z, z @ np.float32([[.3, 1], [.7, -2]])], 2)         # four numbers, two directions
    windows = RewardWindows(data, np.arange(len(LENGTHS)), same)
    head = RewardMLP((1, 4), data.spec.action, **WIDE).fit_normalization(windows)
    assert (head.axes[0] != 0).any(0).tolist() == [True] * 2 + [False] * 6


def test_heads_on_states_look_at_them_as_they_are(data):
    windows = RewardWindows(data, np.arange(len(LENGTHS)), data.states[:, None])
    head = RewardMLP((1, 2), data.spec.action, **PLAIN | dict(latent_width=None)).fit_normalization(windows)
    off = head.axes[0][~torch.eye(2, dtype=bool)]
    assert head.axes.shape == (1, 2, 2) and (off == 0).all()
    x = (torch.from_numpy(np.asarray(data.states)[windows.begin]) - head.mean[0]) @ head.axes[0]
    assert torch.allclose(x.std(0, correction=0), torch.ones(2), atol=1e-4)


def test_paths_of_a_real_model_are_its_rollouts(tmp_path):
    data, calls = sample_dataset(), []
    sizes = {"encoder.patch": {"channels": 8}, "model": {"latent_dim": 16}}
    world = freeze(build_model("jepa", make_settings(sizes), data.spec))
    world.encoder.register_forward_hook(lambda *_: calls.append(1))
    encoded = encode_dataset(world, data, tmp_path, progress=False)
    ahead = predict_dataset(world, data, encoded, tmp_path, progress=False)
    steps = RewardWindows(data, np.arange(6), encoded, ahead)
    for kind in KINDS:
        head = kind(encoded.shape[1:], data.spec.action).fit_normalization(steps)
        recipe = TrainingSettings(steps=30)
        assert math.isfinite(fit(head, lambda step: steps.sample(16, 0, step), recipe).losses.total.item())
    assert len(calls) == 1                                                      # for the cache, and no more
    left = np.repeat(data.starts + data.lengths, data.lengths + 1) - np.arange(len(ahead))
    behind = left[:, None] <= np.arange(2)                                      # an episode's end
    assert np.array_equal(np.isnan(ahead).all((2, 3)), behind)
    assert np.array_equal(np.isnan(ahead).any((2, 3)), behind)
    for r in (0, 17, 93):
        z = torch.from_numpy(encoded[r:r + 1].copy())[None]
        actions = torch.from_numpy(data.actions[r:r + 2].copy())[None]
        rolled = world.rollout(z, actions[:, :0], actions)[0, :left[r]].numpy()
        assert np.allclose(rolled, ahead[r, :left[r]], rtol=0, atol=1e-5)
    again = predict_dataset(world, data, encoded, tmp_path, progress=False)
    assert np.array_equal(np.asarray(again)[0], np.asarray(ahead)[0])
