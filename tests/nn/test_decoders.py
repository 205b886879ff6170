"Both decoders give frames of any size they accept, begin at the mean frame, and learn."
import pytest
import torch
from torch.nn import functional as F

from worldmodels_nb.nn.decoders import DECODERS, build_decoder
from worldmodels_nb.settings import DecoderSettings, SettingsError


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("tokens, channels, size", [(1, 3, 64), (3, 12, 32), (2, 1, 16), (2, 4, 128)])
def test_a_fresh_decoder_gives_the_mean_frame(kind, tokens, channels, size):
    fresh = build_decoder((tokens, 8), channels, size, DecoderSettings(type=kind))
    decoded = fresh(torch.randn(2, tokens, 8))
    assert decoded.shape == (2, channels, size, size) and decoded.abs().max() == 0


@pytest.mark.parametrize("size", [8, 9, 15, 17, 31, 33, 84, 127, 512])
def test_the_growing_one_makes_frames_of_any_size(size):
    decoder = build_decoder((1, 8), 3, size, DecoderSettings(type="conv", channels=4))
    assert decoder(torch.randn(2, 1, 8)).shape == (2, 3, size, size)


@pytest.fixture(scope="module")
def target(sample):
    return torch.from_numpy(sample.frames[:8].copy()).float() / 255


def learn(decoder, memory, target, mean, scale, steps=300):
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(decoder(memory), (target - mean) / scale).backward()
        optimizer.step()
    return (decoder(memory).detach() * scale + mean).clamp(0, 1)


@pytest.mark.parametrize("kind", DECODERS)
def test_eight_frames_are_remembered(kind, target):
    mean, memory = target.mean(0), torch.randn(8, 1, 16)
    decoder = build_decoder((1, 16), 3, 64, DecoderSettings(type=kind))
    decoded = learn(decoder, memory, target, mean, (target - mean).std())
    assert F.mse_loss(decoded, target) < F.mse_loss(mean.expand(8, -1, -1, -1), target) / 10


def test_of_two_frames_that_may_be_meant_the_mean_is_decoded(target):
    mean, memory = target.mean(0), torch.randn(1, 1, 16).expand(2, -1, -1)
    decoder = build_decoder((1, 16), 3, 64, DecoderSettings(type="conv"))
    blurred = learn(decoder, memory, target[[0, 7]], mean, (target - mean).std())
    torch.testing.assert_close(blurred[0], target[[0, 7]].mean(0), atol=0.1, rtol=0)


def test_a_memory_is_a_bag_to_the_one_that_asks():
    asking, memory = build_decoder((1, 16), 3, 64, DecoderSettings()), torch.randn(2, 5, 16)
    torch.nn.init.normal_(asking.to_pixels.weight)
    torch.testing.assert_close(asking(memory), asking(memory.flip(1)), atol=1e-4, rtol=0)
    assert asking(memory).std() > 0.1


def test_patches_and_heads_must_fit():
    with pytest.raises(SettingsError, match="84 px cannot be cut into patches of 16 px"):
        build_decoder((1, 8), 3, 84, DecoderSettings())
    with pytest.raises(SettingsError, match="not divisible by 3 attention heads"):
        build_decoder((1, 8), 3, 64, DecoderSettings(heads=3))
