"Two Rooms keeps its walls, shows exactly what is solid, and a batch of rooms equals single ones."
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worldmodels_nb.data.tworooms import DOT, FLOOR, WALL, EnvError, TwoRooms

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
@given(u=hnp.arrays(float, (8, 5), elements=share), actions=hnp.arrays(np.float32, (8, 6, 2), elements=unit),
       wall=st.sampled_from(["fixed", "random"]))
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
    assert room.blocked(further)[stopped].all()
    assert not room.blocked(further)[~stopped & (gone < np.hypot(*move.T) - .02)].any()


def crossings(room, old, new):
    "How many straight lines from old to new meet the wall's middle outside the door, to the last bit."
    moved = np.where(new[:, 0] == old[:, 0], 1, new[:, 0] - old[:, 0])
    time = (old[:, 2] - old[:, 0]) / moved
    height = old[:, 1] + time * (new[:, 1] - old[:, 1])
    return ((time > 0) & (time < 1) & (np.abs(height - old[:, 3]) > room.half_door)).sum()


def test_a_step_equals_a_walk_in_400_small_bits():
    rooms, rng = TwoRooms("random"), np.random.default_rng(0)
    many, actions = rooms.reset(3000, rng), rng.uniform(-1, 1, (3000, 2))
    new, reward = rooms.step(many, actions)
    move = 5.4 * actions / np.maximum(1, np.hypot(*actions.T))[:, None]
    bits = many[:, None, :2] + np.linspace(0, 1, 401)[None, :, None] * move[:, None]  # (3000, 401, 2)
    walls = np.repeat(many[:, None, 2:], 401, 1)
    solid = rooms.blocked(np.concatenate([bits, walls], -1).reshape(-1, 4)).reshape(3000, 401)
    first = np.where(solid.any(1), solid.argmax(1) - 1, 400)
    assert np.hypot(*(bits[np.arange(3000), first] - new[:, :2]).T).max() < 5.4 / 400 + 1e-4
    assert not rooms.blocked(new).any() and crossings(rooms, many, new) == 0
    distance = np.hypot(new[:, 0] - new[:, 2], new[:, 1] - new[:, 3])
    np.testing.assert_allclose(reward, 1 - distance / (58 * 2 ** .5), rtol=0, atol=1e-6)


def test_stopping_short_of_what_is_solid_is_not_enough():
    room, rng = TwoRooms(), np.random.default_rng(0)
    old, angle = room.reset(20_000, rng), rng.uniform(-np.pi, np.pi, 20_000)
    target = old[:, :2] + 5.4 * np.stack([np.cos(angle), np.sin(angle)], 1)
    naive = np.concatenate([target, old[:, 2:]], 1)
    naive[room.blocked(naive)] = old[room.blocked(naive)]
    new = np.concatenate([room.travel(old, target), old[:, 2:]], 1)
    assert crossings(room, old, naive) > 0 and crossings(room, old, new) == 0
    assert not room.blocked(new).any()


def test_fixed_rooms_are_filled_evenly():
    crowd = TwoRooms().reset(200_000, np.random.default_rng(0))
    assert not TwoRooms().blocked(crowd).any()
    inside = [crowd[:, 0] < 30, crowd[:, 0] > 34, np.abs(crowd[:, 0] - 32) < 2]
    areas = np.array([27 * 58, 27 * 58, 4 * 10])
    np.testing.assert_allclose(np.mean(inside, axis=1), areas / areas.sum(), rtol=0, atol=5e-3)


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
    diagonal = 58 * 2 ** .5
    np.testing.assert_allclose([toward, away], [1 - 10.6 / diagonal, 1 - 21.4 / diagonal], atol=1e-5)


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
    assert np.array_equal(room.scene(states)[:, 0] == WALL.ravel()[0], solid)


def test_the_dot_is_drawn_as_the_formula_says():
    room = TwoRooms()
    states = np.array([[16.3, 40.8, 32, 24], [3, 3, 32, 24], [61, 61, 32, 24]], np.float32)
    y, x = np.mgrid[:64, :64] + .5
    for frame, empty, state in zip(room.render(states), room.scene(states), states):
        alpha = np.exp(-((x - state[0]) ** 2 + (y - state[1]) ** 2) / (2 * 1.3 ** 2))
        assert np.abs(frame - ((1 - alpha) * empty + alpha * DOT)).max() <= .75


def test_position_can_be_read_between_the_pixels():
    room = TwoRooms()
    frames = [room.render(np.array([[16 + dx, 40, 32, 24]], np.float32))[0].astype(int) for dx in (0, .1)]
    assert np.abs(frames[1] - frames[0]).max() >= 8


def test_the_dot_keeps_its_distance_in_grey():
    floor, dot, wall = (np.dot([.299, .587, .114], colour.ravel()) for colour in (FLOOR, DOT, WALL))
    assert dot - floor > 100 and wall - dot > 50


@pytest.mark.parametrize("size", [40, 64, 96])
def test_any_size_of_arena(size):
    room, rng = TwoRooms("random", size), np.random.default_rng(3)
    states = room.reset(200, rng)
    for _ in range(10): states, _ = room.step(states, rng.uniform(-1, 1, (200, 2)))
    assert not room.blocked(states).any() and room.render(states).shape == (200, 3, size, size)


@pytest.mark.parametrize("kwargs, word", [
    (dict(wall="open"), "'fixed' and 'random', not 'open'"), (dict(size=20), "at least 40 px"),
    (dict(size=8), "at least 40")])
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
            assert np.array_equal(picture, pictures[i]) and reward == rewards[i]
            assert np.array_equal(one["state"], info["state"][i])
    assert np.array_equal(batch.reset(seed=3)[0], batch.reset(seed=[3, 4, 5])[0])


def test_a_reset_can_ask_for_a_state():
    batch = gym.make_vec(ROOMS, 2, wall="random")
    states = [[10, 10, 30, 20], [50, 50, 40, 40]]
    assert batch.reset(options=dict(state=states))[1]["state"].tolist() == states
    assert batch.observation_space.contains(batch.render())
    with pytest.raises(EnvError, match="inside a wall"): batch.reset(options=dict(state=[30, 50, 30, 20]))
    alone = gym.make(ROOMS, wall="random")
    assert alone.reset(options={"state": [10, 10, 32, 24]})[1]["state"].tolist() == [10, 10, 32, 24]
    with pytest.raises(EnvError, match="inside a wall"): alone.reset(options={"state": [32, 50, 32, 24]})
