"Small settings, random windows and models of both kinds of data, for the tests of all models."
import pytest
import torch
from masked_tools import PATCH, SIDE, TUBELET, awake

from worldmodels_nb.data.datasets import Batch, Windows
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.models.released import load_released
from worldmodels_nb.settings import make_settings

STEPS, BATCH = 5, 4
DISCRETE = ActionSpec("discrete", 3, None, None)
CONTINUOUS = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
DATA = {"discrete": (DISCRETE, 1, 3), "continuous": (CONTINUOUS, 3, 1)}         # actions, C, F

SMALL = {
    "env": {"size": 16},
    "model": {"latent_dim": 16, "patch_size": 4, "action_dim": 4},
    "encoder.patch": {"channels": 8},
    "encoder.cnn": {"base_filters": 4, "layers": 2},
    "encoder.vit": {"depth": 1, "heads": 2, "mlp_dim": 16},
    "encoder.mlp": {"layers": 1, "hidden": 16},
    "predictor": {"hidden": [16], "depth": 1, "heads": 2, "mlp_dim": 16},
    "decoder": {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16, "patch_size": 4, "channels": 4},
    "vjepa2.pretrain": {"patch_size": 8},
}


def _tiny(**sections):
    return make_settings({s: SMALL.get(s, {}) | sections.get(s, {}) for s in SMALL | sections})


def _random_windows(data, stack=None, seed=0):
    action, channels, usual = DATA[data]
    rng, length = torch.Generator().manual_seed(seed), (stack or usual) - 1 + STEPS + 1
    shape = (BATCH, length, channels, 16, 16)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
    if action is DISCRETE: actions = torch.randint(0, 3, (BATCH, STEPS), generator=rng)
    else: actions = torch.rand(BATCH, STEPS, 2, generator=rng) * 2 - 1
    return Batch(frames, actions, torch.zeros(BATCH, STEPS), torch.zeros(BATCH, STEPS, dtype=torch.bool))


def _small_model(name, settings, data, seed=0):
    name, _, target = name.partition(":")
    if target:
        jepa = settings.jepa.model_copy(update={"target": target})
        settings = settings.model_copy(update={"jepa": jepa})
    action, channels, _ = DATA[data]
    frames = _random_windows(data, 1).frames.flatten(0, 1)
    return fresh_model(name, settings, DataSpec((channels, 16, 16), action, [], []), frames, seed)


def _learn(model, batch, times):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, totals = torch.optim.AdamW(trainable, 3e-3), []
    for _ in range(times):
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        totals.append(loss.total.item())
    return totals


@pytest.fixture(scope="session")
def tiny():
    "tiny(model={…}): settings of a model of some thousand weights, changed section by section."
    return _tiny


@pytest.fixture(scope="session")
def random_windows():
    "random_windows(data, stack): four windows of five steps of random frames, discrete or continuous."
    return _random_windows


@pytest.fixture(scope="session")
def small_model():
    "small_model(name, settings, data): an untrained model; `jepa:ema_both` is a JEPA with that target."
    return _small_model


@pytest.fixture(scope="session")
def learn():
    "learn(model, batch, times): some steps on one batch; the loss before each."
    return _learn


@pytest.fixture(scope="session")
def sample_windows(sample):
    "All windows of four steps of the committed sample."
    return Windows(sample, range(len(sample.lengths)), steps=4)


@pytest.fixture(scope="session")
def sample_frames(sample):
    "All frames of the committed sample, uint8 (n, C, h, w)."
    return torch.from_numpy(sample.frames[:].copy())


@pytest.fixture(scope="module")
def theirs():
    "A tiny V-JEPA 2 of transformers, with weights large enough to matter."
    transformers = pytest.importorskip("transformers", reason="transformers (extra: hf) is not installed")
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        patch_size=PATCH,
        crop_size=SIDE,
        frames_per_clip=4,
        tubelet_size=TUBELET,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=3,
        pred_hidden_size=36,
        pred_num_attention_heads=3,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=3,
        mlp_ratio=3.0,
        pred_mlp_ratio=2.0,
    )
    return awake(transformers.VJEPA2Model(config)).eval()


@pytest.fixture
def folder(theirs, tmp_path):
    "It, as transformers saves it."
    theirs.save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture
def loaded(folder):
    "It, as this project reads it."
    return load_released(folder)
