"Every encoder gives what its `latent_shape` promises, for every size, or says in a sentence why it cannot."
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from worldmodels_nb.nn.encoders import ENCODERS, build_encoder, sincos_positions
from worldmodels_nb.settings import Settings, SettingsError, VitSettings, make_settings

SMALL = {
    "encoder.vit": {"depth": 1}, "encoder.patch": {"channels": 8}, "encoder.cnn": {"base_filters": 4},
}
# side in px -> tokens of the patch encoder, the CNN and the ViT; 7 and 9 patches a side are odd: rounded up
TOKENS = {16: (1, 4, 4), 56: (16, 49, 49), 72: (25, 81, 81), 64: (16, 64, 64)}


def made(encoder, channels, size, stack=1, tokens=False, latent_dim=16, **sections):
    model = {"encoder": encoder, "frame_stack": stack, "tokens": tokens, "latent_dim": latent_dim}
    return build_encoder(make_settings(SMALL | {"model": model} | sections), (channels, size, size))


def sized(encoder, channels, size, stack=1, tokens=False):
    "(N, D) of what comes out: what was promised, and normed."
    built = made(encoder, channels, size, stack, tokens)
    z = built(torch.randn(2, channels * stack, size, size))
    assert z.shape[1:] == built.latent_shape
    torch.testing.assert_close(z.mean(-1), torch.zeros(2, len(z[0])), atol=1e-4, rtol=0)
    return built.latent_shape


@pytest.mark.parametrize("channels, stack", [(3, 1), (1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("size", TOKENS)
def test_latents_have_the_promised_shape(channels, stack, size):
    for encoder in ENCODERS: assert sized(encoder, channels, size, stack) == (1, 16)
    of_tokens = [sized(encoder, channels, size, stack, tokens=True)[0] for encoder in ("patch", "cnn", "vit")]
    assert tuple(of_tokens) == TOKENS[size]


@pytest.mark.parametrize("encoder", ["cnn", "mlp"])
def test_some_need_no_grid(encoder):
    assert sized(encoder, 3, 61) == (1, 16)


@pytest.mark.parametrize("encoder", ["patch", "vit"])
def test_the_others_do(encoder):
    with pytest.raises(SettingsError, match="60 px cannot be cut into patches of 8 px"): sized(encoder, 3, 60)


def test_too_many_convolutions_are_refused():
    with pytest.raises(SettingsError, match="encoder.cnn.layers"):
        made("cnn", 3, 64, **{"encoder.cnn": {"layers": 8, "padding": 0}})


@pytest.mark.parametrize("size, kernel, padding", [(8, 9, 0), (12, 15, 1), (8, 15, 3)])
def test_a_kernel_larger_than_the_frame_is_what_is_named(size, kernel, padding):
    with pytest.raises(SettingsError, match=f"encoder.cnn.kernel_size = {kernel} is larger"):
        made("cnn", 3, size, **{"encoder.cnn": {"layers": 2, "kernel_size": kernel, "padding": padding}})
    just = {"layers": 1, "kernel_size": kernel, "padding": padding}
    made("cnn", 3, kernel - 2 * padding, **{"encoder.cnn": just})


def test_frames_must_be_square():
    with pytest.raises(SettingsError, match="not square"): build_encoder(Settings(), (3, 64, 48))


def test_heads_must_divide_the_width_even_past_the_settings_check():
    settings = make_settings({"model": {"encoder": "vit", "latent_dim": 20}})
    encoder = settings.encoder.model_copy(update={"vit": VitSettings(heads=3)})
    with pytest.raises(SettingsError, match="not divisible by 3 attention heads"):
        build_encoder(settings.model_copy(update={"encoder": encoder}), (3, 64, 64))


def test_a_width_that_positions_cannot_share_is_refused():
    with pytest.raises(SettingsError, match="model.latent_dim = 18 is not divisible by 4"):
        sincos_positions(4, 18)


def test_a_patch_is_a_row_of_a_matrix():
    conv, frames = nn.Conv2d(3, 5, kernel_size=8, stride=8), torch.rand(2, 3, 64, 64)
    patches = F.unfold(frames, kernel_size=8, stride=8)
    by_hand = (conv.weight.flatten(1) @ patches) + conv.bias[:, None]
    torch.testing.assert_close(conv(frames).flatten(2), by_hand, atol=1e-5, rtol=0)


def test_positions_are_near_where_places_are():
    code = sincos_positions(16, 64)
    likeness = (code @ code[8 * 16 + 8]).view(16, 16)
    assert likeness.argmax() == 8 * 16 + 8
    for row, column in product((7, 8, 9), repeat=2): assert likeness[row, column] > likeness[0, 0]


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_without_positions_a_transformer_sees_a_bag_of_patches(pool):
    built = made("vit", 3, 64, **{"encoder.vit": {"pool": pool}}).eval()
    frames = torch.rand(1, 3, 64, 64)
    patches = frames.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, torch.randperm(64)]
    moved = patches.unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 64, 64)
    with_positions = (built(moved) - built(frames)).abs().max()
    built.positions.zero_()
    assert (built(moved) - built(frames)).abs().max() < 1e-5 < with_positions
