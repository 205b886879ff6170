"One window, one clip, one frame, or many that are all alike: no figure of a model is then no number."
import itertools

import pytest
import torch

from worldmodels_nb.data.datasets import Batch
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.models.masked import constant_error

JOYSTICK = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
VIEWS = {"variance": 1.0, "covariance": 1.0, "invariance": 1.0, "smoothness": 1.0, "inverse": 1.0,
         "pixel": 1.0, "barlow": {"weight": 1.0}, "dino": {"weight": 1.0},
         "sigreg": {"weight": 1.0, "directions": 8}}
FEW = {"one window": (1, 5, "noise"), "one short window": (1, 1, "noise"), "alike": (4, 5, "grey"),
       "one, and grey": (1, 1, "grey"), "two": (2, 1, "noise")}
VJEPA2 = {"vjepa2.pretrain": {"patch_size": 4, "dim": 24}, "vjepa2.action": {"dim": 24, "heads": 2}}


def few(kind):
    windows, steps, content = FEW[kind]
    shape, rng = (windows, max(steps, 3) + 1, 3, 16, 16), torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    if content == "grey": frames.fill_(90)
    frames = frames[:, :steps + 1]
    return Batch(frames, torch.rand(windows, steps, 2, generator=rng), torch.zeros(windows, steps), None)


def made(name, tiny, **own):
    frames = few("one window").frames.flatten(0, 1)
    return fresh_model(name, tiny(**own), DataSpec((3, 16, 16), JOYSTICK, [], []), frames)


@pytest.mark.parametrize("name, kind", [*itertools.product(["encdec", "encdec_jepa", "jepa", "vjepa2"], FEW)])
def test_every_term_of_validation_is_a_number(name, kind, tiny):
    model, batch = made(name, tiny, loss=VIEWS, **VJEPA2).eval(), few(kind)
    losses = model.loss(batch)
    assert losses.total.isfinite() and all(t.isfinite() for t in losses.terms.values())
    lone = kind in ("one short window", "one, and grey") and name != "vjepa2"
    assert ("barlow" in losses.terms) == (name != "vjepa2" and not lone)  # one sample correlates with nothing


@pytest.mark.parametrize("clips", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_first_stage_says_how_one_clip_spreads(clips, training, tiny):
    stage = made("vjepa2", tiny, **VJEPA2).masked.train(training)
    frames = torch.randint(0, 256, (clips, 4, 3, 16, 16), dtype=torch.uint8)
    losses = stage.loss(Batch(frames, None, None, None))
    assert losses.total.isfinite() and all(t.isfinite() for t in losses.terms.values())
    assert (losses.terms["spread"] == 0) == (clips == 1)
    if training: losses.total.backward()
    else: assert 1e-3 < losses.total < 1e3                                 # not in units of nothing


def test_the_constant_of_one_clip_is_the_median_of_its_tokens():
    y, asked = torch.randn(1, 6, 4), torch.tensor([[0, 2, 5]])
    by_hand = (y[0, [0, 2, 5]] - y[0].median(0).values).abs().mean()
    torch.testing.assert_close(constant_error(y, [asked]), by_hand)
    several = y.repeat(3, 1, 1) + torch.randn(3, 1, 1)
    by_hand = (several - several.median(0).values)[:, [0, 2, 5]].abs().mean()
    torch.testing.assert_close(constant_error(several, [asked.expand(3, -1)]), by_hand)


@pytest.mark.parametrize("name", ["encdec", "jepa", "vjepa2"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_what_frames_look_like_can_be_learnt_from_one(name, frames, tiny):
    same = torch.full((frames, 3, 16, 16), 90, dtype=torch.uint8)
    model = made(name, tiny, **VJEPA2).fit_normalization(same)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert model.encode(same[:, None]).isfinite().all()
