"Every model where the device is not the CPU: built without numbers, and computing what the CPU computes."
import copy
import itertools

import pytest
import torch
from device_tools import ELSEWHERE, Device, numbers

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import build_model

OFF = {name: 0.0 for name in ("variance", "covariance", "smoothness", "inverse")} | {"pixel": 1.0}
TERMS = {
    "none": {},
    "vicreg": {"variance": 1.0, "covariance": 0.1, "invariance": 1.0},
    "barlow": {"barlow": {"weight": 1.0}},
    "dino": {"dino": {"weight": 1.0}},
    "sigreg": {"sigreg": {"weight": 1.0, "directions": 8}},
    "smoothness": {"smoothness": 1.0},
    "inverse": {"inverse": 1.0},
}
ENCODERS = [("patch", False), ("cnn", True), ("vit", False), ("mlp", False), ("patch", True), ("cnn", False),
            ("vit", True)]
PREDICTORS, DECODERS = ("gru", "mlp", "transformer"), ("transformer", "conv")
TARGETS = ("shared", "ema_target", "ema_both")
VJEPA2 = {
    "blocks": {}, "tubes": {"masking": "tubes", "ratio": 0.5}, "random": {"masking": "random"},
    "tubelets": {"tubelet_size": 2}, "mask tokens in the encoder": {"predictor": "mlp"},
}
DATA = {                                                                        # actions, C, F
    "discrete": (ActionSpec("discrete", 3, None, None), 1, 3),
    "continuous": (ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), 3, 1),
}


def cases():
    "Every encoder with every term; with predictors, decoders, targets and actions in turn."
    for i, ((encoder, tokens), term) in enumerate(itertools.product(ENCODERS, TERMS)):
        own = {"model": {"encoder": encoder, "tokens": tokens}, "loss": OFF | TERMS[term],
               "predictor": {"type": PREDICTORS[i % 3]}, "decoder": {"type": DECODERS[i % 2]}}
        for name in ("encdec", "encdec_jepa", "jepa"):
            jepa = {"target": "shared" if term in ("none", "dino") else TARGETS[i // 3 % 3]}
            kind = f"{name} {encoder} {'tokens ' * tokens}{own['predictor']['type']} {term}"
            yield pytest.param(name, own | {"jepa": jepa}, list(DATA)[i // 2 % 2], id=kind)
    for i, (kind, s) in enumerate(VJEPA2.items()):
        own = {"vjepa2.pretrain": {"patch_size": 4, "dim": 24, "depth": 1, "predictor_depth": 1} | s,
               "vjepa2.action": {"dim": 24, "heads": 2, "depth": 1}}
        yield pytest.param("vjepa2", own, list(DATA)[i % 2], id=f"vjepa2 {kind}")


CASES = list(cases())


def built(tiny, name, own, data):
    action, channels, stack = DATA[data]
    settings = tiny(**own | {"model": own.get("model", {}) | {"frame_stack": stack}})
    return build_model(name, settings, DataSpec((channels, 16, 16), action, [], []))


def losses_of(model, batch):
    "Of the model and of its first stage, in training and in evaluation."
    for mode, part in itertools.product((True, False), {model.stages()[0].part, model}):
        torch.manual_seed(1)
        losses = part.train(mode).loss(batch)
        yield from ((f"{type(part).__name__} {mode} {name}", t) for name, t in losses.terms.items())
        yield f"{type(part).__name__} {mode}", losses.total


def every_call(model, batch):
    "Whatever a run asks of a model, from the bytes of frames to the last term; tensors by name."
    model.fit_normalization(batch.frames[:, 0])
    found, stack = dict(losses_of(model, batch)), model.frame_stack
    found[f"{type(model).__name__} True"].backward()
    found["gradient"] = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    for stage in model.stages(): stage.part.after_step(1, 4)
    with torch.no_grad():
        found["preprocessed"], found["z"] = model.preprocess(batch.frames), model.encode(batch.frames)
        past, ahead = batch.actions[:, :1], batch.actions[:, 1:]
        found["rolled"] = model.rollout(found["z"][:, :2], past, ahead)
        if model.decodes: found["imagined"] = model.imagine(batch.frames[:, :stack], batch.actions)
        if hasattr(model, "masked"):
            found["errors"] = model.masked.error_map(batch.frames[:, :model.masked.frames])
    return found


@pytest.mark.parametrize("name, own, data", CASES)
def test_a_model_is_built_without_numbers(name, own, data, tiny):
    with torch.device("meta"): model = built(tiny, name, own, data)
    tensors, here = [*model.parameters(), *model.buffers()], built(tiny, name, own, data)
    assert {t.device.type for t in tensors} == {"meta"}
    assert [t.shape for t in tensors] == [t.shape for t in (*here.parameters(), *here.buffers())]


@pytest.mark.parametrize("name, own, data", CASES[:-5:7] + CASES[-5:])
def test_a_model_is_called_without_numbers(name, own, data, tiny, random_windows):
    with torch.device("meta"): model = built(tiny, name, own, data)
    found = every_call(model, random_windows(data).to("meta"))
    assert {t.device.type for t in found.values()} == {"meta"}
    assert found["rolled"].shape == (4, 4, *model.latent_shape)


@pytest.mark.parametrize("name, own, data", CASES[2:-5:8] + CASES[-5:])
def test_a_model_computes_elsewhere_what_it_computes_here(name, own, data, tiny, random_windows):
    torch.manual_seed(0)
    here, batch = built(tiny, name, own, data), random_windows(data)
    there = copy.deepcopy(here)
    expected = every_call(here, batch)
    with Device():
        found = every_call(there.to(ELSEWHERE), batch.to(ELSEWHERE))
        assert {t.device.type for t in found.values()} == {ELSEWHERE.type}
    for n in expected:
        torch.testing.assert_close(numbers(found[n]), expected[n].detach(), rtol=1e-3, atol=1e-3, msg=n)
    weights = zip(here.state_dict().items(), there.state_dict().values(), strict=True)
    for (n, mine), theirs in weights: torch.testing.assert_close(numbers(theirs), mine, msg=n)


@pytest.mark.parametrize("name, own, data", CASES[1:-5:25] + CASES[-1:])
def test_frames_of_the_cpu_are_moved_to_where_the_model_is(name, own, data, tiny, random_windows):
    here, frames = built(tiny, name, own, data), random_windows(data).frames[:, 0]
    there = copy.deepcopy(here)
    here.fit_normalization(frames)
    with Device(): there.to(ELSEWHERE).fit_normalization(frames)
    for mine, theirs in zip(here.buffers(), there.buffers()): assert torch.equal(numbers(theirs), mine)
