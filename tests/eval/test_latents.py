"""The cache of latents: every frame once, in order, never of another episode, and never half a file."""

import errno
import os

import numpy as np
import pytest
import torch
from torch import nn

from worldmodels_nb.data.datasets import Windows, open_dataset, sample_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.eval.latents import LatentsError, cache_name, encode_dataset
from worldmodels_nb.models.base import WorldModel
from worldmodels_nb.models.encdec import EncoderDecoder
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.nn.layers import frames_to_float, stack_frames
from worldmodels_nb.settings import load_settings

LENGTHS = [5, 1, 12, 3]


def write_dataset(folder, seed=0):
    rng = np.random.default_rng(seed)
    spec = DataSpec((1, 6, 6), ActionSpec("discrete", 3, None, None), [], [])
    with EpisodeWriter(folder, spec, {"seed": seed}) as writer:
        for steps in LENGTHS:
            writer.add(
                Episode(
                    rng.integers(0, 256, (steps + 1, 1, 6, 6), np.uint8),
                    rng.integers(0, 3, steps),
                    np.zeros(steps, np.float32),
                    False,
                    None,
                )
            )
    return open_dataset(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("latents") / "set")


class Tiny(WorldModel):
    "Two tokens of five numbers from F stacked frames; drops half of them in training."

    def __init__(self, frame_stack=3, seed=0):
        nn.Module.__init__(self)
        torch.manual_seed(seed)
        self.frame_stack, self.latent_shape, self.frames = frame_stack, (2, 5), 0
        self.linear, self.drop = nn.Linear(frame_stack * 36, 10), nn.Dropout(0.5)

    @property
    def inference_encoder(self):
        return self.linear

    def encode(self, frames):
        self.frames += len(frames)
        x = stack_frames(frames_to_float(frames), self.frame_stack).flatten(2)  # (B, T, F·C·h·w)
        return self.drop(self.linear(x)).unflatten(2, self.latent_shape)  # (B, T, 2, 5)


def one_by_one(model, data):
    "Row by row and episode by episode, as a careful person would do it by hand."
    rows, F = [], model.frame_stack
    model.eval()
    for start, steps in zip(data.starts, data.lengths):
        episode = torch.from_numpy(data.frames[start : start + steps + 1].copy())
        for t in range(steps + 1):
            stack = torch.stack([episode[max(0, t - back)] for back in reversed(range(F))])
            with torch.no_grad():
                rows.append(model.encode(stack[None])[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("frame_stack", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_latents_equal_those_made_one_by_one(data, frame_stack, batch, tmp_path):
    model = Tiny(frame_stack)
    z = encode_dataset(model, data, tmp_path, batch=batch, progress=False)
    assert z.shape == (sum(LENGTHS) + len(LENGTHS), 2, 5) and z.dtype == np.float32
    assert torch.allclose(torch.from_numpy(z.copy()), one_by_one(model, data), atol=1e-6)


def test_each_frame_is_encoded_once_and_a_second_call_encodes_none(data, tmp_path):
    model = Tiny()
    first = encode_dataset(model, data, tmp_path, progress=False)
    assert model.frames == len(data.frames)
    again = encode_dataset(model, data, tmp_path, progress=False)
    assert model.frames == len(data.frames) and np.array_equal(first, again)
    assert isinstance(again, np.memmap) and not again.flags.writeable


def test_window_r_of_no_steps_is_row_r(sample):
    stills = Windows(sample, np.arange(len(sample)), steps=0, frame_stack=2)
    assert stills.rows(np.arange(len(stills)))[:, -1].tolist() == list(range(len(sample.frames)))


def test_the_models_mode_and_the_random_numbers_are_left_alone(data, tmp_path):
    model = Tiny().train()
    state = torch.get_rng_state()
    encode_dataset(model, data, tmp_path, progress=False)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_windows_hand_out_the_latents_of_their_own_frames(data, tmp_path):
    model = Tiny().eval()
    z = encode_dataset(model, data, tmp_path, progress=False)
    windows = Windows(data, np.arange(len(data)), steps=2, frame_stack=model.frame_stack, latents=z)
    batch = windows.batch(np.arange(len(windows)))
    with torch.no_grad():
        assert torch.allclose(model.encode(batch.frames), batch.latents, atol=1e-6)
    assert batch.latents.shape == (len(windows), 3, 2, 5)


def test_half_precision_halves_the_file_and_keeps_three_digits(data, tmp_path):
    model = Tiny()
    full, half = (
        encode_dataset(model, data, tmp_path, dtype=dtype, progress=False) for dtype in ("float32", "float16")
    )
    assert half.dtype == np.float16 and half.nbytes * 2 == full.nbytes
    assert np.allclose(full, half, rtol=1e-3, atol=1e-4)
    assert model.frames == 2 * len(data.frames)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int8"])
def test_other_number_types_are_refused(data, dtype, tmp_path):
    with pytest.raises(LatentsError, match=f"'{dtype}'.*no bfloat16"):
        encode_dataset(Tiny(), data, tmp_path, dtype=dtype, progress=False)


@pytest.mark.parametrize("dtype, advice", [("float16", "use float32"), ("float32", "weights are broken")])
def test_latents_that_are_not_finite_are_refused_and_leave_nothing(data, dtype, advice, tmp_path):
    model = Tiny()
    with torch.no_grad():
        model.linear.bias.fill_(1e5 if dtype == "float16" else float("nan"))
    with pytest.raises(LatentsError, match=f"rows 0 to 24 of dataset set .*{dtype}; .*{advice}"):
        encode_dataset(model, data, tmp_path, dtype=dtype, progress=False)
    assert not list(tmp_path.iterdir())


def test_names_differ_where_the_content_would(data, tmp_path):
    other = write_dataset(tmp_path / "other", seed=1)

    class Cousin(Tiny):
        def encode(self, frames):
            return -super().encode(frames)

    names = [
        cache_name(Tiny(), data, "float32"),
        cache_name(Tiny(), data, "float16"),
        cache_name(Tiny(), other, "float32"),
        cache_name(Tiny(seed=1), data, "float32"),
        cache_name(Cousin(), data, "float32"),
    ]
    assert len(set(names)) == 5
    assert (
        cache_name(Tiny(), data, "float32") == names[0]
        and cache_name(Tiny().eval(), data, "float32") == names[0]
    )


def test_models_with_equal_encoders_share_a_cache_but_not_what_depends_on_more(data):
    plain, longer = Tiny(), Tiny()
    longer.predictor = nn.Linear(5, 5)
    assert cache_name(plain, data, "float32") == cache_name(longer, data, "float32")
    assert cache_name(plain, data, "float32", whole=True) != cache_name(longer, data, "float32", whole=True)


@pytest.mark.parametrize("kind", [JEPA, EncoderDecoder])
def test_names_of_real_models_are_the_same_each_time(kind):
    settings, sample = load_settings(overrides={"model.latent_dim": 32}), sample_dataset()

    def name(seed):
        torch.manual_seed(seed)
        return cache_name(kind(settings, sample.spec), sample, "float32")

    assert name(0) == name(0) != name(1)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "other shape", "other type", "objects"])
def test_a_cache_that_is_not_whole_is_made_again(data, damage, tmp_path):
    good = np.array(encode_dataset(Tiny(), data, tmp_path, progress=False))
    path = next(tmp_path.iterdir())
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(b"PK\x03\x04" * 50)
    elif damage == "other shape":
        np.save(path, good[:-1])
    elif damage == "other type":
        np.save(path, good.astype(np.float64))
    else:
        np.save(path, np.array([{}], dtype=object))  # Python objects, which reading refuses
    model = Tiny()
    assert np.array_equal(
        encode_dataset(model, data, tmp_path, progress=False), good
    ) and model.frames == len(good)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_breaks_off_leaves_nothing(data, error, tmp_path):
    class Broken(Tiny):
        def encode(self, frames):
            if self.frames > 10:
                raise error
            return super().encode(frames)

    with pytest.raises(error):
        encode_dataset(Broken(), data, tmp_path / "new", batch=4, progress=False)
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LatentsError, match="cannot write .*No space left on device; make room"):
        encode_dataset(Tiny(), data, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_progress_can_be_seen_and_switched_off(data, tmp_path, capfd):
    encode_dataset(Tiny(), data, tmp_path / "a", progress=False)
    assert capfd.readouterr() == ("", "")
    encode_dataset(Tiny(), data, tmp_path / "b", batch=5)
    assert "latents: batch 5 of 5" in capfd.readouterr().err
