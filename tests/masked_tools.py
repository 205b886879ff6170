"Small stage-1 models and clips, for the tests of V-JEPA 2's first stage and of released weights."


import torch

from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.released import (
    build_pretraining,
)
from worldmodels_nb.settings import make_settings

torch.set_num_threads(1)
GRID, SIDE, TUBELET, PATCH = (2, 4, 4), 16, 2, 4
SMALL = dict(
    frames=4,
    tubelet_size=2,
    patch_size=4,
    dim=48,
    depth=2,
    heads=2,
    predictor_dim=24,
    predictor_depth=2,
    predictor_heads=2,
)

def spec(channels=3, side=SIDE):
    return DataSpec((channels, side, side), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), [], [])


def stage(seed=0, channels=3, side=SIDE, **masked):
    torch.manual_seed(seed)
    settings = make_settings({"env": {"size": side}, "vjepa2.pretrain": SMALL | masked})
    return build_pretraining(settings, spec(channels, side))


def clips(seed=0, batch=6, frames=4, channels=3, side=SIDE):
    "A bright square that moves over a fixed pattern."
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (1, 1, channels, side, side), generator=rng).repeat(batch, frames, 1, 1, 1)
    for b in range(batch):
        row, column, dr, dc = (
            int(torch.randint(lo, hi, (), generator=rng))
            for lo, hi in ((0, side - 3), (0, side - 3), (-2, 3), (-2, 3))
        )
        for t in range(frames):
            r, c = min(max(row + dr * t, 0), side - 3), min(max(column + dc * t, 0), side - 3)
            x[b, t, :, r : r + 3, c : c + 3] = 255
    return x.to(torch.uint8)


def batch_of(frames):
    return Batch(frames, None, None, None)


def awake(module, seed=0, scale=4.0):
    "Weights large enough for every path to matter, mask tokens and biases included."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * (0.02 * scale))
    return module


def two_masks(batch=2):
    rng = torch.Generator().manual_seed(3)
    order = torch.rand(batch, 32, generator=rng).argsort(1)
    return order[:, :12].sort(1).values, order[:, 12:27].sort(1).values

