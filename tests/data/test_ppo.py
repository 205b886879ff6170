"An agent is trained once, on what its folder's name says, and acts by its own probabilities."

import importlib.util
import json
import os
import random
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from worldmodels_nb.data import collect, ppo
from worldmodels_nb.data.collect import gather
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.policies import CollectError
from worldmodels_nb.data.ppo import AgentEnv, AgentPolicy, agent_folder, prepare_agent
from worldmodels_nb.data.tworooms import EnvError

ROOMS = "worldmodels_nb/TwoRooms-v0"
FRAMES = dict(env__size=36, env__color="grey", model__patch_size=4, decoder__patch_size=4)
AMOUNT = dict(model__frame_stack=2, collect__episodes=3, collect__steps=6)
TRAIN = dict(train_steps=32, n_envs=2, n_steps=16, batch_size=16, n_epochs=1)
TINY = dict(collect__policy="ppo", **FRAMES, **AMOUNT)


def of_ppo(**keys):
    return {f"collect__ppo__{key}": value for key, value in keys.items()}


TINY |= of_ppo(**TRAIN)


def got(settings):
    return list(gather(settings, progress=False))


@pytest.fixture
def agent(make, tmp_path):
    "agent(id, …): settings of a tiny agent, kept in a folder of this test's own."
    return lambda id="CartPole-v1", **more: make(**TINY | dict(env__id=id, data__dir=str(tmp_path)) | more)


@pytest.fixture
def sb3():
    return pytest.importorskip("stable_baselines3")


@pytest.mark.parametrize(
    "id, extra",
    [
        ("CartPole-v1", dict()),
        ("Pendulum-v1", of_ppo(policy_type="MlpPolicy")),
        (ROOMS, dict(env__color="rgb")),
    ],
)
def test_an_agent_is_trained_once_and_acts_the_same_ever_after(
    sb3, agent, assert_same, id, extra, tmp_path, monkeypatch
):
    settings = agent(id, **extra)
    first = got(settings)
    folder = agent_folder(settings)
    assert folder.parent == tmp_path / "agents"
    assert sorted(file.name for file in folder.iterdir()) == ["agent.json", "weights.safetensors"]
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(ppo, "train_agent", lambda *_: pytest.fail("trained twice"))
    assert_same(first, got(settings))
    assert_same(first[:2], got(agent(id, collect__episodes=2, **extra)))
    loaded = of_ppo(load=str(folder))
    assert_same(first, got(agent(id, run__device="cpu", **loaded, **extra)))


def test_an_agent_in_a_batch_does_what_it_does_alone(sb3, agent, monkeypatch):
    settings = agent(ROOMS)
    batched = got(settings)
    monkeypatch.setattr(collect, "can_batch", lambda settings: False)
    for one, two in zip(batched, got(settings)):
        np.testing.assert_allclose(one.actions, two.actions, atol=1e-4)
        np.testing.assert_allclose(one.states, two.states, atol=1e-2)


def test_agents_differ_by_what_their_training_depends_on(agent):
    base = agent_folder(agent())
    for change in (
        dict(run__seed=1),
        of_ppo(gamma=0.9),
        dict(model__frame_stack=3),
        dict(collect__steps=9),
        dict(env__kwargs=dict(sutton_barto_reward=True)),
    ):
        assert agent_folder(agent(**change)) != base
    for change in (
        of_ppo(extra_log_std=1.0),
        dict(collect__episodes=9),
        dict(collect__workers=2),
        of_ppo(subprocesses=True),
    ):
        assert agent_folder(agent(**change)) == base


def test_an_agents_name_is_what_it_always_was(make):
    "Agents that were trained earlier are found."
    frames = dict(env__id="CartPole-v1", env__size=40, env__color="grey", decoder__patch_size=8)
    settings = make(
        **frames,
        model__frame_stack=2,
        collect__steps=20,
        collect__policy="ppo",
        **of_ppo(train_steps=256, n_envs=2),
    )
    assert agent_folder(settings).name == "ppo-9c42dcb2"


def test_all_of_ppos_settings_reach_it(sb3, agent, monkeypatch):
    given, real = {}, sb3.PPO

    class Spy(real):
        def __init__(self, policy, env, **kwargs):
            given.update(kwargs, policy=policy, n_envs=env.num_envs)
            super().__init__(policy, env, **kwargs)

        def learn(self, total_timesteps, **kwargs):
            given["train_steps"] = total_timesteps
            return super().learn(total_timesteps, **kwargs)

    monkeypatch.setattr(sb3, "PPO", Spy)
    numbers = dict(learning_rate=1e-4, n_steps=8, batch_size=8, n_epochs=2)
    numbers |= dict(gamma=0.9, gae_lambda=0.8, clip_range=0.3)
    prepare_agent(agent(run__seed=4, **of_ppo(train_steps=16, **numbers)), progress=False)
    assert {key: given[key] for key in numbers} == numbers
    found = [given[key] for key in ("policy", "n_envs", "train_steps", "seed")]
    assert found == ["CnnPolicy", 2, 16, 4]


class Bandit(gym.Env):
    "The second of two actions pays."

    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), False, False, {}

    def render(self):
        return np.full((8, 8, 3), 128, np.uint8)


gym.register("Bandit-v0", Bandit)


def test_training_learns_what_it_is_paid_for(sb3, agent):
    frames = dict(env__size=8, decoder__patch_size=8, model__frame_stack=1)
    amount = dict(collect__steps=20, collect__episodes=4)
    train = of_ppo(train_steps=768, n_steps=64, batch_size=64, n_epochs=10, learning_rate=3e-3)
    settings = agent("Bandit-v0", **frames, **amount, **train | of_ppo(policy_type="MlpPolicy"))
    assert np.mean([episode.rewards.mean() for episode in got(settings)]) > 0.8


def test_extra_log_std_widens_continuous_actions(sb3, agent):
    spread = {}
    for extra in (-8.0, 0.0, 2.0):
        own = of_ppo(extra_log_std=extra, policy_type="MlpPolicy")
        episodes = got(agent("Pendulum-v1", collect__steps=30, **own))
        actions = np.concatenate([episode.actions for episode in episodes])
        assert np.abs(actions).max() <= 2
        spread[extra] = actions.std()
    assert spread[-8.0] < 0.1 < spread[0.0] < spread[2.0]


def test_discrete_actions_follow_the_agents_probabilities(sb3, agent):
    settings = agent()
    prepare_agent(settings, progress=False)
    policy = AgentPolicy(settings, ActionSpec("discrete", 2), (1, 36, 36))
    frame = np.random.default_rng(0).integers(0, 256, (1, 1, 36, 36), dtype=np.uint8)
    policy.start([np.random.default_rng(seed) for seed in range(4000)], 1)
    policy.observe(frame.repeat(4000, 0))
    stacked = torch.from_numpy(np.tile(frame, (1, 2, 1, 1)))
    with torch.no_grad():
        wanted = policy.agent.get_distribution(stacked).distribution.probs[0, 1]
    assert abs(policy.draw().mean() - wanted.item()) < 0.03


def test_an_agents_environment_stacks_frames_and_cuts_episodes(make):
    settings = make(**TINY | dict(env__id="Pendulum-v1", model__frame_stack=3, collect__steps=4))
    env = AgentEnv(settings)
    first, _ = env.reset(seed=1)
    assert env.observation_space.contains(first) and first.shape == (3, 36, 36)
    assert np.array_equal(first[0], first[2])
    steps = [env.step(np.float32([0.5])) for _ in range(4)]
    assert [truncated for *_, truncated, _ in steps] == [False, False, False, True]
    assert np.array_equal(steps[1][0][:2], steps[0][0][1:]) and np.array_equal(steps[0][0][0], first[0])
    again, _ = AgentEnv(settings).reset(seed=1)
    following, _ = env.reset()
    assert np.array_equal(first, again) and not np.array_equal(first, following)
    with pytest.raises(CollectError, match="no options"):
        env.reset(options=dict(state=1))


def seed_globals():
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def draw_globals():
    return random.random(), np.random.random(), torch.rand(1)


def test_training_leaves_global_generators_alone(sb3, agent):
    seed_globals()
    expected = draw_globals()
    seed_globals()
    got(agent())
    assert draw_globals() == expected


def test_an_agent_trains_in_subprocesses_and_collects_with_workers(sb3, agent, assert_same):
    apart = agent(**of_ppo(subprocesses=True, n_envs=1, train_steps=16))
    assert_same(got(apart), got(agent(collect__workers=1, **of_ppo(n_envs=1, train_steps=16))))


def test_a_missing_extra_is_named(make, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CollectError) as caught:
        got(make(**TINY))
    assert 'pip install "worldmodels_nb[ppo]"' in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(env__size=32), ["env.size", "36"]),
        (dict(model__frame_stack=16, env__color="rgb"), ["model.frame_stack", "env.size"]),
        (of_ppo(load="nowhere/at/all"), ["collect.ppo.load", "null"]),
    ],
)
def test_what_ppo_cannot_do_is_said_first(sb3, agent, change, words, tmp_path):
    with pytest.raises(CollectError) as caught:
        got(agent(**change))
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "agents").exists()


def test_an_agent_that_does_not_fit_or_is_damaged_is_refused(sb3, agent):
    folder = prepare_agent(agent(), progress=False)
    loaded = of_ppo(load=str(folder))
    with pytest.raises(CollectError, match="frame_stack is 2, not 1"):
        got(agent(model__frame_stack=1, **loaded))
    with pytest.raises(CollectError, match="action is"):
        got(agent("Pendulum-v1", **loaded))
    (folder / "weights.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CollectError, match="cannot be used"):
        got(agent())
    record = json.loads((folder / "agent.json").read_text())
    (folder / "agent.json").write_text(json.dumps(record | dict(schema_version=2)))
    with pytest.raises(CollectError, match="schema version 2, and this code reads 1"):
        got(agent())
    (folder / "agent.json").write_text("{")
    with pytest.raises(CollectError, match="no agent that can be read"):
        got(agent())
    (folder / "agent.json").unlink()
    with pytest.raises(CollectError, match="no agent that can be read.*no agent.json"):
        got(agent())


def test_a_training_that_fails_leaves_nothing_behind(sb3, agent, tmp_path):
    broken = agent("Faulty-v0", env__kwargs=dict(faults={"0": ["raise", 2]}))
    with pytest.raises(EnvError, match="out of coal"):
        prepare_agent(broken, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_agent_that_cannot_be_written_leaves_nothing_and_another_run_may_be_faster(tmp_path, monkeypatch):
    net, folder = torch.nn.Linear(2, 2), tmp_path / "agents" / "one"

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(OSError, match="No space"):
            ppo._save_agent(net, {}, folder)
    assert list(folder.parent.iterdir()) == []
    ppo._save_agent(net, dict(first=True), folder)
    ppo._save_agent(net, dict(first=False), folder)
    assert json.loads((folder / "agent.json").read_text())["first"] is True
    assert list(folder.parent.iterdir()) == [folder]


def test_an_agents_record_says_what_it_fits(sb3, agent):
    record = json.loads((prepare_agent(agent(), progress=False) / "agent.json").read_text())
    action = dict(kind="discrete", n=2, low=None, high=None)
    assert record == dict(
        schema_version=1, policy_type="CnnPolicy", frame_stack=2, frame_shape=[1, 36, 36], action=action
    )


def test_a_timeout_is_no_part_of_an_agents_name_and_a_home_is_found(agent, tmp_path, monkeypatch):
    assert len({agent_folder(agent(env__timeout=seconds)) for seconds in (0.0, 1.0, 60.0)}) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert agent_folder(agent(**of_ppo(load="~/agents/mine"))) == tmp_path / "agents" / "mine"
    assert agent_folder(agent(data__dir="~/data")).parent == tmp_path / "data" / "agents"


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"\xff\xfe{}",
        b'{"schema_version": 1}',
        b'{"schema_version": 1, "policy_type": "CnnPolicy", "frame_stack": 2}',
        b"[" * 100_000,
        b'{"schema_version": 1, "frame_stack": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_damaged_record_of_an_agent_is_one_sentence(sb3, agent, data, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "agent.json").write_bytes(data)
    with pytest.raises(CollectError, match="agent.json.*collect.ppo.load") as caught:
        got(agent(**of_ppo(load=str(folder))))
    assert "\n" not in str(caught.value)


def test_a_damaged_record_that_is_a_folder_is_one_sentence(sb3, agent, tmp_path):
    (tmp_path / "damaged" / "agent.json").mkdir(parents=True)
    with pytest.raises(CollectError, match="agent.json"):
        got(agent(**of_ppo(load=str(tmp_path / "damaged"))))


GAME = """
import os, multiprocessing
import gymnasium as gym
from worldmodels_nb.data.tworooms import TwoRoomsEnv
class Game(TwoRoomsEnv):
    def __init__(self, fault="", render_mode=None):
        super().__init__(render_mode=render_mode)
        self.fault, self.t = fault, 0
    def step(self, action):
        self.t += 1
        if self.fault and self.t == 5 and multiprocessing.parent_process():
            if self.fault == "exit": os._exit(3)
            if self.fault == "sleep": import time; time.sleep(600)
            raise RuntimeError("out of coal")
        return super().step(action)
gym.register("Game-v0", Game)
"""


@pytest.mark.parametrize("fault", ["", "exit", "sleep", "raise"])
def test_processes_of_ppo_find_modules_here_and_their_trouble_is_one_error(
    sb3, agent, fault, tmp_path, monkeypatch, capfd
):
    (tmp_path / "game_of_ppo.py").write_text(GAME)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    apart = of_ppo(subprocesses=True, n_envs=1, train_steps=16)
    fault = dict(env__kwargs=dict(fault=fault), env__timeout=2.0)
    settings = agent("game_of_ppo:Game-v0", **fault, **apart)
    if not fault["env__kwargs"]["fault"]:
        assert (prepare_agent(settings, progress=False) / "agent.json").exists()
        return
    with pytest.raises(CollectError, match="process of PPO died.*collect.ppo.subprocesses"):
        prepare_agent(settings, progress=False)
    assert not agent_folder(settings).exists()
