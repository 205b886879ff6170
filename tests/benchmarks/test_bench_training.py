"Does reading windows from disk hold training up? Run: pytest --benchmark-only."


import numpy as np
import pytest
import torch
from bench_tools import SPEC, Watch, write_noise

from worldmodels_nb.data.datasets import Batch, Windows, open_dataset
from worldmodels_nb.eval.latents import encode_dataset
from worldmodels_nb.eval.rewards import RewardMLP, RewardWindows
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.settings import load_settings
from worldmodels_nb.training.fit import fit, freeze
from worldmodels_nb.training.parts import NaNGuard

STEPS = 50  # of each kind


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "9,900 frames on disk, 122 MB."
    folder = tmp_path_factory.mktemp("bench") / "set"
    write_noise(folder, 300)
    return open_dataset(folder)


def compare(benchmark, stored, sample, callbacks=()):
    """Every third step is of the kind to be judged, the two between the reference: one batch, no callback.

    They take turns in one run, so whatever else the machine does falls on all alike. How far the two equal
    kinds come out apart is what this machine cannot tell at the moment, and is granted.
    """
    settings = load_settings()
    recipe = settings.train.model_copy(update={"steps": 3 * STEPS + 9})
    windows, watch = Windows(stored, np.arange(len(stored)), recipe.window_steps), Watch()
    loaded = windows.sample(recipe.batch_size, 0, 0)
    torch.manual_seed(0)

    def batch(step):
        return sample(windows, recipe.batch_size, step) if sample and step % 3 == 0 else loaded

    benchmark.pedantic(lambda: fit(JEPA(settings, SPEC), batch, recipe, [*callbacks, watch]), rounds=1)
    judged, *plain = (np.median(np.diff(watch.marks)[9 + kind :: 3]) for kind in range(3))
    ratio, blur = judged / np.mean(plain), max(plain) / min(plain)
    benchmark.extra_info |= dict(
        ratio=round(ratio, 3), blur=round(blur, 3), milliseconds=round(1000 * judged, 1)
    )
    assert ratio <= 1.05 * blur


def test_a_step_through_windows_costs_at_most_a_twentieth_more_than_on_one_preloaded_batch(benchmark, stored):
    compare(benchmark, stored, lambda windows, size, step: windows.sample(size, 0, step))


def test_the_guard_costs_at_most_a_twentieth(benchmark, stored):
    class EveryThird(NaNGuard):
        def before_update(self, run):
            if run.step % 3 == 0:
                super().before_update(run)

    compare(benchmark, stored, None, [EveryThird()])


def test_encoding_a_dataset(benchmark, stored, tmp_path):
    "Frames a second through the default encoder into the cache."
    torch.manual_seed(0)
    model, count = JEPA(load_settings(), SPEC), iter(range(1000))
    benchmark.pedantic(
        lambda: encode_dataset(model, stored, tmp_path / str(next(count)), progress=False), rounds=2
    )
    if benchmark.stats:
        benchmark.extra_info["frames_per_second"] = round(len(stored.frames) / benchmark.stats.stats.min)


def test_an_epoch_of_a_reward_head_on_cached_latents_is_five_times_one_that_encodes_again(
    benchmark, stored, tmp_path
):
    "Behind a ViT (depth 4, width 128, 64 patches), batches of 128 steps; both kinds take turns in one run."
    settings = load_settings(overrides={"model.encoder": "vit"})
    torch.manual_seed(0)
    model = freeze(JEPA(settings, SPEC))
    few = np.arange(20)  # what is timed does not need all of the latents
    latents = np.zeros((len(stored.frames), *model.latent_shape), np.float32)
    stills = Windows(stored, few, 1)
    for begin in range(0, len(stills), 64):
        latents[stills.begin[begin : begin + 64]] = model.encode(
            stills.batch(np.arange(begin, min(begin + 64, len(stills)))).frames
        )[:, 0].numpy()
    cached, recipe, watch = (
        RewardWindows(stored, few, latents),
        settings.recipe("train.reward_mlp").model_copy(update={"steps": 22}),
        Watch(),
    )

    def batch(step):
        if step % 2:
            return cached.sample(recipe.batch_size, 0, step)
        b = stills.sample(recipe.batch_size, 0, step)
        return Batch(
            None, b.actions, torch.randn_like(b.rewards), b.terminated, latents=model.encode(b.frames)
        )

    head = RewardMLP(model.latent_shape, SPEC.action, hidden=settings.train.reward_mlp.hidden)
    benchmark.pedantic(lambda: fit(head, batch, recipe, [watch]), rounds=1)
    encoded, cached_ = (np.median(np.diff(watch.marks)[2 + kind :: 2]) for kind in range(2))
    benchmark.extra_info |= dict(
        ratio=round(encoded / cached_, 1),
        milliseconds_cached=round(1000 * cached_, 2),
        milliseconds_encoded=round(1000 * encoded, 1),
    )
    assert encoded >= 5 * cached_
