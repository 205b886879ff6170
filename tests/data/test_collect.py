"An episode depends on its seed and its number only: not on batches, neighbours, workers or faults."

import random
import textwrap
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

from worldmodels_nb.data import collect
from worldmodels_nb.data.collect import gather
from worldmodels_nb.data.policies import CollectError
from worldmodels_nb.data.tworooms import EnvError, TwoRoomsVectorEnv

ROOMS = "worldmodels_nb/TwoRooms-v0"


def got(settings):
    return list(gather(settings, progress=False))


@pytest.fixture
def small(make):
    "small(id, …): six episodes of at most five steps, 16 px."
    base = dict(env__size=16, model__patch_size=4, decoder__patch_size=4)
    base |= dict(collect__episodes=6, collect__steps=5)
    return lambda id=ROOMS, **more: make(**base | dict(env__id=id) | more)


# ---------------------------------------------------------------- episodes


@pytest.mark.parametrize(
    "id, kind, states",
    [(ROOMS, (np.float32, 2), 4), ("CartPole-v1", (np.int64,), 4), ("Pendulum-v1", (np.float32, 1), 3)],
)
@pytest.mark.parametrize("policy", ["random", "wander"])
def test_episodes_have_one_frame_more_than_steps(small, id, kind, states, policy):
    for i, episode in enumerate(got(small(id, collect__policy=policy, env__color="grey"))):
        L = len(episode.actions)
        assert 1 <= L <= 5 and episode.index == i
        assert episode.frames.shape == (L + 1, 1, 16, 16) and episode.frames.dtype == np.uint8
        assert episode.actions.shape == (L, *kind[1:]) and episode.actions.dtype == kind[0]
        assert episode.rewards.shape == (L,) and episode.rewards.dtype == np.float32
        assert episode.states.shape == (L + 1, states) and episode.states.dtype == np.float32
        assert episode.terminated is False


def test_ends_that_come_by_themselves_are_marked_and_cuts_are_not(small):
    random_ones = dict(collect__steps=12, collect__episodes=20, collect__policy="random")
    episodes = got(small("CartPole-v1", **random_ones))
    assert {episode.terminated for episode in episodes} == {True, False}
    for episode in episodes:
        assert episode.terminated or len(episode.actions) == 12
    assert all(episode.rewards.sum() == len(episode.actions) for episode in episodes)


@pytest.mark.parametrize(
    "extra",
    [
        dict(),
        dict(env__frame_skip=2),
        dict(env__action_repeat=3),
        dict(collect__random_share=0.5),
        dict(collect__policy="random"),
        dict(env__kwargs=dict(wall="random"), env__size=64, decoder__patch_size=8),
    ],
)
def test_a_batch_gives_the_same_episodes_as_one_at_a_time(small, assert_same, extra, monkeypatch):
    settings = small(**extra)
    batched = got(settings)
    monkeypatch.setattr(collect, "can_batch", lambda settings: False)
    assert_same(batched, got(settings))


@pytest.mark.parametrize("id", [ROOMS, "Pendulum-v1"])
def test_an_episode_does_not_depend_on_how_many_there_are(small, assert_same, id):
    assert_same(got(small(id, collect__episodes=7))[:2], got(small(id, collect__episodes=2)))


def test_seeds_make_episodes_and_differ(small, assert_same):
    one, two = got(small(run__seed=1)), got(small(run__seed=2))
    assert_same(one, got(small(run__seed=1)))
    assert not np.array_equal(one[0].states, two[0].states)
    assert not np.array_equal(one[0].states, one[1].states)


def test_more_episodes_than_fit_in_a_batch(small):
    episodes = got(small(collect__episodes=150))
    assert [episode.index for episode in episodes] == list(range(150))
    assert len({episode.states[0].tobytes() for episode in episodes}) == 150


def test_frames_are_a_limit(small):
    many = dict(collect__steps=40, collect__episodes=30)
    counts = np.cumsum([len(episode.frames) for episode in got(small("CartPole-v1", **many))])
    limited = got(small("CartPole-v1", **many, collect__frames=int(counts[4]) - 1))
    assert len(limited) == 5
    assert len(got(small("CartPole-v1", **many, collect__frames=int(counts[4])))) == 5


@pytest.mark.parametrize("id", ["Pendulum-v1", ROOMS])
def test_workers_change_nothing(small, assert_same, id):
    extra = dict(collect__frames=400) if id == "Pendulum-v1" else dict(collect__episodes=130)
    assert_same(got(small(id, **extra)), got(small(id, collect__workers=2, **extra)))


def seed_globals():
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def draw_globals():
    return random.random(), np.random.random(), torch.rand(1)


def test_global_generators_are_left_alone(small):
    seed_globals()
    expected = draw_globals()
    seed_globals()
    got(small("CartPole-v1"))
    assert draw_globals() == expected


def test_the_bar_is_shown_only_when_asked_for(small, capsys):
    got(small())
    assert capsys.readouterr().err == ""
    list(gather(small()))
    assert "frames/s" in capsys.readouterr().err


def test_an_unknown_environment_is_an_error_before_anything_runs(small):
    for workers in (0, 2):
        with pytest.raises(EnvError, match="CartPole-v1"):
            got(small("CartPol-v1", collect__workers=workers))


def test_atari(small, assert_same):
    pytest.importorskip("ale_py")
    slow = dict(env__kwargs=dict(frameskip=1), env__action_repeat=4, env__color="grey")
    settings = small("ALE/Pong-v5", **slow, collect__episodes=2)
    episodes = got(settings)
    assert episodes[0].states.shape == (6, 128) and episodes[0].states.dtype == np.uint8
    assert_same(episodes, got(settings))


# ---------------------------------------------------------------- faults


@pytest.fixture
def faulty(make):
    "faulty(faults, episodes): settings for the faulty environment."
    base = dict(env__id="Faulty-v0", env__size=8, decoder__patch_size=8, collect__steps=20)
    return lambda faults, n=5: make(**base, env__kwargs=dict(faults=faults), collect__episodes=n)


@pytest.mark.parametrize(
    "kind, word", [("nan", "reward of nan"), ("raise", "out of coal"), ("size", "changed its frames")]
)
def test_a_fault_ends_its_episode_and_no_other(faulty, kind, word):
    with pytest.warns(UserWarning) as caught:
        episodes = got(faulty({1: (kind, 4)}))
    assert [len(episode.actions) for episode in episodes] == [8, 3, 8, 8, 8]
    assert [episode.terminated for episode in episodes] == [True, False, True, True, True]
    assert (episodes[1].frames[:, 0, 0, 0] == [0, 10, 20, 30]).all()
    assert len(episodes[1].rewards) == 3 and np.isfinite(episodes[1].rewards).all()
    sentence = str(caught[0].message)
    assert len(caught) == 1 and word in sentence and "episode 1 is kept up to step 3" in sentence


@pytest.mark.parametrize("fault", [("nan", 1), ("raise", 1), ("size", 1), ("reset", 0)])
def test_an_episode_without_a_sound_step_is_left_out(faulty, fault):
    with pytest.warns(UserWarning, match="episode 2 is left out"):
        episodes = got(faulty({2: fault}))
    assert [episode.index for episode in episodes] == [0, 1, 3, 4]


def test_three_lost_episodes_in_a_row_are_too_many(faulty):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = {0: ("raise", 1), 1: ("raise", 1), 3: ("raise", 1)}
        assert [episode.index for episode in got(faulty(some))] == [2, 4]
        kept, three = [], {1: ("reset", 0), 2: ("raise", 1), 3: ("reset", 0)}
        with pytest.raises(CollectError, match="three episodes in a row.*no board"):
            for episode in gather(faulty(three), progress=False):
                kept.append(episode.index)
        assert kept == [0]


class NanRow(TwoRoomsVectorEnv):
    "Two rooms, of which every third gives no number at its third step."

    def reset(self, **options):
        self.t = 0
        return super().reset(**options)

    def step(self, actions):
        self.t += 1
        frames, rewards, *rest = super().step(actions)
        broken = (np.arange(self.num_envs) % 3 == 1) & (self.t == 3)
        return frames, np.where(broken, np.nan, rewards), *rest


gym.register("NanRow-v0", "worldmodels_nb.data.tworooms:TwoRoomsEnv", vector_entry_point=NanRow)


def test_a_fault_in_one_row_of_a_batch_ends_that_row_only(small):
    with pytest.warns(UserWarning) as caught:
        broken = got(small("NanRow-v0"))
    assert [len(episode.actions) for episode in broken] == [5, 2, 5, 5, 2, 5] and len(caught) == 2
    whole = got(small())
    assert all(np.array_equal(b.frames, w.frames[: len(b.frames)]) for b, w in zip(broken, whole))


MODULE = """
import multiprocessing, os, gymnasium as gym, numpy as np
class Env(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    def __init__(self, die, render_mode=None): self.die, self.render_mode = die, render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}
    def step(self, action):
        self.t += 1
        if self.die and multiprocessing.parent_process() is not None: os._exit(3)
        if self.t == 3 and not self.die: raise RuntimeError("out of coal")
        return np.zeros(1, np.float32), 1., False, False, {}
    def render(self): return np.zeros((8, 8, 3), np.uint8)
gym.register("FromModule-v0", Env)
"""


@pytest.mark.parametrize("die", [True, False])
def test_trouble_in_a_worker_reaches_its_parent(make, die, tmp_path, monkeypatch):
    name, id = f"module_with_env_{int(die)}", f"FromModule{int(die)}-v0"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE).replace("FromModule-v0", id))
    monkeypatch.syspath_prepend(tmp_path)
    size = dict(env__size=8, decoder__patch_size=8, collect__episodes=2, collect__workers=1)
    settings = make(env__id=f"{name}:{id}", env__kwargs=dict(die=die), **size)
    if die:
        with pytest.raises(CollectError, match="collect.workers"):
            got(settings)
    else:
        with pytest.warns(UserWarning, match="out of coal") as caught:
            assert [len(episode.actions) for episode in got(settings)] == [2, 2]
        assert len(caught) == 2
