"A rollout is its steps, one after the other, for every predictor; and only one of them looks around."
from itertools import product

import pytest
import torch

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.nn.predictors import PREDICTORS, InverseDynamics, build_predictor
from worldmodels_nb.settings import PredictorSettings, SettingsError

JOYSTICK, BUTTONS = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), ActionSpec("discrete", 4)


def near(value, wanted, atol): torch.testing.assert_close(value, wanted, atol=atol, rtol=0)


@pytest.fixture(params=list(product(PREDICTORS, (1, 9))), ids=str)
def moved(request):
    "Kind, tokens, a predictor, a latent, actions and the rollout."
    kind, tokens = request.param
    s = PredictorSettings(type=kind, hidden=[8], mlp_dim=8)
    made, z, actions = build_predictor(16, JOYSTICK, 4, s), torch.randn(3, tokens, 16), torch.randn(3, 5, 2)
    return kind, tokens, made, z, actions, made(z, actions)


def test_a_rollout_goes_on_from_where_it_was(moved):
    _, tokens, made, z, actions, five = moved
    assert five.shape == (3, 5, tokens, 16)
    near(five.mean(-1), torch.zeros(3, 5, tokens), 1e-5)
    near(five[:, :3], made(z, actions[:, :3]), 1e-6)
    near(five[:, 3:], made(five[:, 2], actions[:, 3:]), 1e-5)


def test_actions_matter(moved):
    _, _, made, z, actions, five = moved
    assert not torch.allclose(made(z, -actions), five)


def test_only_the_transformer_carries_news_from_token_to_token(moved):
    kind, tokens, made, z, actions, five = moved
    nudged = z.clone()
    nudged[:, 0] += 1
    change = (made(nudged, actions) - five)[:, 0].abs().amax((0, 2))                   # (N,)
    assert change[0] > 0
    if tokens > 1: assert (change[1:] > 0).all().item() == (kind == "transformer")


def test_positions_are_not_saved():
    made = build_predictor(16, JOYSTICK, 4, PredictorSettings(type="transformer"))
    assert "positions" not in made.state_dict() and made.positions is not None


@pytest.mark.parametrize("dim, heads, message", [
    (18, 4, "not divisible by 4 attention heads"), (6, 2, "not divisible by 4, which")])
def test_a_width_that_cannot_be_shared_is_refused(dim, heads, message):
    with pytest.raises(SettingsError, match=message):          # when it is built, not when it is called
        build_predictor(dim, JOYSTICK, 4, PredictorSettings(type="transformer", heads=heads), tokens=4)


@pytest.mark.parametrize("action, width", [(JOYSTICK, 2), (BUTTONS, 4)])
def test_inverse_dynamics_sees_each_pair_of_neighbours(action, width):
    reads, z = InverseDynamics(2 * 8, action), torch.randn(3, 6, 2, 8)
    read = reads(z)
    assert read.shape == (3, 5, width)
    for t in range(5): near(read[:, t], reads(z[:, t:t + 2])[:, 0], 1e-6)
