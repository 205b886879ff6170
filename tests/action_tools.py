"Small stage-2 transformers and tokens, for the tests of V-JEPA 2's second stage."


import pytest
import torch

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.models.action_conditioned import WorldModelTransformer, normalize
from worldmodels_nb.settings import ActionSettings

DISCRETE, CONTINUOUS = (
    ActionSpec("discrete", 3, None, None),
    ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]),
)
KINDS = pytest.mark.parametrize("action", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
GRID, WIDTH, BATCH = (2, 3), 10, 3


def ac(**fields):
    return ActionSettings(
        **{
            "dim": 24,
            "depth": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
            "context_length": 4,
            "rollout_steps": 3,
            "loss_exponent": 1.0,
        }
        | fields
    )


def transformer(action=CONTINUOUS, seed=0, kind=WorldModelTransformer, size=0.1, **fields):
    "Untrained, and with weights large enough that everything in it matters."
    torch.manual_seed(seed)
    model = kind(WIDTH, GRID, action, ac(**fields))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.2 if p.ndim > 1 else 1).add_(size * torch.randn_like(p))
    return model.eval()


def some(action, steps, batch=BATCH, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(batch, steps, 6, WIDTH, generator=rng))
    return z, (
        torch.randint(0, 3, (batch, steps), generator=rng)
        if action is DISCRETE
        else torch.rand(batch, steps, 2, generator=rng) * 2 - 1
    )


def other(actions):
    return (actions + 1) % 3 if actions.dtype == torch.int64 else -actions + 0.1


@torch.no_grad()
def uncached(model, z, actions):
    "All steps through the network again for every step ahead."
    L, H = model.context_length, actions.shape[1] - z.shape[1] + 1
    actions, z = actions[:, max(z.shape[1] - L, 0) :], z[:, -L:]
    steps = []
    for _ in range(H):
        steps.append(normalize(model(z, actions[:, : z.shape[1]]))[:, -1:])
        z = torch.cat([z, steps[-1]], 1)
    return torch.cat(steps, 1)
