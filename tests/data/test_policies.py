"Policies do what they say, and an episode's actions come from its own generator only."

import numpy as np
import pytest

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.policies import MixedPolicy, Policy, RandomPolicy, WanderPolicy, turned

DISCRETE, LINE = ActionSpec("discrete", 4), ActionSpec("continuous", 1, [-2.0], [2.0])
PLANE = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
SPACE = ActionSpec("continuous", 3, [0.0, 0.0, 0.0], [1.0, 2.0, 4.0])
ALL = [DISCRETE, LINE, PLANE, SPACE]


def run(policy, draws=2000, seeds=(0,), frames=None):
    "Actions (draws, B, ...); frames(t) is shown before each draw, if given."
    policy.start([np.random.default_rng(seed) for seed in seeds], draws)
    out = []
    for t in range(draws):
        if frames:
            policy.observe(frames(t))
        out.append(policy.draw())
    return np.stack(out)


@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize("policy", [RandomPolicy, WanderPolicy])
def test_actions_are_of_their_kind_and_within_bounds(policy, action):
    actions = run(policy(action), 500, seeds=(0, 1))
    assert actions.shape == ((500, 2) if action.kind == "discrete" else (500, 2, action.n))
    assert actions.dtype == action.zeros(1).dtype
    if action.kind == "discrete":
        assert set(actions.ravel()) == set(range(action.n))
    else:
        assert (actions >= action.low).all() and (actions <= action.high).all()


@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize(
    "make_one", [RandomPolicy, WanderPolicy, lambda action: MixedPolicy(WanderPolicy(action), 0.3)]
)
def test_an_episode_draws_from_its_own_generator_only(make_one, action):
    together, alone = run(make_one(action), 50, seeds=(3, 7, 9)), run(make_one(action), 50, seeds=(7,))
    assert np.array_equal(together[:, 1], alone[:, 0])
    assert not np.array_equal(together[:, 0], together[:, 1])


def test_a_policy_must_say_what_its_dice_are():
    with pytest.raises(NotImplementedError):
        Policy(DISCRETE).start([np.random.default_rng(0)], 1)


def test_random_actions_are_uniform_and_independent():
    actions = run(RandomPolicy(SPACE), 20_000)[:, 0] / SPACE.high
    np.testing.assert_allclose(actions.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(actions.std(0), 12**-0.5, atol=0.01)
    assert abs(np.corrcoef(actions[1:, 0], actions[:-1, 0])[0, 1]) < 0.02


def bessel_ratio(kappa):
    "I1(κ)/I0(κ), the mean cosine of a von Mises angle, by integration."
    angle = np.linspace(-np.pi, np.pi, 20_001)
    weight = np.exp(kappa * (np.cos(angle) - 1))
    return (np.cos(angle) * weight).sum() / weight.sum()


@pytest.mark.parametrize("kappa", [0.0, 0.5, 5.0, 50.0])
def test_headings_in_the_plane_turn_by_von_mises_angles(kappa):
    actions = run(WanderPolicy(PLANE, kappa), 20_000)[:, 0]
    length = np.linalg.norm(actions, axis=1)
    heading = actions / length[:, None]
    assert abs((heading[1:] * heading[:-1]).sum(1).mean() - bessel_ratio(kappa)) < 0.015
    assert length.min() >= 0.11 - 1e-6 and length.max() <= 1 + 1e-6 and abs(length.mean() - 0.55) < 0.01
    across = heading[1:, 0] * heading[:-1, 1] - heading[1:, 1] * heading[:-1, 0]
    assert abs(across.mean()) < 0.015  # neither to the left nor to the right


def test_the_default_walk_in_numbers():
    actions = run(WanderPolicy(PLANE), 20_000)[:, 0]
    length = np.linalg.norm(actions, axis=1)
    heading = actions / length[:, None]
    cosine = (heading[1:] * heading[:-1]).sum(1).mean()
    found = [length.min(), length.max(), length.mean(), cosine]
    np.testing.assert_allclose(found, [0.11, 1, 0.55, 0.893], atol=0.01)


def test_one_turn_has_the_von_mises_mean_cosine():
    rng, n = np.random.default_rng(0), 100_000
    dice = np.stack([rng.vonmises(0, 5.0, n), rng.uniform(-np.pi, np.pi, n)], 1)
    cosine = turned(np.eye(2)[:1].repeat(n, 0), dice, 5.0, np.zeros(n, bool))[:, 0].mean()
    np.testing.assert_allclose(cosine, 0.893, atol=0.01)
    np.testing.assert_allclose(bessel_ratio(5.0), 0.893, atol=0.001)


def test_a_wide_walk_stays_within_bounds():
    actions = run(WanderPolicy(SPACE), 500)[:, 0]
    assert (actions >= 0).all() and (actions <= [1, 2, 4]).all() and actions.dtype == np.float32


def test_headings_in_more_dimensions_forget_at_zero_and_keep_at_large_persistence():
    cube = ActionSpec("continuous", 3, [-1.0] * 3, [1.0] * 3)
    actions = run(WanderPolicy(cube, 0.0), 20_000)[:, 0]
    heading = actions / np.linalg.norm(actions, axis=1, keepdims=True)
    assert abs((heading[1:] * heading[:-1]).sum(1).mean()) < 0.02 and np.abs(heading.mean(0)).max() < 0.02
    actions = run(WanderPolicy(cube, 200.0), 200)[:, 0]
    heading = actions / np.linalg.norm(actions, axis=1, keepdims=True)
    assert (heading[1:] * heading[:-1]).sum(1).mean() > 0.98


def test_turned_keeps_unit_length():
    rng = np.random.default_rng(0)
    for width in (2, 3, 7):
        heading = rng.normal(size=(50, width))
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        new = turned(heading, rng.normal(size=(50, width)), 5.0, rng.random(50) < 0.5)
        np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("action", [DISCRETE, LINE])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 4.0])
def test_a_last_action_is_kept_with_the_stated_probability(action, kappa):
    actions = run(WanderPolicy(action, kappa), 20_000).reshape(20_000)
    again = 1 / action.n if action.kind == "discrete" else 0  # the same one may be drawn anew
    share = kappa / (1 + kappa)
    assert abs((actions[1:] == actions[:-1]).mean() - (share + (1 - share) * again)) < 0.015
    assert abs(actions.mean() - (1.5 if action.kind == "discrete" else 0)) < 0.12
    if action is LINE:
        assert np.abs(actions).max() <= 2


def first_of_two_stands_still(t):
    frames = np.zeros((2, 3, 4, 4), np.uint8)
    frames[1] = t % 2
    return frames


@pytest.mark.parametrize("action", [DISCRETE, LINE])
def test_where_nothing_moves_the_next_action_is_drawn_anew(action):
    actions = run(WanderPolicy(action, 1000.0), 400, seeds=(0, 1), frames=first_of_two_stands_still)
    still, moving = (actions[1:] != actions[:-1]).reshape(399, 2).mean(0)
    assert still > 0.6 and moving < 0.05


@pytest.mark.parametrize("action", [PLANE, SPACE])
def test_where_nothing_moves_the_next_heading_is_fresh(action):
    actions = run(WanderPolicy(action, 1000.0), 400, seeds=(0, 1), frames=first_of_two_stands_still)
    unit = (actions - action.low) / np.subtract(action.high, action.low) * 2 - 1
    heading = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    still, moving = (heading[1:] * heading[:-1]).sum(-1).mean(0)
    assert abs(still) < 0.2 and moving > 0.98


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_actions_is_uniform(share):
    mixed = run(MixedPolicy(WanderPolicy(LINE, 1e9), share), 8000)[:, 0, 0]
    kept = np.unique(mixed, return_counts=True)[1].max() / 8000  # what the walk would hold for ever
    assert abs(kept - (1 - share)) < 0.02
    if share == 1.0:
        assert abs(mixed.std() - 4 / 12**0.5) < 0.03
