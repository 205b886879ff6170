"Policies do what they say, and an episode depends on its seed and its number only: not on batches, neighbours, workers or faults."
import importlib.util
import json
import random
import textwrap
import warnings
import gymnasium as gym
import numpy as np
import pytest
import torch
from worldmodels_nb import collect
from worldmodels_nb.data.ppo import AgentEnv, AgentPolicy, agent_folder, prepare_agent
from worldmodels_nb.data.policies import CollectError, MixedPolicy, RandomPolicy, WanderPolicy, turned
from worldmodels_nb.data.collect import gather
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.tworooms import EnvError, TwoRoomsVectorEnv
from worldmodels_nb.settings import load_settings

DISCRETE, LINE = ActionSpec("discrete", 4), ActionSpec("continuous", 1, [-2.], [2.])
PLANE, SPACE = ActionSpec("continuous", 2, [-1., -1.], [1., 1.]), ActionSpec("continuous", 3, [0., 0., 0.], [1., 2., 4.])
ALL = [DISCRETE, LINE, PLANE, SPACE]


def run(policy, draws=2000, seeds=(0,), frames=None):
    "Actions (draws, B, ...); frames(t) is shown before each draw, if given."
    policy.start([np.random.default_rng(seed) for seed in seeds], draws)
    out = []
    for t in range(draws):
        if frames: policy.see(frames(t))
        out.append(policy.draw())
    return np.stack(out)


def make(**overrides): return load_settings(overrides={key.replace("__", "."): value for key, value in overrides.items()})


def small(id="worldmodels_nb/TwoRooms-v0", **more):
    return make(**dict(env__id=id, env__size=16, model__patch_size=4, decoder__patch_size=4, collect__episodes=6, collect__steps=5) | more)


def got(settings): return list(gather(settings, progress=False))


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.index == b.index and a.terminated == b.terminated
        for name in ("frames", "actions", "rewards", "states"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y)), name


# ---------------------------------------------------------------- policies

@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize("policy", [RandomPolicy, WanderPolicy])
def test_actions_are_of_their_kind_and_within_bounds(policy, action):
    actions = run(policy(action), 500, seeds=(0, 1))
    assert actions.shape == ((500, 2) if action.kind == "discrete" else (500, 2, action.n))
    assert actions.dtype == action.zeros(1).dtype
    if action.kind == "discrete": assert set(actions.ravel()) == set(range(action.n))
    else: assert (actions >= action.low).all() and (actions <= action.high).all()


@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize("make_one", [RandomPolicy, WanderPolicy, lambda action: MixedPolicy(WanderPolicy(action), .3)])
def test_an_episode_draws_from_its_own_generator_only(make_one, action):
    together, alone = run(make_one(action), 50, seeds=(3, 7, 9)), run(make_one(action), 50, seeds=(7,))
    assert np.array_equal(together[:, 1], alone[:, 0]) and not np.array_equal(together[:, 0], together[:, 1])


def test_random_actions_are_uniform_and_independent():
    actions = run(RandomPolicy(SPACE), 20_000)[:, 0] / SPACE.high
    np.testing.assert_allclose(actions.mean(0), .5, atol=.01)
    np.testing.assert_allclose(actions.std(0), 12 ** -.5, atol=.01)
    assert abs(np.corrcoef(actions[1:, 0], actions[:-1, 0])[0, 1]) < .02


def bessel_ratio(kappa):
    "I1(κ)/I0(κ), the mean cosine of a von Mises angle, by integration."
    angle = np.linspace(-np.pi, np.pi, 20_001)
    weight = np.exp(kappa * (np.cos(angle) - 1))
    return (np.cos(angle) * weight).sum() / weight.sum()


@pytest.mark.parametrize("kappa", [0., .5, 5., 50.])
def test_headings_in_the_plane_turn_by_von_mises_angles(kappa):
    actions = run(WanderPolicy(PLANE, kappa), 20_000)[:, 0]
    length = np.linalg.norm(actions, axis=1)
    heading = actions / length[:, None]
    assert abs((heading[1:] * heading[:-1]).sum(1).mean() - bessel_ratio(kappa)) < .015
    assert length.min() >= .11 - 1e-6 and length.max() <= 1 + 1e-6 and abs(length.mean() - .55) < .01
    across = heading[1:, 0] * heading[:-1, 1] - heading[1:, 1] * heading[:-1, 0]
    assert abs(across.mean()) < .015  # neither to the left nor to the right


def test_headings_in_more_dimensions_forget_at_zero_and_keep_at_large_persistence():
    actions = run(WanderPolicy(ActionSpec("continuous", 3, [-1.] * 3, [1.] * 3), 0.), 20_000)[:, 0]
    heading = actions / np.linalg.norm(actions, axis=1, keepdims=True)
    assert abs((heading[1:] * heading[:-1]).sum(1).mean()) < .02 and np.abs(heading.mean(0)).max() < .02
    actions = run(WanderPolicy(ActionSpec("continuous", 3, [-1.] * 3, [1.] * 3), 200.), 200)[:, 0]
    heading = actions / np.linalg.norm(actions, axis=1, keepdims=True)
    assert (heading[1:] * heading[:-1]).sum(1).mean() > .98


def test_turned_keeps_unit_length():
    rng = np.random.default_rng(0)
    for width in (2, 3, 7):
        heading = rng.normal(size=(50, width)); heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        new = turned(heading, rng.normal(size=(50, width)), 5., rng.random(50) < .5)
        np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("action", [DISCRETE, LINE])
@pytest.mark.parametrize("kappa", [0., 1., 4.])
def test_a_last_action_is_kept_with_the_stated_probability(action, kappa):
    actions = run(WanderPolicy(action, kappa), 20_000).reshape(20_000)
    again = 1 / action.n if action.kind == "discrete" else 0  # the same one may be drawn anew
    share = kappa / (1 + kappa)
    assert abs((actions[1:] == actions[:-1]).mean() - (share + (1 - share) * again)) < .015
    assert abs(actions.mean() - (1.5 if action.kind == "discrete" else 0)) < .12


def first_of_two_stands_still(t):
    frames = np.zeros((2, 3, 4, 4), np.uint8)
    frames[1] = t % 2
    return frames


@pytest.mark.parametrize("action", [DISCRETE, LINE])
def test_where_nothing_moves_the_next_action_is_drawn_anew(action):
    actions = run(WanderPolicy(action, 1000.), 400, seeds=(0, 1), frames=first_of_two_stands_still)
    still, moving = (actions[1:] != actions[:-1]).reshape(399, 2).mean(0)
    assert still > .6 and moving < .05


@pytest.mark.parametrize("action", [PLANE, SPACE])
def test_where_nothing_moves_the_next_heading_is_fresh(action):
    actions = run(WanderPolicy(action, 1000.), 400, seeds=(0, 1), frames=first_of_two_stands_still)
    unit = (actions - action.low) / np.subtract(action.high, action.low) * 2 - 1
    heading = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    still, moving = (heading[1:] * heading[:-1]).sum(-1).mean(0)
    assert abs(still) < .2 and moving > .98


@pytest.mark.parametrize("share", [0., .25, 1.])
def test_a_share_of_actions_is_uniform(share):
    mixed = run(MixedPolicy(WanderPolicy(LINE, 1e9), share), 8000)[:, 0, 0]
    kept = np.unique(mixed, return_counts=True)[1].max() / 8000  # the one action that the walk would hold for ever
    assert abs(kept - (1 - share)) < .02
    if share == 1.: assert abs(mixed.std() - 4 / 12 ** .5) < .03


# ---------------------------------------------------------------- episodes

@pytest.mark.parametrize("id, kind, states", [("worldmodels_nb/TwoRooms-v0", (np.float32, 2), 4), ("CartPole-v1", (np.int64,), 4), ("Pendulum-v1", (np.float32, 1), 3)])
@pytest.mark.parametrize("policy", ["random", "wander"])
def test_episodes_have_one_frame_more_than_steps(id, kind, states, policy):
    for i, episode in enumerate(got(small(id, collect__policy=policy, env__color="grey"))):
        L = len(episode.actions)
        assert 1 <= L <= 5 and episode.index == i
        assert episode.frames.shape == (L + 1, 1, 16, 16) and episode.frames.dtype == np.uint8
        assert episode.actions.shape == (L, *kind[1:]) and episode.actions.dtype == kind[0]
        assert episode.rewards.shape == (L,) and episode.rewards.dtype == np.float32
        assert episode.states.shape == (L + 1, states) and episode.states.dtype == np.float32
        assert episode.terminated is False


def test_ends_that_come_by_themselves_are_marked_and_cuts_are_not():
    episodes = got(small("CartPole-v1", collect__steps=12, collect__episodes=20, collect__policy="random"))
    assert {episode.terminated for episode in episodes} == {True, False}
    for episode in episodes: assert episode.terminated or len(episode.actions) == 12
    assert all(episode.rewards.sum() == len(episode.actions) for episode in episodes)


@pytest.mark.parametrize("extra", [dict(), dict(env__frame_skip=2), dict(env__action_repeat=3), dict(collect__random_share=.5), dict(collect__policy="random"),
                                   dict(env__kwargs=dict(wall="random"), env__size=64, decoder__patch_size=8)])
def test_a_batch_gives_the_same_episodes_as_one_at_a_time(extra, monkeypatch):
    settings = small(**extra)
    batched = got(settings)
    monkeypatch.setattr(collect, "can_batch", lambda settings: False)
    assert_same(batched, got(settings))


@pytest.mark.parametrize("id", ["worldmodels_nb/TwoRooms-v0", "Pendulum-v1"])
def test_an_episode_does_not_depend_on_how_many_there_are(id):
    assert_same(got(small(id, collect__episodes=7))[:2], got(small(id, collect__episodes=2)))


def test_seeds_make_episodes_and_differ():
    one, two = got(small(run__seed=1)), got(small(run__seed=2))
    assert_same(one, got(small(run__seed=1)))
    assert not np.array_equal(one[0].states, two[0].states) and not np.array_equal(one[0].states, one[1].states)


def test_more_episodes_than_fit_in_a_batch():
    episodes = got(small(collect__episodes=150))
    assert [episode.index for episode in episodes] == list(range(150))
    assert len({episode.states[0].tobytes() for episode in episodes}) == 150


def test_frames_are_a_limit():
    counts = np.cumsum([len(episode.frames) for episode in got(small("CartPole-v1", collect__steps=40, collect__episodes=30))])
    limited = got(small("CartPole-v1", collect__steps=40, collect__episodes=30, collect__frames=int(counts[4]) - 1))
    assert len(limited) == 5
    assert len(got(small("CartPole-v1", collect__steps=40, collect__episodes=30, collect__frames=int(counts[4])))) == 5


@pytest.mark.parametrize("id", ["Pendulum-v1", "worldmodels_nb/TwoRooms-v0"])
def test_workers_change_nothing(id):
    extra = dict(collect__frames=400) if id == "Pendulum-v1" else dict(collect__episodes=130)
    assert_same(got(small(id, **extra)), got(small(id, collect__workers=2, **extra)))


def test_global_generators_are_left_alone():
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    got(small("CartPole-v1"))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


def test_the_bar_is_shown_only_when_asked_for(capsys):
    got(small())
    assert capsys.readouterr().err == ""
    list(gather(small()))
    assert "frames/s" in capsys.readouterr().err


def test_an_unknown_environment_is_an_error_before_anything_runs():
    for workers in (0, 2):
        with pytest.raises(EnvError, match="CartPole-v1"): got(small("CartPol-v1", collect__workers=workers))


def test_atari():
    pytest.importorskip("ale_py")
    settings = small("ALE/Pong-v5", env__kwargs=dict(frameskip=1), env__action_repeat=4, env__color="grey", collect__episodes=2)
    episodes = got(settings)
    assert episodes[0].states.shape == (6, 128) and episodes[0].states.dtype == np.uint8
    assert_same(episodes, got(settings))


# ---------------------------------------------------------------- faults

class Faulty(gym.Env):
    "Eight steps of a growing picture; `faults` maps the number of an episode, counted by resets, to (kind, step)."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, faults, render_mode=None): self.faults, self.episode, self.render_mode = faults, -1, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.kind, self.at = self.faults.get(self.episode, ("", -1))
        if self.kind == "reset": raise RuntimeError("no board")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        if self.t == self.at and self.kind == "raise": raise RuntimeError("out of coal")
        return np.zeros(1, np.float32), float("nan") if self.t == self.at and self.kind == "nan" else 1., self.t == 8, False, {}

    def render(self): return np.full((9 if self.t == self.at and self.kind == "size" else 8, 8, 3), 10 * self.t, np.uint8)


gym.register("Faulty-v0", Faulty)


def faulty(faults, episodes=5): return make(env__id="Faulty-v0", env__kwargs=dict(faults=faults), env__size=8, decoder__patch_size=8, collect__episodes=episodes, collect__steps=20)


@pytest.mark.parametrize("kind, word", [("nan", "reward of nan"), ("raise", "out of coal"), ("size", "changed its frames")])
def test_a_fault_ends_its_episode_and_no_other(kind, word):
    with pytest.warns(UserWarning) as said: episodes = got(faulty({1: (kind, 4)}))
    assert [len(episode.actions) for episode in episodes] == [8, 3, 8, 8, 8]
    assert [episode.terminated for episode in episodes] == [True, False, True, True, True]
    assert (episodes[1].frames[:, 0, 0, 0] == [0, 10, 20, 30]).all() and len(episodes[1].rewards) == 3 and np.isfinite(episodes[1].rewards).all()
    assert len(said) == 1 and word in str(said[0].message) and "episode 1 is kept up to step 3" in str(said[0].message)


@pytest.mark.parametrize("fault", [("nan", 1), ("raise", 1), ("size", 1), ("reset", 0)])
def test_an_episode_without_a_sound_step_is_left_out(fault):
    with pytest.warns(UserWarning, match="episode 2 is left out"): episodes = got(faulty({2: fault}))
    assert [episode.index for episode in episodes] == [0, 1, 3, 4]


def test_three_lost_episodes_in_a_row_are_too_many():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [e.index for e in got(faulty({0: ("raise", 1), 1: ("raise", 1), 3: ("raise", 1)}))] == [2, 4]
        kept = []
        with pytest.raises(CollectError, match="three episodes in a row.*no board"):
            for episode in gather(faulty({1: ("reset", 0), 2: ("raise", 1), 3: ("reset", 0)}), progress=False): kept.append(episode.index)
        assert kept == [0]


class NanRow(TwoRoomsVectorEnv):
    "Two rooms, of which every third gives no number at its third step."
    def reset(self, **options):
        self.t = 0
        return super().reset(**options)

    def step(self, actions):
        self.t += 1
        frames, rewards, *rest = super().step(actions)
        return frames, np.where((np.arange(self.num_envs) % 3 == 1) & (self.t == 3), np.nan, rewards), *rest


gym.register("NanRow-v0", "worldmodels_nb.envs:TwoRoomsEnv", vector_entry_point=NanRow)


def test_a_fault_in_one_row_of_a_batch_ends_that_row_only():
    with pytest.warns(UserWarning) as said: broken = got(small("NanRow-v0"))
    assert [len(episode.actions) for episode in broken] == [5, 2, 5, 5, 2, 5] and len(said) == 2
    whole = got(small())
    assert all(np.array_equal(b.frames, w.frames[:len(b.frames)]) for b, w in zip(broken, whole))


MODULE = """
import multiprocessing, os, gymnasium as gym, numpy as np
class Env(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    def __init__(self, die, render_mode=None): self.die, self.render_mode = die, render_mode
    def reset(self, *, seed=None, options=None): super().reset(seed=seed); self.t = 0; return np.zeros(1, np.float32), {}
    def step(self, action):
        self.t += 1
        if self.die and multiprocessing.parent_process() is not None: os._exit(3)
        if self.t == 3 and not self.die: raise RuntimeError("out of coal")
        return np.zeros(1, np.float32), 1., False, False, {}
    def render(self): return np.zeros((8, 8, 3), np.uint8)
gym.register("FromModule-v0", Env)
"""


@pytest.mark.parametrize("die", [True, False])
def test_trouble_in_a_worker_reaches_its_parent(die, tmp_path, monkeypatch):
    name = f"module_with_env_{int(die)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE).replace("FromModule", f"FromModule{int(die)}"))
    monkeypatch.syspath_prepend(tmp_path)
    settings = make(env__id=f"{name}:FromModule{int(die)}-v0", env__kwargs=dict(die=die), env__size=8, decoder__patch_size=8, collect__episodes=2, collect__workers=1)
    if die:
        with pytest.raises(CollectError, match="collect.workers"): got(settings)
    else:
        with pytest.warns(UserWarning, match="out of coal") as said: assert [len(episode.actions) for episode in got(settings)] == [2, 2]
        assert len(said) == 2


# ---------------------------------------------------------------- PPO

TINY = dict(collect__policy="ppo", env__size=36, env__color="grey", model__patch_size=4, decoder__patch_size=4, model__frame_stack=2, collect__episodes=3, collect__steps=6,
            ppo__train_steps=32, ppo__n_envs=2, ppo__n_steps=16, ppo__batch_size=16, ppo__n_epochs=1)


def agent(tmp_path, id="CartPole-v1", **more): return make(**TINY | dict(env__id=id, data__dir=str(tmp_path)) | more)


@pytest.mark.parametrize("id, extra", [("CartPole-v1", dict()), ("Pendulum-v1", dict(ppo__policy_type="MlpPolicy")), ("worldmodels_nb/TwoRooms-v0", dict(env__color="rgb"))])
def test_an_agent_is_trained_once_and_acts_the_same_ever_after(id, extra, tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    settings = agent(tmp_path, id, **extra)
    first = got(settings)
    folder = agent_folder(settings)
    assert folder.parent == tmp_path / "agents" and sorted(file.name for file in folder.iterdir()) == ["agent.json", "weights.safetensors"]
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(collect, "train_agent", lambda *_: pytest.fail("trained twice"))
    assert_same(first, got(settings))
    assert_same(first[:2], got(agent(tmp_path, id, collect__episodes=2, **extra)))
    assert_same(first, got(agent(tmp_path, id, ppo__load=str(folder), run__device="cpu", **extra)))


def test_an_agent_in_a_batch_does_what_it_does_alone(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    settings = agent(tmp_path, "worldmodels_nb/TwoRooms-v0")
    batched = got(settings)
    monkeypatch.setattr(collect, "can_batch", lambda settings: False)
    for one, two in zip(batched, got(settings)):
        np.testing.assert_allclose(one.actions, two.actions, atol=1e-4)
        np.testing.assert_allclose(one.states, two.states, atol=1e-2)


def test_agents_differ_by_what_their_training_depends_on(tmp_path):
    base = agent_folder(agent(tmp_path))
    for change in (dict(run__seed=1), dict(ppo__gamma=.9), dict(model__frame_stack=3), dict(collect__steps=9), dict(env__kwargs=dict(sutton_barto_reward=True))):
        assert agent_folder(agent(tmp_path, **change)) != base
    for change in (dict(ppo__extra_log_std=1.), dict(collect__episodes=9), dict(collect__workers=2), dict(ppo__subprocesses=True)):
        assert agent_folder(agent(tmp_path, **change)) == base


def test_all_of_ppos_settings_reach_it(tmp_path, monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3")
    seen, real = {}, sb3.PPO
    class Spy(real):
        def __init__(self, policy, env, **kwargs):
            seen.update(kwargs, policy=policy, n_envs=env.num_envs)
            super().__init__(policy, env, **kwargs)
        def learn(self, total_timesteps, **kwargs):
            seen["train_steps"] = total_timesteps
            return super().learn(total_timesteps, **kwargs)
    monkeypatch.setattr(sb3, "PPO", Spy)
    numbers = dict(learning_rate=1e-4, n_steps=8, batch_size=8, n_epochs=2, gamma=.9, gae_lambda=.8, clip_range=.3)
    prepare_agent(agent(tmp_path, run__seed=4, ppo__train_steps=16, **{f"ppo__{key}": value for key, value in numbers.items()}), progress=False)
    assert {key: seen[key] for key in numbers} == numbers
    assert (seen["policy"], seen["n_envs"], seen["train_steps"], seen["seed"]) == ("CnnPolicy", 2, 16, 4)


def test_training_learns_what_it_is_paid_for(tmp_path):
    pytest.importorskip("stable_baselines3")
    class Bandit(gym.Env):
        "The second of two actions pays."
        metadata, observation_space, action_space = {"render_modes": ["rgb_array"]}, gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
        def __init__(self, render_mode=None): self.render_mode = render_mode
        def reset(self, *, seed=None, options=None): super().reset(seed=seed); return np.zeros(1, np.float32), {}
        def step(self, action): return np.zeros(1, np.float32), float(action), False, False, {}
        def render(self): return np.full((8, 8, 3), 128, np.uint8)
    gym.register("Bandit-v0", Bandit)
    settings = agent(tmp_path, "Bandit-v0", env__size=8, decoder__patch_size=8, ppo__policy_type="MlpPolicy", model__frame_stack=1, collect__steps=20, collect__episodes=4,
                     ppo__train_steps=768, ppo__n_steps=64, ppo__batch_size=64, ppo__n_epochs=10, ppo__learning_rate=3e-3)
    share = np.mean([episode.rewards.mean() for episode in got(settings)])
    assert share > .8


def test_extra_log_std_widens_continuous_actions(tmp_path):
    pytest.importorskip("stable_baselines3")
    spread = {}
    for extra in (-8., 0., 2.):
        actions = np.concatenate([episode.actions for episode in got(agent(tmp_path, "Pendulum-v1", ppo__extra_log_std=extra, ppo__policy_type="MlpPolicy", collect__steps=30))])
        assert np.abs(actions).max() <= 2
        spread[extra] = actions.std()
    assert spread[-8.] < .1 < spread[0.] < spread[2.]


def test_discrete_actions_follow_the_agents_probabilities(tmp_path):
    pytest.importorskip("stable_baselines3")
    settings = agent(tmp_path)
    prepare_agent(settings, progress=False)
    policy = AgentPolicy(settings, ActionSpec("discrete", 2), (1, 36, 36))
    frames = np.random.default_rng(0).integers(0, 256, (1, 1, 36, 36), dtype=np.uint8).repeat(4000, 0)
    policy.start([np.random.default_rng(seed) for seed in range(4000)], 1)
    policy.see(frames)
    with torch.no_grad(): wanted = policy.agent.get_distribution(torch.from_numpy(np.tile(frames[:1], (1, 2, 1, 1)))).distribution.probs[0, 1]
    assert abs(policy.draw().mean() - wanted.item()) < .03


def test_an_agents_environment_stacks_frames_and_cuts_episodes():
    env = AgentEnv(make(**TINY | dict(env__id="Pendulum-v1", model__frame_stack=3, collect__steps=4)))
    first, _ = env.reset(seed=1)
    assert env.observation_space.contains(first) and first.shape == (3, 36, 36) and np.array_equal(first[0], first[2])
    steps = [env.step(np.float32([.5])) for _ in range(4)]
    assert [truncated for *_, truncated, _ in steps] == [False, False, False, True]
    assert np.array_equal(steps[1][0][:2], steps[0][0][1:]) and np.array_equal(steps[0][0][0], first[0])
    again, _ = AgentEnv(make(**TINY | dict(env__id="Pendulum-v1", model__frame_stack=3, collect__steps=4))).reset(seed=1)
    following, _ = env.reset()
    assert np.array_equal(first, again) and not np.array_equal(first, following)
    with pytest.raises(CollectError, match="no options"): env.reset(options=dict(state=1))


def test_training_leaves_global_generators_alone(tmp_path):
    pytest.importorskip("stable_baselines3")
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    got(agent(tmp_path))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected


def test_an_agent_trains_in_subprocesses_and_collects_with_workers(tmp_path):
    pytest.importorskip("stable_baselines3")
    settings = agent(tmp_path, ppo__subprocesses=True, ppo__n_envs=1, ppo__train_steps=16)
    assert_same(got(settings), got(agent(tmp_path, ppo__n_envs=1, ppo__train_steps=16, collect__workers=1)))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CollectError) as caught: got(make(**TINY))
    assert 'pip install "worldmodels_nb[ppo]"' in str(caught.value)


@pytest.mark.parametrize("change, words", [
    (dict(env__size=32), ["env.size", "36"]),
    (dict(model__frame_stack=16, env__color="rgb"), ["model.frame_stack", "env.size"]), (dict(ppo__load="nowhere/at/all"), ["collect.ppo.load", "null"])])
def test_what_ppo_cannot_do_is_said_first(change, words, tmp_path):
    pytest.importorskip("stable_baselines3")
    with pytest.raises(CollectError) as caught: got(agent(tmp_path, **change))
    assert all(word in str(caught.value) for word in words) and not (tmp_path / "agents").exists()


def test_an_agent_that_does_not_fit_or_is_damaged_is_refused(tmp_path):
    pytest.importorskip("stable_baselines3")
    folder = prepare_agent(agent(tmp_path), progress=False)
    with pytest.raises(CollectError, match="frame_stack is 2, not 1"): got(agent(tmp_path, ppo__load=str(folder), model__frame_stack=1))
    with pytest.raises(CollectError, match="action is"): got(agent(tmp_path, "Pendulum-v1", ppo__load=str(folder)))
    (folder / "weights.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CollectError, match="cannot be used"): got(agent(tmp_path))
    (folder / "agent.json").write_text("{")
    with pytest.raises(CollectError, match="no agent that can be read"): got(agent(tmp_path))


def test_a_training_that_fails_leaves_nothing_behind(tmp_path):
    pytest.importorskip("stable_baselines3")
    with pytest.raises(EnvError, match="out of coal"): prepare_agent(agent(tmp_path, "Faulty-v0", env__kwargs=dict(faults={0: ("raise", 2)})), progress=False)
    assert not list(tmp_path.iterdir())


def test_an_agents_record_says_what_it_fits(tmp_path):
    pytest.importorskip("stable_baselines3")
    record = json.loads((prepare_agent(agent(tmp_path), progress=False) / "agent.json").read_text())
    assert record == dict(schema_version=1, policy_type="CnnPolicy", frame_stack=2, frame_shape=[1, 36, 36], action=dict(kind="discrete", n=2, low=None, high=None))
