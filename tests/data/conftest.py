"Episodes, datasets and a faulty environment, for the tests of everything between a policy and a window."

import time

import gymnasium as gym
import numpy as np
import pytest

from worldmodels_nb.data.datasets import open_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.settings import load_settings

DISCRETE = DataSpec((1, 2, 2), ActionSpec("discrete", 5), [], [])
CONTINUOUS = DataSpec(
    (3, 2, 4), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), ["agent x", "wall x", "speed"], [0]
)


@pytest.fixture(scope="session")
def discrete():
    "Grey frames, five actions, no states."
    return DISCRETE


@pytest.fixture(scope="session")
def continuous():
    "Coloured frames, two continuous actions, three states."
    return CONTINUOUS


@pytest.fixture(params=[DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def either(request):
    "Both kinds of data."
    return request.param


def _episode(spec, L, rng, terminated=False):
    frames = rng.integers(0, 256, (L + 1, *spec.frame_shape), np.uint8)
    if spec.action.kind == "discrete":
        actions = rng.integers(0, spec.action.n, L)
    else:
        actions = rng.uniform(-1, 1, (L, spec.action.n)).astype(np.float32)
    names = len(spec.state_names)
    states = rng.normal(size=(L + 1, names)).astype(np.float32) if names else None
    return Episode(frames, actions, rng.normal(size=L).astype(np.float32), terminated, states)


def _episodes(spec, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [_episode(spec, L, rng, bool(rng.random() < 0.5)) for L in lengths]


def _written(folder, spec, episodes, **about):
    with EpisodeWriter(folder, spec, about) as writer:
        for episode in episodes:
            writer.add(episode)
    return open_dataset(folder)


def _assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.index == b.index and a.terminated == b.terminated
        for name in ("frames", "actions", "rewards", "states"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)), name


@pytest.fixture(scope="session")
def make_episodes():
    "make_episodes(spec, lengths, seed): random ones, some of which terminate."
    return _episodes


@pytest.fixture(scope="session")
def written():
    "written(folder, spec, episodes, **settings): a dataset, written and opened."
    return _written


@pytest.fixture(scope="session")
def assert_same():
    "assert_same(some, others): the same episodes, types included."
    return _assert_same


@pytest.fixture(scope="session")
def left_in():
    "left_in(folder): names of all that is there."
    return lambda folder: sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def make():
    "make(env__id=…): settings with these overrides."
    return lambda **over: load_settings(overrides={key.replace("__", "."): v for key, v in over.items()})


class Faulty(gym.Env):
    "Eight steps of a growing picture; `faults`: number of an episode, counted by resets, to [kind, step]."

    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, faults, render_mode=None):
        self.faults = {int(episode): fault for episode, fault in faults.items()}
        self.episode, self.render_mode = -1, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.kind, self.at = self.faults.get(self.episode, ("", -1))
        if self.kind == "reset":
            raise RuntimeError("no board")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        fault = self.t == self.at
        if fault and self.kind == "raise":
            raise RuntimeError("out of coal")
        if fault and self.kind == "sleep":
            time.sleep(60)
        rewards = {"nan": float("nan"), "none": None, "two": np.ones(2), "word": "1"}
        reward = rewards.get(self.kind, 1.0) if fault else 1.0
        over = None if fault and self.kind == "end" else False
        answer = np.zeros(1, np.float32), reward, self.t == 8, over, {}
        return answer[1:] if fault and self.kind == "old" else answer

    def render(self):
        picture = np.full((8, 8, 3), 10 * self.t, np.uint8)
        faults = {"size": np.zeros((9, 8, 3), np.uint8), "list": [picture], "float": picture / 255}
        return faults.get(self.kind, picture) if self.t == self.at else picture


gym.register("Faulty-v0", Faulty)
