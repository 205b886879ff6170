"The same episode under other actions: what follows, what a model says, how actions are written and drawn."
from dataclasses import replace

import numpy as np
import pytest
import torch
from rollout_tools import untrained_run
from run_tools import refused

from worldmodels_nb.data.tworooms import ActionSpec
from worldmodels_nb.runs.counterfactuals import (
    go_on,
    parse_actions,
    roll_out,
    shuffled_actions,
    state_env,
    still_actions,
    stroke_actions,
    write_actions,
)

PLANE = ActionSpec("continuous", 2, [-1, -1], [1, 1])
LANES = ActionSpec("continuous", 3, [-2, 0, 0], [2, 1, 4])
FEW = ActionSpec("discrete", 3)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("rooms"), models=("encdec", "vjepa2"))


@pytest.fixture(scope="module")
def cart(tmp_path_factory):
    changes = {"env.id": "CartPole-v1", "collect.policy": "random", "model.frame_stack": 3}
    return untrained_run(tmp_path_factory.mktemp("cart"), changes)


def test_the_same_actions_give_the_recorded_episode(rooms):
    episode = rooms.data.dataset.episode(2)
    same = go_on(state_env(rooms), episode, 1, episode.actions[1:])
    for name in ("frames", "actions", "rewards", "states"):
        assert np.array_equal(getattr(same, name), getattr(episode, name)), name
    assert same.terminated == episode.terminated and same.index == 2


def test_other_actions_give_another_episode_from_the_start_frame_on(rooms):
    episode = rooms.data.dataset.episode(2)
    other = go_on(state_env(rooms), episode, 2, -episode.actions[2:5])
    assert np.array_equal(other.frames[:3], episode.frames[:3]) and len(other.actions) == 5
    assert (other.frames[3:] != episode.frames[3:6]).any(axis=(1, 2, 3)).all()


def test_an_environment_that_takes_no_state_is_found_out(cart):
    episode = cart.data.dataset.episode(1)
    assert go_on(state_env(cart), episode, 1, episode.actions[1:]) is None
    assert go_on(state_env(cart), replace(episode, states=None), 1, episode.actions[1:]) is None


def test_a_dataset_without_states_has_no_environment_to_ask(cart):
    spec = replace(cart.data.dataset.spec, state_names=[], position=[])
    before, cart.data.dataset.spec = cart.data.dataset.spec, spec
    assert state_env(cart) is None
    cart.data.dataset.spec = before


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_rollout_is_the_models_own(rooms, start):
    world, episode = rooms.models["vjepa2"], rooms.data.dataset.episode(1)
    rolled = roll_out(world, episode, start, 2, rooms.decoders["vjepa2"], rooms.probes["vjepa2"])
    assert world.context_length > 1
    first = max(start + 1 - world.context_length, 0)
    z = world.encode(torch.from_numpy(episode.frames[first:start + 3].copy())[None])
    actions = torch.from_numpy(episode.actions[first:start + 2].copy())[None]
    ahead = world.rollout(z[:, :-2], actions[:, :-2], actions[:, -2:])
    shown = (rooms.decoders["vjepa2"](ahead)[0] * 255).round().byte().numpy()
    assert np.array_equal(rolled.frames["rollout"][1:], shown)
    assert rolled.frames.keys() == {"reconstruction", "rollout"} and "position" in rolled.errors
    assert all(e.shape == (2,) for pair in rolled.errors.values() for e in pair.values())


def test_persistence_keeps_the_first_position(rooms):
    episode = rooms.data.dataset.episode(1)
    rolled = roll_out(rooms.models["encdec"], episode, 0, 3, None, rooms.probes["encdec"])
    away = np.linalg.norm(episode.states[1:4, :2] - episode.states[0, :2], axis=1)
    assert np.allclose(rolled.errors["position"]["persistence"], away, atol=1e-4)
    assert rolled.frames.keys() == {"own decoder"} and rolled.errors.keys() == {"position", "latent"}


def test_stacked_frames_and_positions_in_standard_deviations(cart):
    for name, world in cart.models.items():
        rolled = roll_out(world, cart.data.dataset.episode(2), 0, 3, cart.decoders[name], cart.probes[name])
        assert world.frame_stack == 3 and "position_std" in rolled.errors
        assert all(frames.shape == (4, 3, 32, 32) for frames in rolled.frames.values())
        assert ("own decoder" in rolled.frames) == world.decodes


def test_nothing_is_drawn_from_a_generator(rooms):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    shuffled_actions(rooms, 1, 3)
    roll_out(rooms.models["vjepa2"], rooms.data.dataset.episode(1), 1, 2)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_shuffled_actions_are_anothers(rooms):
    dataset = rooms.data.dataset
    drawn = [shuffled_actions(rooms, 1, 4, seed) for seed in range(6)]
    assert len({actions.tobytes() for actions in drawn}) > 1
    held_out = {dataset.episode(i).actions[k:k + 4].tobytes() for i in (2, 3) for k in range(3)}
    assert {actions.tobytes() for actions in drawn} <= held_out
    alone = replace(rooms, data=replace(rooms.data, validation=np.array([1])))
    mixed, own = shuffled_actions(alone, 1, 6), dataset.episode(1).actions[:6]
    assert sorted(mixed.tolist()) == sorted(own.tolist()) and not np.array_equal(mixed, own)


@pytest.mark.parametrize("spec", [PLANE, LANES, FEW])
def test_actions_as_text_and_back(spec):
    wide = (5,) if spec.kind == "discrete" else (5, spec.n)
    unit = np.random.default_rng(0).uniform(-1, 1, wide)
    actions = np.arange(5) % 3 if spec.kind == "discrete" else spec.scale(unit)
    back = parse_actions(write_actions(actions), spec, 5)
    assert back.shape == wide and back.dtype == still_actions(spec, 5).dtype
    assert np.allclose(back, actions, atol=.02)


def test_the_last_word_is_repeated_and_bounds_hold():
    assert parse_actions("2 1", FEW, 4).tolist() == [2, 1, 1, 1]
    assert parse_actions("2 1 0", FEW, 2).tolist() == [2, 1]
    assert parse_actions("5,-5", PLANE, 2).tolist() == [[1, -1]] * 2
    assert np.array_equal(parse_actions("", LANES, 3), still_actions(LANES, 3))
    assert still_actions(LANES, 1).tolist() == [[0, .5, 2]] and still_actions(FEW, 2).tolist() == [0, 0]


@pytest.mark.parametrize("spec, text", [(FEW, "3"), (FEW, "-1"), (FEW, "0.5"), (FEW, "1,1"), (FEW, "up"),
                                        (PLANE, "1"), (PLANE, "1,0,0"), (PLANE, "nan,0"), (PLANE, "1;0")])
def test_other_text_is_refused_with_an_example(spec, text):
    with refused(ValueError, "for each step, such as") as caught: parse_actions(text, spec, 3)
    example = str(caught.value).split('"')[1]
    assert len(parse_actions(example, spec, 3)) == 3


def test_a_stroke_through_the_plane_is_cut_into_equal_parts():
    none = still_actions(PLANE, 3)
    assert np.allclose(stroke_actions(np.array([[0, 0], [1, 1]]), PLANE, none), [[-1, -1], [0, 0], [1, 1]])
    corner = stroke_actions(np.array([[0, 0], [1, 0], [1, 1]]), PLANE, none)
    assert np.allclose(corner, [[-1, -1], [1, -1], [1, 1]])
    assert np.allclose(stroke_actions(np.array([[.5, 2]]), PLANE, none), [[0, 1]] * 3)


def test_a_stroke_through_a_score_sets_the_columns_it_passes():
    score = np.array([0, 0, 0, 1])
    assert stroke_actions(np.array([[.3, .9]]), FEW, score).tolist() == [0, 2, 0, 1]
    assert stroke_actions(np.array([[.1, .9], [.7, .9]]), FEW, score).tolist() == [2, 2, 2, 1]
    assert score.tolist() == [0, 0, 0, 1]
    lanes = stroke_actions(np.array([[.1, 1 / 3], [.9, 1 / 3]]), LANES, still_actions(LANES, 2))
    assert np.allclose(lanes, [[0, 1, 2], [0, 1, 2]])             # the top of the second lane
