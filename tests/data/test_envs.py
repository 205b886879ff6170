"Area averages keep their light, and every environment becomes the same kind of frames."
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest

from worldmodels_nb.data.envs import (
    ActionSpec,
    EnvTimeout,
    FrameEnv,
    FrameVector,
    action_spec,
    area_mean,
    area_weights,
    can_batch,
    find_spec,
    make_env,
    time_limit,
    to_frames,
)
from worldmodels_nb.data.pictures import PictureError, as_bytes, channels_last, white_of
from worldmodels_nb.data.tworooms import EnvError, TwoRoomsVectorEnv
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


# ---------------------------------------------------------------- what other people's environments return

GREY = np.arange(64 * 64).reshape(64, 64) % 251              # whole numbers, (H, W)
RGB = np.stack([GREY, GREY[::-1], GREY.T], -1)               # (H, W, 3)
UNIT = RGB / 255


class Odd(gym.Env):
    "Returns what a test wants; `answers` holds functions by name: of a picture, a reward, a whole answer …"
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    answers, render_mode = {}, "rgb_array"

    def __init__(self, render_mode=None): self.t = 0

    def give(self, name, other):
        return self.answers[name](self) if name in self.answers else other

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.give("reset", (self.give("observation", np.zeros(1)), {}))

    def step(self, action):
        self.t += 1
        ends = self.give("terminated", False), self.give("truncated", False)
        observation, reward = self.give("observation", np.zeros(1)), self.give("reward", 1.)
        return self.give("step", (observation, reward, *ends, {}))

    def render(self): return self.give("picture", RGB.astype(np.uint8))


gym.register("Odd-v0", Odd)


@pytest.fixture
def odd(monkeypatch):
    "odd(size=…, picture=…, reward=…): a FrameEnv whose answers are these functions of the environment."
    def make(source="render", space=None, size=64, color="rgb", **answers):
        monkeypatch.setattr(Odd, "answers", answers)
        if space is not None: monkeypatch.setattr(Odd, "observation_space", space)
        return FrameEnv(EnvSettings(id="Odd-v0", size=size, color=color, source=source))
    return make


def refused(call):
    "The sentence with which an environment is refused."
    with pytest.raises(EnvError) as caught: call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def both(env):
    "Frames of a reset and of a step."
    return env.reset(0)[0], env.step(0)[0]


@pytest.mark.parametrize("picture", [
    RGB, RGB.astype(np.int32), RGB.astype(np.uint16), RGB.astype(np.float32), RGB.astype(np.float16), UNIT,
    UNIT.astype(np.float32), UNIT.astype(np.float16), np.asfortranarray(RGB),
    np.moveaxis(RGB, -1, 0), np.moveaxis(UNIT, -1, 0), np.dstack([RGB, np.full((64, 64), 255)]),
    np.dstack([UNIT, np.ones((64, 64))]),
    np.dstack([RGB, GREY]), np.moveaxis(np.dstack([RGB, GREY]), -1, 0)], ids=lambda x: f"{x.dtype}{x.shape}")
def test_sensible_pictures_are_one_and_the_same_frame(odd, picture):
    wanted = np.moveaxis(RGB, -1, 0)
    for frame in both(odd(picture=lambda env: picture)):
        assert frame.dtype == np.uint8
        assert np.abs(frame.astype(int) - wanted).max() <= (picture.dtype == np.float16)


@pytest.mark.parametrize("picture, wanted", [
    (GREY, GREY), (GREY[..., None], GREY), (GREY[None], GREY), (GREY / 255, GREY),
    (GREY > 9, 255 * (GREY > 9)),
    (1. * (GREY > 9), 255 * (GREY > 9)), (np.zeros((64, 64)), 0 * GREY), (GREY % 2, GREY % 2)])
def test_grey_pictures_of_all_kinds(odd, picture, wanted):
    for color in ("grey", "rgb"):
        for frame in both(odd(picture=lambda env: picture, color=color)):
            assert frame.dtype == np.uint8 and (frame == wanted).all()


def spoilt(value, base=UNIT):
    base = base.copy()
    base[3, 4, 1] = value
    return base


@pytest.mark.parametrize("picture", [
    None, [], [RGB.astype(np.uint8)], (RGB,), "a picture", 3, np.zeros((64, 64, 2)), np.zeros((0, 64, 3)),
    np.zeros(64), np.zeros((2, 64, 64, 3)), np.zeros((64, 64, 5)), np.array(None), RGB.astype(object),
    RGB.astype(str), spoilt(np.nan), spoilt(np.inf), spoilt(-np.inf), spoilt(-.5), spoilt(1.5), RGB + 200.,
    spoilt(256, RGB), spoilt(-1, RGB), spoilt(2**40, RGB), RGB + .5, RGB * 1j, RGB / 127.5 - 1,
    {"image": RGB},
    object()],
    ids=lambda x: type(x).__name__)
def test_what_is_no_picture_is_one_sentence(odd, picture):
    sentence = refused(lambda: odd(picture=lambda env: picture).reset(0))
    assert sentence.startswith("Odd-v0 ") and "env.source" in sentence


@pytest.mark.parametrize("first, then", [
    (UNIT, 200 * UNIT), (UNIT, RGB), (RGB, UNIT), (RGB.astype(np.uint8), RGB), (RGB, RGB[:32]), (RGB, GREY),
    (UNIT / 2, spoilt(np.nan))])
def test_pictures_that_change_in_an_episode_are_refused(odd, first, then):
    env = odd(picture=lambda env: then if env.t else first)
    env.reset(0)
    assert "Odd-v0" in refused(lambda: env.step(0))


def test_a_black_beginning_decides_nothing_and_each_episode_is_looked_at_anew(odd):
    pictures = [0. * RGB, RGB * 1., 0. * RGB, UNIT]
    env = odd(picture=lambda env: pictures.pop(0))
    first, second, third, fourth = (*both(env), *both(env))
    assert np.array_equal(second, fourth) and not first.any() and not third.any() and second.any()


@pytest.mark.parametrize("space, picture", [
    (gym.spaces.Box(0, 1, (64, 64, 3)), UNIT), (gym.spaces.Box(0, 255, (64, 64, 3)), RGB * 1.),
    (gym.spaces.Box(0, 255, (3, 64, 64), np.uint8), np.moveaxis(RGB, -1, 0).astype(np.uint8)),
    (gym.spaces.Box(0, 255, (64, 64, 3), np.int64), RGB),
    (gym.spaces.Box(-np.inf, np.inf, (64, 64, 3)), UNIT),
    (gym.spaces.Box(0, 255, (64, 64, 4), np.uint8), np.dstack([RGB, 0 * GREY + 255]).astype(np.uint8))])
def test_observations_are_pictures_by_their_space(odd, space, picture):
    for frame in both(odd("observation", space, observation=lambda env: picture)):
        assert np.array_equal(frame, np.moveaxis(RGB, -1, 0))


@pytest.mark.parametrize("space", [
    gym.spaces.Box(-1, 1, (64, 64, 3)), gym.spaces.Box(0, 1, (64,)),
    gym.spaces.Box(0, 255, (64, 64, 2), np.uint8),
    gym.spaces.Dict(image=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)), gym.spaces.Discrete(3),
    gym.spaces.Box(0, 255, (2, 64, 64, 3), np.uint8)])
def test_observation_spaces_without_pictures_are_refused_at_once(odd, space):
    assert "set env.source to 'render'" in refused(lambda: odd("observation", space))


def test_a_declared_white_holds_for_every_frame(odd):
    dim, space = np.full((64, 64), .4), gym.spaces.Box(0, 255, (64, 64))
    assert both(odd("observation", space, observation=lambda env: dim))[0].max() == 0
    unit, binary = gym.spaces.Box(0, 1, (64, 64), np.uint8), (GREY > 9).astype(np.uint8)
    assert both(odd("observation", unit, observation=lambda env: binary))[0].max() == 255
    bright = odd("observation", unit, observation=lambda env: 2 * binary)
    assert "0 … 1" in refused(lambda: bright.reset(0))


def test_stacked_grey_frames_are_not_taken_for_colours_and_opacity(odd):
    space = gym.spaces.Box(0, 255, (4, 64, 64), np.uint8)
    stack = np.stack([GREY, GREY, GREY, GREY]).astype(np.uint8)
    assert "alpha" in refused(lambda: odd("observation", space, observation=lambda env: stack).reset(0))


@pytest.mark.parametrize("color, picture", [("grey", GREY), ("rgb", RGB), ("grey", GREY[..., None])])
@pytest.mark.parametrize("source", ["render", "observation"])
def test_an_environment_may_draw_over_its_picture(odd, source, color, picture):
    board, space = picture.astype(np.uint8), gym.spaces.Box(0, 255, picture.shape, np.uint8)
    def paint(env):
        board[:] = env.t
        return board
    env = odd(source, space, color=color, **{"picture" if source == "render" else "observation": paint})
    first, second = both(env)
    assert (first == 0).all() and (second == 1).all()


@pytest.mark.parametrize("reward, wanted", [
    (np.array([2.5]), 2.5), (np.float32(2.5), 2.5), (3, 3), (True, 1), (np.array([[2.5]]), 2.5),
    (np.int64(-4), -4)])
def test_rewards_that_are_one_number(odd, reward, wanted):
    env = odd(reward=lambda env: reward)
    env.reset(0)
    assert env.step(0)[1] == wanted and type(env.step(0)[1]) is float


@pytest.mark.parametrize("name, value", [
    *[("reward", value) for value in (None, "1.0", np.ones(2), [], {}, np.nan, 1e300, 1j, object(),
    [[1], [2, 3]])],
    *[("terminated", value) for value in (None, "False", np.zeros(2, bool), np.nan, 2, [])],
    *[("truncated", value) for value in (None, "no", np.ones(3, bool))]])
def test_other_rewards_and_ends_are_one_sentence(odd, name, value):
    env = odd(**{name: lambda env: value})
    env.reset(0)
    assert f"Odd-v0 gave a {name} of" in (said := refused(lambda: env.step(0))) or "gave no numbers" in said


@pytest.mark.parametrize("flag", [np.array([True]), np.bool_(True), 1, np.array(True), 1.])
@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_ends_that_are_one_flag(odd, name, flag):
    env = odd(**{name: lambda env: flag})
    env.reset(0)
    assert env.step(0)[2:4] == (name == "terminated", name == "truncated")


ZERO = np.zeros(1)


@pytest.mark.parametrize("answer", [
    ZERO, np.zeros(2), None, (ZERO,), [ZERO, {}], (ZERO, None), (ZERO, 3), (ZERO, {}, {}), "ab",
    (ZERO, "info")])
def test_a_reset_of_another_form_is_one_sentence(odd, answer):
    assert "(a dict)" in refused(lambda: odd(reset=lambda env: answer).reset(0))


@pytest.mark.parametrize("answer", [
    (ZERO, 1., False, {}), (ZERO, 1., False), None, ZERO, (ZERO, 1., False, False, None),
    (ZERO, 1., False, {}, False),
    [ZERO, 1., False, False, {}]])
def test_a_step_of_another_form_is_one_sentence(odd, answer):
    env = odd(step=lambda env: answer)
    env.reset(0)
    assert "Odd-v0" in refused(lambda: env.step(0))


def leave(env): sys.exit("bye")
def long(env): raise RuntimeError("much\n" * 1000)
def missing(env): raise KeyError("board")


@pytest.mark.parametrize("name", ["reset", "step", "picture"])
@pytest.mark.parametrize("fault", [leave, long, missing])
def test_whatever_an_environment_raises_is_one_sentence(odd, name, fault):
    env = odd(**{name: fault})
    assert "raised" in refused(lambda: both(env))


def test_a_faulty_close_is_no_trouble(odd, monkeypatch):
    monkeypatch.setattr(Odd, "close", missing)
    odd().close()


@pytest.mark.parametrize("state", [
    np.full(4, np.nan), np.float64([1, 2, 3, 1e300]), np.ones(3), np.ones((4, 1)), None, np.array(["a"] * 4),
    "abcd"])
def test_states_that_break_their_promise_are_one_sentence(odd, state, monkeypatch):
    from worldmodels_nb.data import envs
    reader = envs.STATES["gymnasium.envs.classic_control.cartpole:CartPoleEnv"]
    monkeypatch.setitem(envs.STATES, str(gym.spec("Odd-v0").entry_point), reader)
    assert "state" in refused(lambda: odd(observation=lambda env: state).reset(0))


def test_states_are_copies(odd, monkeypatch):
    from worldmodels_nb.data import envs
    reader = envs.STATES["gymnasium.envs.classic_control.mountain_car:MountainCarEnv"]
    monkeypatch.setitem(envs.STATES, str(gym.spec("Odd-v0").entry_point), reader)
    for kind in (np.float32, np.uint8, np.float64):
        board = np.zeros(2, kind)
        def move(env, board=board):
            board[:] = env.t
            return board
        env = odd(observation=move)
        first = env.reset(0)[1]
        env.step(0)
        assert not first.any() and first.dtype == (np.uint8 if kind == np.uint8 else np.float32)


def test_an_action_that_is_changed_by_the_environment_stays_what_it_was():
    action, env = np.float32([.5]), FrameEnv(EnvSettings(id="Pendulum-v1", size=16))
    env.env.unwrapped.step = lambda u: (u.fill(9), np.zeros(3, np.float32), 0., False, False, {})[1:]
    env.reset(0)
    env.step(action)
    assert action == .5


@pytest.mark.parametrize("space", [
    None, gym.spaces.Box(0, 1, (0,)), gym.spaces.Box(0, 1, ()),
    gym.spaces.Box(-1e300, 1e300, (2,), np.float64),
    gym.spaces.MultiBinary(3), gym.spaces.Box(0, 9, (300,), np.int32), gym.spaces.Text(5), "left or right",
    gym.spaces.Tuple([gym.spaces.Discrete(2)] * 50),
    gym.spaces.Box(np.arange(-60, 0, dtype=np.float32), np.full(60, np.inf, np.float32))])
def test_more_actions_that_are_refused_in_one_line(odd, space, monkeypatch):
    monkeypatch.setattr(Odd, "action_space", space)
    assert "not supported" in refused(odd)


# ---------------------------------------------------------------- batches

class Rooms(TwoRoomsVectorEnv):
    "Two rooms by the dozen, one of whose answers is changed."
    change = staticmethod(lambda frames, rewards, ended, over, info: (frames, rewards, ended, over, info))

    def step(self, actions): return self.change(*super().step(actions))


gym.register("Rooms-v0", "worldmodels_nb.data.tworooms:TwoRoomsEnv", vector_entry_point=Rooms)


@pytest.mark.parametrize("change", [
    lambda f, r, e, o, i: (f, r, ~e, o, i), lambda f, r, e, o, i: (f, r, e, ~o, i),
    lambda f, r, e, o, i: (f, r[:2], e, o, i), lambda f, r, e, o, i: (f[:2], r, e, o, i),
    lambda f, r, e, o, i: (f * 1000., r, e, o, i), lambda f, r, e, o, i: (f[..., :2], r, e, o, i),
    lambda f, r, e, o, i: (f, None, e, o, i), lambda f, r, e, o, i: (f, r, None, o, i),
    lambda f, r, e, o, i: (f, r, e, i), lambda f, r, e, o, i: (f, r, e, o, {}),
    lambda f, r, e, o, i: (f, r, e, o, dict(state=i["state"][:, :3])),
    lambda f, r, e, o, i: (list(f), r, e, o, i)])
def test_batches_are_looked_at_too(change, monkeypatch):
    monkeypatch.setattr(Rooms, "change", staticmethod(change))
    many = FrameVector(EnvSettings(id="Rooms-v0"), 3)
    many.reset([1, 2, 3])
    assert "Rooms-v0" in refused(lambda: many.step(np.zeros((3, 2), np.float32)))


@pytest.mark.parametrize("change", [
    lambda f, *rest: (f / 255, *rest), lambda f, *rest: (f.astype(np.int64), *rest),
    lambda f, *rest: (f.astype(float), *rest), lambda f, r, *rest: (f, r.astype(int), *rest)])
def test_batches_of_other_types_are_understood(change, monkeypatch):
    many, plain = (FrameVector(EnvSettings(id="Rooms-v0"), 3) for _ in range(2))
    many.declared, still = 0, np.zeros((3, 2), np.float32)
    plain.reset([1, 2, 3])
    wanted = plain.step(still)[0]
    monkeypatch.setattr(Rooms, "change", staticmethod(change))
    many.reset([1, 2, 3])
    many.look = ""
    assert np.array_equal(many.step(still)[0], wanted)


# ---------------------------------------------------------------- environments that do not come back

def doze(env): time.sleep(60)
def loop(env):
    while True: env.t = env.t
def stubborn(env):
    while True:
        try: time.sleep(60)
        except Exception: continue


@pytest.mark.parametrize("name", ["reset", "step", "picture"])
@pytest.mark.parametrize("hang", [doze, loop, stubborn])
def test_an_environment_that_hangs_is_stopped(odd, name, hang):
    env = odd(**{name: hang})
    env.settings = env.settings.model_copy(update=dict(timeout=.2))
    with pytest.raises(EnvTimeout, match="Odd-v0 did not come back within 0.2 s.*env.timeout"): both(env)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_pictures_by_themselves():
    assert channels_last(np.zeros((5, 3, 8, 9)), (5,)).shape == (5, 8, 9, 3)
    assert [white_of(gym.spaces.Box(0, high, (8, 9))) for high in (1, 255, np.inf, 7)] == [1, 255, 0, 0]
    assert as_bytes(np.float32([[0, .25, 1]]))[1] == 1 and as_bytes(np.float32([[0, 25]]))[1] == 255
    assert as_bytes(np.zeros((2, 2)))[1] == 0
    with pytest.raises(PictureError): as_bytes(np.array([["a"]]))


def test_an_alarm_of_somebody_else_is_put_back():
    rung = []
    former = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30, 7)
        with time_limit(EnvSettings(timeout=5)): pass
        due, again = signal.setitimer(signal.ITIMER_REAL, .1)
        assert 20 < due <= 30 and again == 7
        with pytest.raises(EnvTimeout):
            with time_limit(EnvSettings(timeout=.4)): time.sleep(60)
        time.sleep(.1)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_without_a_timeout_or_in_a_thread_no_alarm_is_set():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(EnvSettings(timeout=0)): assert signal.getsignal(signal.SIGALRM) is before
    def work():
        with time_limit(EnvSettings(timeout=.01)): seen.append(signal.getsignal(signal.SIGALRM) is before)
    seen, thread = [], threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


# ---------------------------------------------------------------- environments of one's own

@pytest.mark.parametrize("id", ["Chess-v0", "Mine/Chess-v2", "qqqqqqqq", "CartPole"])
def test_an_unknown_id_says_how_to_bring_ones_own(id):
    assert f'"module:{id}"' in refused(lambda: find_spec(id))


REGISTERED = "import gymnasium as gym\ngym.register({id!r}, 'worldmodels_nb.data.tworooms:TwoRoomsEnv')"


@pytest.mark.parametrize("name, id", [
    ("own_one", "OwnOne-v0"), ("own_two", "mine/OwnTwo-v3"), ("own_three", "OwnThree")])
def test_a_module_in_the_working_directory_brings_its_environment(name, id, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(REGISTERED.format(id=id))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert find_spec(f"{name}:{id}").id == id and FrameEnv(EnvSettings(id=f"{name}:{id}")).reset(0)[0].any()


@pytest.mark.parametrize("name, code, words", [
    ("bad_a", "import nothing_like_this", ["bad_a", "nothing_like_this", "cannot be imported"]),
    ("bad_b", "def (:", ["bad_b", "SyntaxError"]),
    ("bad_c", "raise ValueError('no\\nboard')", ["bad_c", "no board"]),
    ("bad_d", "raise SystemExit(3)", ["bad_d", "SystemExit"]), ("bad_e", "1 / 0", ["ZeroDivisionError"]),
    ("bad_f", "x = 1", ["bad_f does not register it"])])
def test_a_module_that_does_not_do_is_named(name, code, words, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    said = refused(lambda: find_spec(f"{name}:Chess-v0"))
    assert all(word in said for word in words)


@pytest.mark.parametrize("id", [
    "no_such:Chess-v0", "no.such.module:Chess-v0", ".games:Chess-v0", "a:b:Chess-v0", "games.py:Chess-v0",
    "numpy:Chess-v0", "numpy.nothing:Chess-v0", "no_such:", ":", "games/chess:Chess-v0", "CartPole-v0.5",
    "no_such/CartPole-v1"])
def test_odd_ids_are_one_sentence(id):
    assert "'env.id'" in refused(lambda: find_spec(id))


@pytest.mark.parametrize("kwargs", [
    dict(render_mode="rgb_array"), dict(id=3), dict(disable_env_checker=False), dict(num_envs=2),
    dict(entry_point=1),
    dict(max_episode_steps="many"), dict(size="large"), dict(wall=["fixed"])])
@pytest.mark.parametrize("source", ["render", "observation"])
def test_kwargs_that_collide_are_one_sentence(kwargs, source):
    assert "env.kwargs" in refused(lambda: FrameEnv(EnvSettings(kwargs=kwargs, source=source)))


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
