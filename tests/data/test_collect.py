"An episode depends on its seed and its number only: not on batches, neighbours, workers or faults."

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from worldmodels_nb.data import collect
from worldmodels_nb.data.collect import gather, is_reproducible
from worldmodels_nb.data.datasets import write_dataset
from worldmodels_nb.data.policies import CollectError
from worldmodels_nb.data.tworooms import EnvError, TwoRoomsEnv, TwoRoomsVectorEnv

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

    def settings(faults, n=5, **more):
        named = {str(episode): list(fault) for episode, fault in faults.items()}
        return make(**base | more, env__kwargs=dict(faults=named), collect__episodes=n)

    return settings


@pytest.mark.parametrize(
    "kind, word",
    [
        ("nan", "reward of nan"),
        ("raise", "out of coal"),
        ("size", "changed its frames"),
        ("none", "reward of None"),
        ("two", "reward of"),
        ("word", "reward of 1"),
        ("end", "truncated of None"),
        ("old", "returned 4 values"),
        ("list", "list"),
        ("float", "changed its frames"),
    ],
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


@pytest.mark.parametrize("fault", [("reset", 0), ("raise", 1), ("old", 1), ("none", 1)])
@pytest.mark.parametrize("n", [2, 5])
def test_when_no_episode_works_it_is_one_error(faulty, fault, n):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CollectError, match="sound step, the last because Faulty-v0") as caught:
            got(faulty(dict.fromkeys(range(5), fault), n))
    assert "\n" not in str(caught.value)


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


class LostRow(TwoRoomsVectorEnv):
    "Two rooms, of which the second loses its state at the third step, or at the reset."

    t, at = 0, 3

    def lost(self, info):
        states = info["state"].copy()
        if self.t == self.at:
            states[1, 0] = np.inf
        return dict(state=states)

    def reset(self, **options):
        self.t = 0
        frames, info = super().reset(**options)
        return frames, self.lost(info)

    def step(self, actions):
        self.t += 1
        *answer, info = super().step(actions)
        return *answer, self.lost(info)


gym.register("LostRow-v0", "worldmodels_nb.data.tworooms:TwoRoomsEnv", vector_entry_point=LostRow)


@pytest.mark.parametrize("at, kept", [(0, None), (1, None), (3, 2), (5, 4)])
def test_a_state_that_is_not_finite_ends_its_row_only(small, at, kept, monkeypatch):
    monkeypatch.setattr(LostRow, "at", at)
    with pytest.warns(UserWarning, match="episode 1 is .*LostRow-v0 gave a state"):
        episodes = got(small("LostRow-v0"))
    lengths = {episode.index: len(episode.actions) for episode in episodes}
    assert lengths.pop(1, None) == kept and lengths == {i: 5 for i in (0, 2, 3, 4, 5)}


# ---------------------------------------------------------------- environments that hang


@pytest.mark.parametrize("at, workers", [(1, 0), (4, 0), (8, 0), (4, 1)])
def test_an_environment_that_hangs_loses_its_episode_only(faulty, at, workers):
    settings = faulty({1: ("sleep", at)}, 4, env__timeout=0.5, collect__workers=workers)
    if workers:  # there it is known by a module
        settings = settings.model_copy(update=dict(env=settings.env.model_copy(update=dict(id=FAULTY))))
    with pytest.warns(UserWarning, match="episode 1 is left out: .*did not come back within 0.5 s") as caught:
        episodes = got(settings)
    # its successor is a fresh environment, which counts its episodes from zero and hangs in its second
    assert [episode.index for episode in episodes] == [0, 2] and len(caught) == 2


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


FAULTY = "own_faulty:OwnFaulty-v0"


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    "A working directory with a module of one's own in it, where the package was not imported."
    source = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    (tmp_path / "own_faulty.py").write_text(source.replace("Faulty-v0", "OwnFaulty-v0"), encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


OWN = """
import ctypes, os, pathlib, signal, time
import gymnasium as gym, numpy as np
from worldmodels_nb.data.tworooms import TwoRoomsEnv
class Env(TwoRoomsEnv):
    def __init__(self, hang="", folder="", render_mode=None):
        super().__init__(render_mode=render_mode)
        self.hang, self.folder = hang, pathlib.Path(folder)
    def reset(self, *, seed=None, options=None):
        (self.folder / f"{os.getpid()}.pid").write_text("")
        self.t = 0
        return super().reset(seed=seed)
    def step(self, action):
        self.t += 1
        if self.hang == "python":
            while True: pass
        if self.hang == "sleep": time.sleep(600)
        if self.hang == "slow": time.sleep(.05)
        if self.hang == "C" and self.states[0, 0] < 32:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            ctypes.PyDLL(None).sleep(600)  # nobody else in this process gets a turn
        return super().step(action)
gym.register("Own-v0", Env)
"""


@pytest.fixture
def own(small, tmp_path):
    "own(hang, …): settings of an environment from a module in the working directory, which leaves its pid."
    (tmp_path / "own_games.py").write_text(OWN)
    here = dict(folder=str(tmp_path))
    return lambda hang="", **more: small("own_games:Own-v0", env__kwargs=dict(hang=hang, **here), **more)


def test_workers_find_a_module_in_the_working_directory(own, small, assert_same):
    one, two = got(own(collect__workers=2)), got(small())
    assert len(one) == 6
    assert_same(one, got(own()))
    assert [episode.frames.shape for episode in one] == [episode.frames.shape for episode in two]


def test_a_worker_that_is_stuck_outside_of_python_is_ended(own, small, monkeypatch):
    monkeypatch.setattr(collect, "_patience", lambda env: 2.0)
    with pytest.warns(UserWarning, match="did not come back within env.timeout, and was ended"):
        stuck = {episode.index for episode in got(own("C", collect__workers=1))}
    assert stuck == {episode.index for episode in got(small()) if (episode.states[:-1, 0] >= 32).all()}


SCRIPT = """
import sys
from worldmodels_nb.data.collect import gather
from worldmodels_nb.settings import load_settings
if __name__ == "__main__":
    hang, folder = sys.argv[1:]
    small = {"env.size": 40, "env.color": "grey", "decoder.patch_size": 8, "collect.episodes": 500}
    own = {"env.id": "own_games:Own-v0", "env.kwargs": dict(hang=hang, folder=folder), "env.timeout": 0.0}
    ppo = {"collect.policy": "ppo", "collect.ppo.subprocesses": True, "collect.ppo.n_envs": 2}
    ppo |= {"data.dir": folder}
    how = ppo if hang == "ppo" else {"collect.workers": 2}
    list(gather(load_settings(overrides=small | own | how), progress=False))
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes there are")
@pytest.mark.parametrize(
    "hang, kill",
    [("sleep", signal.SIGTERM), ("python", signal.SIGKILL), ("C", signal.SIGKILL), ("ppo", signal.SIGKILL)],
)
def test_workers_end_when_their_parent_is_killed(own, hang, kill, tmp_path):
    if hang == "ppo":
        pytest.importorskip("stable_baselines3")
    own()
    (tmp_path / "script.py").write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, "script.py", hang, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("*.pid"))) >= 2)
        workers = [int(path.stem) for path in tmp_path.glob("*.pid") if int(path.stem) != parent.pid]
        assert len(workers) >= 2 and all(map(is_running, workers))
    finally:
        parent.send_signal(kill)
        parent.wait()
    assert wait_until(lambda: not any(map(is_running, workers)), 30)


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


# ---------------------------------------------------------------- is it the same the second time?


class Careless(TwoRoomsEnv):
    "Its rewards come from somewhere: a generator of everybody's, its own, the clock, or its past."

    made = 0

    def __init__(self, source, render_mode=None):
        super().__init__(render_mode=render_mode)
        Careless.made, self.past = Careless.made + 1, 0
        sources = dict(
            seeded=lambda: self.np_random.random(),
            numpy=np.random.random,
            python=random.random,
            torch=lambda: torch.rand(1).item(),
            own=np.random.default_rng().random,
            clock=lambda: time.perf_counter_ns() % 1000 / 1000,
            system=lambda: os.urandom(1)[0] / 256,
            past=lambda: self.past / 1000,
            others=lambda: Careless.made / 1000,
            nothing=lambda: 0.0,
        )
        self.source = sources[source]

    def step(self, action):
        self.past += 1
        observation, _, *rest = super().step(action)
        return observation, self.source(), *rest


gym.register("Unsure-v0", Careless)


@pytest.mark.parametrize("source", ["numpy", "python", "torch", "own", "clock", "system", "past", "others"])
def test_what_depends_on_more_than_its_seed_is_found_out(small, source):
    settings = small("Unsure-v0", env__kwargs=dict(source=source))
    for _ in range(2):
        seed_globals()
        assert not is_reproducible(settings)


@pytest.mark.parametrize(
    "id, extra",
    [
        ("Unsure-v0", dict(env__kwargs=dict(source="seeded"))),
        ("Unsure-v0", dict(env__kwargs=dict(source="nothing"))),
        (ROOMS, dict(env__kwargs=dict(wall="random"), collect__steps=100)),
        ("CartPole-v1", dict(collect__steps=100, env__frame_skip=1)),
        ("Pendulum-v1", dict(collect__policy="ppo", env__action_repeat=2)),
        ("Acrobot-v1", dict(collect__steps=1, collect__random_share=1.0)),
    ],
)
def test_what_depends_on_its_seed_is_reproducible_and_is_not_stepped_long(small, id, extra, monkeypatch):
    lengths, run = [], collect._run
    monkeypatch.setattr(collect, "_run", lambda *args: lengths.append(run(*args)) or lengths[-1])
    assert is_reproducible(small(id, **extra))
    assert len(lengths) == 3 and all(len(one.actions) <= 32 for found in lengths for one, _ in found)


def test_an_environment_that_never_works_is_equally_bad_twice(faulty):
    assert is_reproducible(faulty(dict.fromkeys(range(3), ("reset", 0))))
    assert not is_reproducible(faulty({0: ("raise", 2)}))


@pytest.mark.parametrize("fault", [("reset", 0), ("raise", 1), ("old", 1)])
@pytest.mark.parametrize("first", [2, 3, 4])
def test_a_dataset_keeps_what_came_before_an_environment_broke_for_good(faulty, fault, first, tmp_path):
    broken = faulty(dict.fromkeys(range(first, 9), fault), 9)
    with pytest.warns(UserWarning, match=f"keeps {first} episodes: three episodes in a row"):
        assert len(write_dataset(broken, tmp_path / "kept", progress=False)) == first
