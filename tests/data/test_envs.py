"Two Rooms keeps its walls, area averages keep their light, and every environment becomes the same kind of frames."
import importlib.util
import os
import subprocess
import sys
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings as hypothesis_settings, strategies as st
from hypothesis.extra import numpy as hnp
from worldmodels_nb import envs
from worldmodels_nb.data.envs import ActionSpec, FrameEnv, FrameVector, action_spec, area_mean, area_weights, can_batch, find_spec, make_env, to_frames
from worldmodels_nb.data.tworooms import EnvError, TwoRooms
from worldmodels_nb.settings import EnvSettings

ROOMS = "worldmodels_nb/TwoRooms-v0"
unit = st.floats(-1, 1, width=32)
share = st.floats(0, 1, exclude_max=True)


# ---------------------------------------------------------------- the room

def crosses_outside_the_door(room, old, new):
    "Whether the straight line from old to new meets the wall's middle anywhere but in the door."
    moved = new[:, 0] - old[:, 0]
    time = (old[:, 2] - old[:, 0]) / np.where(moved == 0, 1, moved)
    height = old[:, 1] + time * (new[:, 1] - old[:, 1])
    return (moved != 0) & (time > 0) & (time < 1) & (np.abs(height - old[:, 3]) > room.half_door + 1e-4)


@hypothesis_settings(max_examples=150, deadline=None)
@given(u=hnp.arrays(float, (8, 5), elements=share), actions=hnp.arrays(np.float32, (8, 6, 2), elements=unit), wall=st.sampled_from(["fixed", "random"]))
def test_no_path_enters_a_wall(u, actions, wall):
    room = TwoRooms(wall)
    states = room.place(u)
    assert not room.blocked(states).any()
    for step in range(actions.shape[1]):
        new, rewards = room.step(states, actions[:, step])
        assert new.dtype == np.float32 and not room.blocked(new).any()
        assert not crosses_outside_the_door(room, states, new).any()
        assert (np.hypot(*(new - states)[:, :2].T) <= room.max_step + 1e-4).all()
        assert (new[:, 2:] == states[:, 2:]).all()
        assert ((rewards >= 0) & (rewards <= 1)).all()
        middle = np.concatenate([(states[:, :2] + new[:, :2]) / 2, states[:, 2:]], 1)
        low, high = room.solids(states)
        deep = ((low + 1e-3 < middle[:, None, :2]) & (middle[:, None, :2] < high - 1e-3)).all(-1).any(-1)
        assert not deep.any()
        states = new


@hypothesis_settings(max_examples=60, deadline=None)
@given(face=st.sampled_from([30., 34.]), y=st.floats(3, 61, width=32), action=st.tuples(unit, unit))
def test_an_agent_on_a_surface_cannot_step_through_it(face, y, action):
    room = TwoRooms()
    states = np.array([[face, y, 32, 24]], np.float32)
    new, _ = room.step(states, np.array([action]))
    assert not room.blocked(new).any() and not crosses_outside_the_door(room, states, new).any()


def test_a_step_goes_as_far_as_the_way_is_free():
    room, rng = TwoRooms("random"), np.random.default_rng(0)
    states, actions = room.reset(2000, rng), rng.normal(size=(2000, 2))
    new, _ = room.step(states, actions)
    move = room.max_step * actions / np.maximum(1, np.hypot(*actions.T))[:, None]
    gone = np.hypot(*(new - states)[:, :2].T)
    stopped = gone < np.hypot(*move.T) - 1e-3
    assert 0.02 < stopped.mean() < .5
    further = states.copy()
    further[:, :2] += move / np.hypot(*move.T)[:, None] * (gone + .01)[:, None]
    assert room.blocked(further)[stopped].all() and not room.blocked(further)[~stopped & (gone < np.hypot(*move.T) - .02)].any()


def test_long_actions_are_cut_and_short_ones_are_not():
    room = TwoRooms()
    start = np.tile(np.array([[16, 40, 32, 24]], np.float32), (3, 1))
    new, _ = room.step(start, np.array([[9, 0], [.5, 0], [0, 0]]))
    np.testing.assert_allclose(new[:, 0], [21.4, 18.7, 16], atol=1e-5)


def test_the_door_lets_through_and_the_wall_does_not():
    room = TwoRooms()
    start = np.array([[29, y, 32, 24] for y in (18.5, 19.5, 24, 28.5, 29.5)], np.float32)
    x = room.step(start, np.tile([1., 0], (5, 1)))[0][:, 0]
    np.testing.assert_allclose(x, [30, 34.4, 34.4, 34.4, 30], atol=1e-5)


def test_the_reward_is_that_of_the_next_position():
    room = TwoRooms()
    start = np.array([[16, 24, 32, 24]], np.float32)
    toward, away = (room.step(start, np.array([[x, 0.]]))[1][0] for x in (1, -1))
    np.testing.assert_allclose([toward, away], [1 - 10.6 / (58 * 2 ** .5), 1 - 21.4 / (58 * 2 ** .5)], atol=1e-5)


def test_starts_are_uniform_over_all_that_is_free():
    room = TwoRooms("random")
    states = room.reset(200_000, np.random.default_rng(1))
    x, y, wall, door = states.T
    assert set(wall) == set(range(20, 45)) and set(door) == set(range(12, 53))
    width = (wall - 5) + (59 - wall)
    expected = (58 * (wall - 5)).mean() / (58 * width + 40).mean()
    assert abs((x < wall - 2).mean() - expected) < .005
    assert abs((np.abs(x - wall) < 2).mean() - 40 / (58 * 54 + 40)) < .002
    rows = np.histogram(y[x < wall - 2], bins=29, range=(3, 61))[0]
    assert rows.std() / rows.mean() < .03


def test_pictures_show_exactly_what_is_solid():
    room, rng = TwoRooms("random"), np.random.default_rng(2)
    states = room.reset(20, rng)
    centre = np.stack(np.meshgrid(np.arange(64) + .5, np.arange(64) + .5), -1).reshape(-1, 2)
    points = np.concatenate([np.repeat(centre[None], 20, 0), np.repeat(states[:, None, 2:], 4096, 1)], -1)
    solid = room.blocked(points.reshape(-1, 4)).reshape(20, 64, 64)
    assert np.array_equal(room.scene(states)[:, 0] == envs.WALL.ravel()[0], solid)


def test_the_dot_is_painted_as_the_formula_says():
    room = TwoRooms()
    states = np.array([[16.3, 40.8, 32, 24], [3, 3, 32, 24], [61, 61, 32, 24]], np.float32)
    y, x = np.mgrid[:64, :64] + .5
    for frame, empty, state in zip(room.render(states), room.scene(states), states):
        alpha = np.exp(-((x - state[0]) ** 2 + (y - state[1]) ** 2) / (2 * 1.3 ** 2))
        assert np.abs(frame - ((1 - alpha) * empty + alpha * envs.DOT)).max() <= .75


def test_position_can_be_read_between_the_pixels():
    room = TwoRooms()
    frames = [room.render(np.array([[16 + dx, 40, 32, 24]], np.float32))[0].astype(int) for dx in (0, .1)]
    assert np.abs(frames[1] - frames[0]).max() >= 8


@pytest.mark.parametrize("size", [40, 64, 96])
def test_any_size_of_arena(size):
    room, rng = TwoRooms("random", size), np.random.default_rng(3)
    states = room.reset(200, rng)
    for _ in range(10): states, _ = room.step(states, rng.uniform(-1, 1, (200, 2)))
    assert not room.blocked(states).any() and room.render(states).shape == (200, 3, size, size)


@pytest.mark.parametrize("kwargs, word", [(dict(wall="open"), "'fixed' and 'random'"), (dict(size=20), "40 px")])
def test_rooms_that_cannot_be(kwargs, word):
    with pytest.raises(EnvError, match=word): TwoRooms(**kwargs)


# ---------------------------------------------------------------- Gymnasium

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wall", ["fixed", "random"])
def test_gymnasium_accepts_the_room(wall):
    check_env(gym.make(ROOMS, wall=wall, render_mode="rgb_array").unwrapped)


def test_a_batch_equals_single_rooms():
    seeds, rng = [11, 5, 8], np.random.default_rng(4)
    batch = gym.make_vec(ROOMS, 3, wall="random")
    singles = [gym.make(ROOMS, wall="random") for _ in seeds]
    pictures, info = batch.reset(seed=seeds)
    for i, env in enumerate(singles):
        picture, one = env.reset(seed=seeds[i])
        assert np.array_equal(picture, pictures[i]) and np.array_equal(one["state"], info["state"][i])
    for _ in range(12):
        actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        pictures, rewards, terminated, truncated, info = batch.step(actions)
        assert batch.observation_space.contains(pictures) and not (terminated | truncated).any()
        for i, env in enumerate(singles):
            picture, reward, _, _, one = env.step(actions[i])
            assert np.array_equal(picture, pictures[i]) and reward == rewards[i] and np.array_equal(one["state"], info["state"][i])
    assert np.array_equal(batch.reset(seed=3)[0], batch.reset(seed=[3, 4, 5])[0])


def test_a_reset_can_ask_for_a_state():
    batch = gym.make_vec(ROOMS, 2, wall="random")
    states = [[10, 10, 30, 20], [50, 50, 40, 40]]
    assert batch.reset(options=dict(state=states))[1]["state"].tolist() == states
    with pytest.raises(EnvError, match="inside a wall"): batch.reset(options=dict(state=[30, 50, 30, 20]))


# ---------------------------------------------------------------- resizing

@pytest.mark.parametrize("n, m", [(5, 2), (2, 5), (600, 64), (210, 64), (97, 84), (64, 64), (13, 8)])
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


# ---------------------------------------------------------------- actions and ids

def test_action_specs():
    assert action_spec(gym.spaces.Discrete(5)) == ActionSpec("discrete", 5)
    spec = action_spec(gym.spaces.Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)))
    assert spec == ActionSpec("continuous", 2, [-2, 0], [2, 1])
    assert spec.zeros(3).shape == (3, 2) and ActionSpec("discrete", 5).zeros(3).dtype == np.int64
    np.testing.assert_allclose(spec.scale(np.array([[-1, -1], [0, 1], [5, -5]])), [[-2, 0], [0, 1], [2, 0]])


@pytest.mark.parametrize("space", [gym.spaces.MultiDiscrete([2, 2]), gym.spaces.Box(-1, np.inf, (2,)), gym.spaces.Box(-1, 1, (2, 2)),
                                   gym.spaces.Box(0, 5, (2,), np.int64), gym.spaces.Dict(a=gym.spaces.Discrete(2))])
def test_other_actions_are_refused(space):
    with pytest.raises(EnvError, match="not supported.*env.id"): action_spec(space)


@pytest.mark.parametrize("id, words", [
    ("CartPol-v1", ["'env.id'", "CartPol-v1", "CartPole-v1"]), ("TwoRooms-v0", [ROOMS]), ("LunarLander-v2", ["LunarLander-v3"]),
    ("CartPole", ["CartPole-v1"]), ("qqqqqqqq", ["pprint_registry"]), ("no_such_module:Env-v0", ["no_such_module"])])
def test_unknown_ids_name_near_ones(id, words):
    with pytest.raises(EnvError) as caught: find_spec(id)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("id, extra", [("ALE/Pong-v5", "atari"), ("ALE/Pnog-v5", "atari"), ("MiniGrid-Empty-5x5-v0", "minigrid"), ("LunarLander-v3", "box2d"),
                                       ("BipedalWalker-v3", "box2d"), ("CarRacing-v3", "box2d"), ("Ant-v5", "mujoco"), ("Walker2d-v5", "mujoco"), ("Reacher-v5", "mujoco")])
def test_a_missing_extra_is_named(id, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError) as caught: find_spec(id)
    assert f'pip install "worldmodels_nb[{extra}]"' in str(caught.value)


def test_a_typo_in_an_id_of_a_missing_extra_names_both(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvError) as caught: find_spec("HalfCheeta-v5")
    assert "HalfCheetah-v5" in str(caught.value) and "worldmodels_nb[mujoco]" in str(caught.value)


@pytest.mark.parametrize("kwargs, word", [(dict(wal="random"), "wal"), (dict(wall="oval"), "oval"), (dict(render_mode="human"), "render_mode")])
def test_wrong_kwargs_are_one_sentence(kwargs, word):
    with pytest.raises(EnvError, match=word) as caught: make_env(EnvSettings(kwargs=kwargs))
    assert "env.kwargs" in str(caught.value)


def test_a_frame_vector_refuses_wrong_kwargs_too():
    with pytest.raises(EnvError, match="env.kwargs.*oval"): FrameVector(EnvSettings(kwargs=dict(wall="oval")), 2)


# ---------------------------------------------------------------- frames from anything

class Scripted(gym.Env):
    "Six steps; the picture holds the step's number; what goes wrong, and when, is told by keyword."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 255, (10, 12), np.uint8), gym.spaces.Discrete(3, start=5)

    def __init__(self, fault="", at=3, render_mode=None): self.fault, self.at, self.render_mode = fault, at, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.actions = 0, []
        if self.fault == "reset": raise RuntimeError("no board")
        return self.picture()[..., 0], {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1; self.actions.append(int(action))
        broken = self.t == self.at
        if broken and self.fault == "raise": raise RuntimeError("out of coal")
        reward = {"nan": float("nan"), "inf": float("inf")}.get(self.fault, 1.) if broken else 1.
        return self.picture()[..., 0], reward, self.t >= 6, False, {}

    def render(self): return None if self.fault == "blind" else self.picture()

    def picture(self):
        side = 11 if self.fault == "size" and self.t == self.at else 10
        return np.full((side, 12, 3), 20 * self.t, np.uint8)


gym.register("Scripted-v0", Scripted)


def scripted(fault="", **settings): return FrameEnv(EnvSettings(id="Scripted-v0", kwargs=dict(fault=fault), size=8, **settings))


@pytest.mark.parametrize("source, color, channels", [("render", "rgb", 3), ("render", "grey", 1), ("observation", "rgb", 3), ("observation", "grey", 1)])
def test_frames_from_pictures_and_observations(source, color, channels):
    env = scripted(source=source, color=color)
    frame, state = env.reset(0)
    assert frame.shape == env.frame_shape == (channels, 8, 8) and frame.dtype == np.uint8 and state is None and env.state_names == env.position == []
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
    with pytest.raises(EnvError, match="frame_skip"): env.reset(0); env.step(0)


def test_frame_skip_is_off_while_actions_repeat():
    env = scripted(frame_skip=2, action_repeat=2)
    env.reset(0)
    env.step(0)
    assert env.env.unwrapped.actions == [5, 5]


@pytest.mark.parametrize("fault, word", [("nan", "reward of nan"), ("inf", "reward of inf"), ("raise", "RuntimeError: out of coal"), ("size", "changed its frames")])
def test_a_broken_environment_is_an_error_at_its_step(fault, word):
    env = scripted(fault)
    env.reset(0)
    for _ in range(2): env.step(0)
    with pytest.raises(EnvError, match=word): env.step(0)


@pytest.mark.parametrize("fault, word", [("reset", "no board"), ("blind", "env.source")])
def test_a_broken_reset_is_an_error(fault, word):
    with pytest.raises(EnvError, match=word): scripted(fault).reset(0)


def test_an_observation_that_is_no_image_is_refused():
    with pytest.raises(EnvError, match="set env.source to 'render'"): FrameEnv(EnvSettings(id="CartPole-v1", source="observation"))


@pytest.mark.parametrize("id, names", [("CartPole-v1", 4), ("Pendulum-v1", 3), ("Acrobot-v1", 6), ("MountainCar-v0", 2), ("MountainCarContinuous-v0", 2)])
def test_classic_control_has_a_named_state(id, names):
    env = FrameEnv(EnvSettings(id=id, size=16))
    frame, state = env.reset(1)
    assert state.shape == (names,) == (len(env.state_names),) and state.dtype == np.float32 and env.position == list(range(names))
    again = FrameEnv(EnvSettings(id=id, size=16)).reset(1)
    assert np.array_equal(frame, again[0]) and np.array_equal(state, again[1])
    env.step(env.action.zeros(1)[0])
    env.close()


@pytest.mark.parametrize("settings", [dict(), dict(size=32, color="grey"), dict(action_repeat=3), dict(frame_skip=2), dict(source="observation")])
def test_a_frame_vector_equals_frame_envs(settings):
    settings = EnvSettings(kwargs=dict(wall="random"), **settings)
    vector, singles = FrameVector(settings, 2), [FrameEnv(settings) for _ in range(2)]
    frames, states = vector.reset([3, 9])
    assert vector.state_names == singles[0].state_names == ["agent x", "agent y", "wall x", "door y"] and vector.position == [0, 1]
    for i, env in enumerate(singles):
        one = env.reset([3, 9][i])
        assert np.array_equal(frames[i], one[0]) and np.array_equal(states[i], one[1])
    actions = np.random.default_rng(5).uniform(-1, 1, (5, 4, 2, 2)).astype(np.float32)
    for step in actions:
        more = iter(step[1:])
        frames, rewards, states = vector.step(step[0], lambda: next(more))
        for i, env in enumerate(singles):
            more_of_one = iter(step[1:, i])
            frame, reward, *_, state = env.step(step[0, i], lambda: next(more_of_one))
            assert np.array_equal(frame, frames[i]) and reward == pytest.approx(rewards[i], rel=1e-6) and np.array_equal(state, states[i])


def test_what_can_be_batched():
    assert can_batch(EnvSettings())
    assert not any(can_batch(EnvSettings(id=id)) for id in ("CartPole-v1", "Pendulum-v1", "phys2d/CartPole-v1"))


def test_atari():
    pytest.importorskip("ale_py")
    settings = dict(id="ALE/Pong-v5", kwargs=dict(frameskip=1), color="grey")
    env, same = FrameEnv(EnvSettings(**settings, action_repeat=4)), FrameEnv(EnvSettings(**settings, action_repeat=4))
    frame, ram = env.reset(2)
    assert frame.shape == (1, 64, 64) and ram.shape == (128,) and ram.dtype == np.uint8 and env.position == [] and env.action == ActionSpec("discrete", 6)
    assert not can_batch(EnvSettings(**settings))
    same.reset(2)
    for action in (2, 3, 2, 5): one, two = env.step(action), same.step(action)
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[4], two[4])
    observed = FrameEnv(EnvSettings(**settings, source="observation"))
    assert np.array_equal(observed.reset(2)[0], frame)
    with pytest.raises(EnvError, match="ALE/Pong-v5"): find_spec("ALE/Pnog-v5")


def test_rendering_needs_no_display_and_says_nothing():
    code = ("from worldmodels_nb.envs import FrameEnv; from worldmodels_nb.settings import EnvSettings; import os\n"
            "FrameEnv(EnvSettings(id='CartPole-v1')).reset(0); print(os.environ['SDL_VIDEODRIVER'])")
    quiet = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=quiet, capture_output=True, text=True)
    if sys.platform == "linux": assert (done.returncode, done.stdout, done.stderr) == (0, "dummy\n", "")


def test_importing_the_module_imports_no_extra():
    code = "import sys, worldmodels_nb.envs; print(sorted({'ale_py', 'minigrid', 'mujoco', 'Box2D', 'pygame', 'stable_baselines3'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
