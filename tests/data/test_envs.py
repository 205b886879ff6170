"Area averages keep their light, and every environment becomes the same kind of frames."
import importlib.util
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest

from worldmodels_nb.data.envs import (
    ActionSpec,
    FrameEnv,
    FrameVector,
    action_spec,
    area_mean,
    area_weights,
    can_batch,
    find_spec,
    make_env,
    to_frames,
)
from worldmodels_nb.data.tworooms import EnvError
from worldmodels_nb.settings import EnvSettings

ROOMS = "worldmodels_nb/TwoRooms-v0"


# ---------------------------------------------------------------- resizing

@pytest.mark.parametrize(
    "n, m", [(5, 2), (2, 5), (7, 5), (3, 8), (600, 64), (210, 64), (97, 84), (64, 64), (13, 8)])
def test_area_means_equal_block_means_of_the_picture_blown_up(n, m):
    x = np.random.default_rng(n).random((2, n, 3)).astype(np.float32)
    blown = np.repeat(x, m, axis=1).reshape(2, m, n, 3).mean(2)
    np.testing.assert_allclose(area_mean(x, m), blown, atol=1e-5)
    np.testing.assert_allclose(area_weights(n, m).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 192, 3), (64, 64, 3), (210, 160, 3), (48, 100, 1), (20, 30, 3)])
@pytest.mark.parametrize("grey", [False, True])
def test_frames_keep_mean_and_shape(shape, grey):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    frame = to_frames(image, 32, grey)
    assert frame.shape == (1 if grey else 3, 32, 32) and frame.dtype == np.uint8 and frame.flags.c_contiguous
    weights = [.299, .587, .114] if shape[2] == 3 else [1]
    wanted = [image.mean((0, 1)) @ weights] if grey else np.broadcast_to(image.mean((0, 1)), 3)
    np.testing.assert_allclose(frame.mean((1, 2)), wanted, atol=.1)


def test_a_batch_of_pictures_is_resized_like_each_of_them():
    images = np.random.default_rng(1).integers(0, 256, (2, 4, 50, 70, 3), dtype=np.uint8)
    assert np.array_equal(to_frames(images, 24)[1, 2], to_frames(images[1, 2], 24))


def test_whole_ratios_are_plain_block_means():
    image = np.random.default_rng(2).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    blocks = image.reshape(32, 3, 32, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(to_frames(image, 32) - blocks).max() <= .5 + 1e-3


def test_whole_ratios_grey_and_no_resizing_by_other_forms():
    picture = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    small = to_frames(picture, 4).astype(float)
    blocks = picture.reshape(4, 3, 4, 5, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(small - blocks).max() <= .51
    assert np.array_equal(to_frames(picture[:, :12], 12), picture[:, :12].transpose(2, 0, 1))
    grey = np.tensordot([.299, .587, .114], small, 1)
    assert np.abs(to_frames(picture, 4, grey=True)[0] - grey).max() <= 1.1
    assert to_frames(picture[..., :1], 4).shape == (3, 4, 4)


def test_a_flying_ball_keeps_its_light():
    def light(x):
        image = np.zeros((210, 160, 3), np.uint8)
        image[40 + x // 2:42 + x // 2, x:x + 2] = 255
        return to_frames(image, 64).mean(0).sum() / 255
    lights = [light(x) for x in range(20, 60)]
    assert max(lights) - min(lights) < .02


# ---------------------------------------------------------------- actions and ids

def test_action_specs():
    assert action_spec(gym.spaces.Discrete(5)) == ActionSpec("discrete", 5)
    spec = action_spec(gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)))
    assert spec == ActionSpec("continuous", 2, [-2, 0], [2, 1])
    assert spec.zeros(3).shape == (3, 2) and ActionSpec("discrete", 5).zeros(3).dtype == np.int64
    np.testing.assert_allclose(spec.scale(np.array([[-1, -1], [0, 1], [5, -5]])), [[-2, 0], [0, 1], [2, 0]])


@pytest.mark.parametrize("space", [
    gym.spaces.MultiDiscrete([2, 2]), gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-1, np.inf, (2,)),
    gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1, 1, (2, 2)),
    gym.spaces.Box(0, 5, (2,), np.int64), gym.spaces.Dict(a=gym.spaces.Discrete(2))])
def test_other_actions_are_refused(space):
    with pytest.raises(EnvError, match="not supported.*env.id"): action_spec(space)


@pytest.mark.parametrize("id, words", [
    ("CartPol-v1", ["'env.id'", "CartPol-v1", "CartPole-v1"]), ("TwoRooms-v0", [ROOMS]),
    ("LunarLander-v2", ["LunarLander-v3"]), ("CartPole", ["CartPole-v1"]), ("qqqqqqqq", ["pprint_registry"]),
    ("no_such_module:Env-v0", ["no_such_module"])])
def test_unknown_ids_name_near_ones(id, words):
    with pytest.raises(EnvError) as caught: find_spec(id)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("id, extra", [
    ("ALE/Pong-v5", "atari"), ("ALE/Pnog-v5", "atari"), ("MiniGrid-Empty-5x5-v0", "minigrid"),
    ("LunarLander-v3", "box2d"), ("BipedalWalker-v3", "box2d"), ("CarRacing-v3", "box2d"),
    ("Ant-v5", "mujoco"), ("Walker2d-v5", "mujoco"), ("Reacher-v5", "mujoco")])
def test_a_missing_extra_is_named(id, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError) as caught: find_spec(id)
    assert f'pip install "worldmodels_nb[{extra}]"' in str(caught.value)


def test_a_typo_in_an_id_of_a_missing_extra_names_both(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError) as caught: find_spec("HalfCheeta-v5")
    assert "HalfCheetah-v5" in str(caught.value) and "worldmodels_nb[mujoco]" in str(caught.value)


@pytest.mark.parametrize("kwargs, word", [
    (dict(wal="random"), "wal"), (dict(wall="oval"), "oval"), (dict(render_mode="human"), "render_mode")])
def test_wrong_kwargs_are_one_sentence(kwargs, word):
    with pytest.raises(EnvError, match=word) as caught: make_env(EnvSettings(kwargs=kwargs))
    assert "env.kwargs" in str(caught.value)


def test_a_frame_vector_refuses_wrong_kwargs_too():
    oval = EnvSettings(kwargs=dict(wall="oval"))
    with pytest.raises(EnvError, match="env.kwargs.*oval"): FrameVector(oval, 2)


# ---------------------------------------------------------------- frames from anything

class Scripted(gym.Env):
    "Six steps; the picture holds the step's number; what goes wrong, and when, is said by keyword."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(0, 255, (10, 12), np.uint8)
    action_space = gym.spaces.Discrete(3, start=5)

    def __init__(self, fault="", at=3, render_mode=None):
        self.fault, self.at, self.render_mode = fault, at, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        if self.fault == "reset": raise RuntimeError("no board")
        return self.picture()[..., 0], {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        self.actions.append(int(action))
        broken = self.t == self.at
        if broken and self.fault == "raise": raise RuntimeError("out of coal")
        reward = {"nan": float("nan"), "inf": float("inf")}.get(self.fault, 1.) if broken else 1.
        return self.picture()[..., 0], reward, self.t >= 6, False, {}

    def render(self): return None if self.fault == "blind" else self.picture()

    def picture(self):
        side = 11 if self.fault == "size" and self.t == self.at else 10
        return np.full((side, 12, 3), 20 * self.t, np.uint8)


gym.register("Scripted-v0", Scripted)


def scripted(fault="", **settings):
    return FrameEnv(EnvSettings(id="Scripted-v0", kwargs=dict(fault=fault), size=8, **settings))


@pytest.mark.parametrize("source, color, channels", [
    ("render", "rgb", 3), ("render", "grey", 1), ("observation", "rgb", 3), ("observation", "grey", 1)])
def test_frames_from_pictures_and_observations(source, color, channels):
    env = scripted(source=source, color=color)
    frame, state = env.reset(0)
    assert frame.shape == env.frame_shape == (channels, 8, 8) and frame.dtype == np.uint8
    assert state is None and env.state_names == env.position == []
    frame, reward, terminated, truncated, _ = env.step(0)
    assert (frame == 20).all() and reward == 1 and not terminated and not truncated


def test_discrete_actions_count_from_zero_whatever_the_space_does():
    env = scripted()
    env.reset(0)
    for action in (0, 2, np.int64(1)): env.step(action)
    assert env.env.unwrapped.actions == [5, 7, 6]


def test_actions_repeat_and_rewards_add_up_to_the_end():
    env = scripted(action_repeat=4)
    env.reset(0)
    first, second = env.step(1), env.step(2)
    assert env.env.unwrapped.actions == [6] * 4 + [7] * 2
    assert (first[1], second[1]) == (4, 2) and (first[2], second[2]) == (False, True)
    assert (first[0] == 80).all() and (second[0] == 120).all()


def test_frame_skip_draws_a_new_action_for_each_further_step():
    env, further = scripted(frame_skip=2), iter([1, 2, 0, 1])
    env.reset(0)
    frame, reward, *_ = env.step(0, lambda: next(further))
    assert env.env.unwrapped.actions == [5, 6, 7] and reward == 3 and (frame == 60).all()
    assert env.step(2, lambda: next(further))[2] and env.env.unwrapped.actions[3:] == [7, 5, 6]
    env.reset(0)
    with pytest.raises(EnvError, match="frame_skip"): env.step(0)


def test_frame_skip_is_off_while_actions_repeat():
    env = scripted(frame_skip=2, action_repeat=2)
    env.reset(0)
    env.step(0)
    assert env.env.unwrapped.actions == [5, 5]


@pytest.mark.parametrize("fault, word", [
    ("nan", "reward of nan"), ("inf", "reward of inf"), ("raise", "RuntimeError: out of coal"),
    ("size", "changed its frames")])
def test_a_broken_environment_is_an_error_at_its_step(fault, word):
    env = scripted(fault)
    env.reset(0)
    for _ in range(2): env.step(0)
    with pytest.raises(EnvError, match=word): env.step(0)


@pytest.mark.parametrize("fault, word", [("reset", "no board"), ("blind", "env.source")])
def test_a_broken_reset_is_an_error(fault, word):
    with pytest.raises(EnvError, match=word): scripted(fault).reset(0)


def test_an_observation_that_is_no_image_is_refused():
    cart = EnvSettings(id="CartPole-v1", source="observation")
    with pytest.raises(EnvError, match="set env.source to 'render'"): FrameEnv(cart)


@pytest.mark.parametrize("id, names", [
    ("CartPole-v1", 4), ("Pendulum-v1", 3), ("Acrobot-v1", 6), ("MountainCar-v0", 2),
    ("MountainCarContinuous-v0", 2)])
def test_classic_control_has_a_named_state(id, names):
    env = FrameEnv(EnvSettings(id=id, size=16))
    frame, state = env.reset(1)
    assert state.shape == (names,) == (len(env.state_names),) and state.dtype == np.float32
    assert env.position == list(range(names))
    again = FrameEnv(EnvSettings(id=id, size=16)).reset(1)
    assert np.array_equal(frame, again[0]) and np.array_equal(state, again[1])
    env.step(env.action.zeros(1)[0])
    env.close()


@pytest.mark.parametrize("source", ["render", "observation"])
def test_two_rooms_in_grey_from_either_source(source):
    env = FrameEnv(EnvSettings(source=source, color="grey", size=32))
    frame, state = env.reset(seed=3)
    assert frame.shape == env.frame_shape == (1, 32, 32) and frame.dtype == np.uint8
    assert env.position == [0, 1] and state.shape == (4,)


def test_cartpole_takes_one_of_two_actions():
    assert FrameEnv(EnvSettings(id="CartPole-v1")).action == ActionSpec("discrete", 2)


@pytest.mark.parametrize("settings", [
    dict(), dict(size=32, color="grey"), dict(action_repeat=3), dict(frame_skip=2),
    dict(source="observation")])
def test_a_frame_vector_equals_frame_envs(settings):
    settings = EnvSettings(kwargs=dict(wall="random"), **settings)
    vector, singles = FrameVector(settings, 2), [FrameEnv(settings) for _ in range(2)]
    frames, states = vector.reset([3, 9])
    assert vector.state_names == singles[0].state_names == ["agent x", "agent y", "wall x", "door y"]
    assert vector.position == [0, 1]
    for i, env in enumerate(singles):
        one = env.reset([3, 9][i])
        assert np.array_equal(frames[i], one[0]) and np.array_equal(states[i], one[1])
    actions = np.random.default_rng(5).uniform(-1, 1, (5, 4, 2, 2)).astype(np.float32)
    for step in actions:
        more = iter(step[1:])
        frames, rewards, states = vector.step(step[0], lambda more=more: next(more))
        for i, env in enumerate(singles):
            more_of_one = iter(step[1:, i])
            frame, reward, *_, state = env.step(step[0, i], lambda one=more_of_one: next(one))
            assert np.array_equal(frame, frames[i]) and np.array_equal(state, states[i])
            assert reward == pytest.approx(rewards[i], rel=1e-6)


def test_what_can_be_batched():
    assert can_batch(EnvSettings())
    others = ("CartPole-v1", "Pendulum-v1", "phys2d/CartPole-v1")
    assert not any(can_batch(EnvSettings(id=id)) for id in others)


def test_atari():
    pytest.importorskip("ale_py")
    settings = dict(id="ALE/Pong-v5", kwargs=dict(frameskip=1), color="grey")
    env, same = (FrameEnv(EnvSettings(**settings, action_repeat=4)) for _ in range(2))
    frame, ram = env.reset(2)
    assert frame.shape == (1, 64, 64) and ram.shape == (128,) and ram.dtype == np.uint8
    assert env.position == [] and env.action == ActionSpec("discrete", 6)
    assert not can_batch(EnvSettings(**settings))
    same.reset(2)
    for action in (2, 3, 2, 5): one, two = env.step(action), same.step(action)
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[4], two[4])
    observed = FrameEnv(EnvSettings(**settings, source="observation"))
    assert np.array_equal(observed.reset(2)[0], frame)
    with pytest.raises(EnvError, match="ALE/Pong-v5"): find_spec("ALE/Pnog-v5")


def test_rendering_needs_no_display_and_says_nothing():
    code = ("import os\nfrom worldmodels_nb.data.envs import FrameEnv\n"
            "from worldmodels_nb.settings import EnvSettings\n"
            "FrameEnv(EnvSettings(id='CartPole-v1')).reset(0)\nprint(os.environ['SDL_VIDEODRIVER'])")
    loud = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT")
    quiet = {k: v for k, v in os.environ.items() if k not in loud}
    call = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(call, env=quiet, capture_output=True, text=True)
    if sys.platform == "linux": assert (done.returncode, done.stdout, done.stderr) == (0, "dummy\n", "")


def test_importing_the_module_imports_no_extra():
    code = ("import sys, worldmodels_nb.data.envs\n"
            "extras = {'ale_py', 'minigrid', 'mujoco', 'Box2D', 'pygame', 'stable_baselines3'}\n"
            "print(sorted(extras & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
