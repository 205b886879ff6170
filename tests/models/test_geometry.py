"What a model cannot be built for is said when it is built, without numbers, in the words of the settings."
import warnings

import pytest
import torch

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec
from worldmodels_nb.models.base import build_model
from worldmodels_nb.settings import Settings, SettingsError, make_settings

JOYSTICK = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
CNN, VIT = {"model.encoder": "cnn"}, {"model.encoder": "vit"}
STAGE1 = "vjepa2.pretrain."


def build(name, settings, size=None):
    side = size or settings.env.size
    with torch.device("meta"): return build_model(name, settings, DataSpec((3, side, side), JOYSTICK, [], []))


REFUSED = [
    # model, settings, side of the frames where it differs, what is named, what is not
    ("jepa", CNN | {"encoder.cnn.layers": 8, "encoder.cnn.padding": 0}, 64, "encoder.cnn.layers", "size ="),
    ("jepa", CNN | {"encoder.cnn.stride": 8, "encoder.cnn.padding": 0}, 64, "encoder.cnn.stride", "size ="),
    ("encdec", CNN | {"encoder.cnn.kernel_size": 15, "encoder.cnn.padding": 0, "encoder.cnn.layers": 1}, 8,
     "encoder.cnn.kernel_size = 15", "layers"),
    ("encdec_jepa", CNN | {"encoder.cnn.kernel_size": 13, "encoder.cnn.padding": 2}, 8,
     "encoder.cnn.padding = 2", "layers"),
    ("jepa", CNN | {"encoder.cnn.kernel_size": 7, "encoder.cnn.stride": 1, "encoder.cnn.padding": 0}, 12,
     "encoder.cnn.kernel_size", "env.id"),
    ("encdec", {"decoder.patch_size": 16}, 24, "decoder.patch_size", "model.patch_size"),
    ("encdec_jepa", {"decoder.patch_size": 64}, 32, "decoder.patch_size", "model.patch_size"),
    ("jepa", {}, 60, "model.patch_size", "decoder"),
    ("jepa", VIT | {"model.patch_size": 16}, 8, "model.patch_size", "decoder"),
    ("encdec", VIT | {"model.latent_dim": 30, "encoder.vit.heads": 2}, 64, "model.latent_dim", "predictor"),
    ("jepa", {"model.tokens": True, "model.latent_dim": 6, "predictor.type": "transformer",
              "predictor.heads": 2}, 64, "model.latent_dim = 6", "patch"),
    ("encdec_jepa", CNN | {"model.tokens": True, "model.latent_dim": 18, "predictor.type": "transformer",
                           "predictor.heads": 3}, 64, "model.latent_dim = 18", "patch"),
    ("vjepa2", {STAGE1 + "patch_size": 5}, 64, STAGE1 + "patch_size", "tubelet"),
    ("vjepa2", {STAGE1 + "patch_size": 64}, 32, STAGE1 + "patch_size", "tubelet"),
    ("vjepa2", {STAGE1 + "blocks": [30], STAGE1 + "scales": [0.7]}, 64, STAGE1 + "scales", "ratio"),
    ("vjepa2", {STAGE1 + "patch_size": 32, STAGE1 + "scales": [0.5, 0.5]}, 32, STAGE1 + "scales", "ratio"),
    ("vjepa2", {STAGE1 + "masking": "tubes", STAGE1 + "ratio": 0.99}, 64, STAGE1 + "ratio", "scales"),
    ("vjepa2", {STAGE1 + "masking": "random", STAGE1 + "ratio": 0.001}, 64, STAGE1 + "ratio", "scales"),
    ("vjepa2", {STAGE1 + "mlp_ratio": 0.001}, 64, "mlp_ratio", "heads"),
    ("vjepa2", {"vjepa2.action.mlp_ratio": 0.001}, 64, "mlp_ratio", "heads"),
]


@pytest.mark.parametrize("name, changed, side, named, other", REFUSED)
def test_a_geometry_that_cannot_be_is_refused_in_a_sentence(name, changed, side, named, other):
    with warnings.catch_warnings(action="error"), pytest.raises(SettingsError) as refused:
        build(name, settings_of(changed), side)
    said = str(refused.value)
    assert named in said and other not in said and "\n" not in said


def settings_of(changed):
    sections = {}
    for key, value in changed.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    return make_settings(sections)


SMALLEST = {"env.size": 8, "model.patch_size": 8, "decoder.patch_size": 8, STAGE1 + "patch_size": 2}
FITS = [
    SMALLEST, SMALLEST | {"model.tokens": True}, SMALLEST | {"decoder.type": "conv", "decoder.channels": 4},
    SMALLEST | VIT | {"model.patch_size": 1, "model.tokens": True, "predictor.type": "transformer"},
    SMALLEST | CNN | {"encoder.cnn.layers": 8}, {"model.frame_stack": 16, STAGE1 + "tubelet_size": 4},
    {"env.size": 84, "model.patch_size": 7, "decoder.patch_size": 14, STAGE1 + "patch_size": 14},
    {"model.latent_dim": 2, "predictor.hidden": []}, {"model.encoder": "mlp", "env.size": 512, **{
        "decoder.patch_size": 64, STAGE1 + "patch_size": 64}},
]


@pytest.mark.parametrize("changed", FITS)
@pytest.mark.parametrize("name", ["encdec", "encdec_jepa", "jepa", "vjepa2"])
def test_what_is_built_can_be_called(name, changed):
    settings = settings_of(changed)
    model, side = build(name, settings), settings.env.size
    frames = torch.zeros(2, model.frame_stack + 1, 3, side, side, dtype=torch.uint8, device="meta")
    z, actions = model.encode(frames), torch.zeros(2, 3, 2, device="meta")
    assert z.shape == (2, 2, *model.latent_shape)
    assert model.rollout(z[:, :1], actions[:, :0], actions).shape == (2, 3, *model.latent_shape)


def test_building_without_numbers_takes_memory_for_none():
    wide = {"env": {"size": 512}, "model": {"encoder": "mlp"}, "encoder.mlp": {"hidden": 16_384}}
    model = build("jepa", make_settings(wide))
    assert sum(p.numel() for p in model.parameters()) > 10**10


@pytest.mark.parametrize("heads", [3, 5, 7])
def test_heads_must_share_a_width_even_past_the_settings_check(heads):
    s = Settings()
    for stage in ("pretrain", "action"):
        own = getattr(s.vjepa2, stage).model_copy(update={"heads": heads})
        changed = s.model_copy(update={"vjepa2": s.vjepa2.model_copy(update={stage: own})})
        with pytest.raises(SettingsError, match=f"not divisible by {heads} attention heads"):
            build("vjepa2", changed)
