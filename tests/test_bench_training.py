"Does reading windows from disk hold training up? Run: pytest --benchmark-only."
import time

import numpy as np
import pytest
import torch

from worldmodels_nb.collect import Episode
from worldmodels_nb.envs import ActionSpec
from worldmodels_nb.episodes import DataSpec, EpisodeWriter, Windows, open_dataset
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.settings import load_settings
from worldmodels_nb.training.callbacks import NaNGuard
from worldmodels_nb.training.fit import Callback, fit
from worldmodels_nb.training.latents import encode_dataset

SPEC = DataSpec((3, 64, 64), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), ["agent x", "agent y", "wall x", "door y"], [0, 1])
STEPS = 50  # of each kind


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "9,900 frames on disk, 122 MB."
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("bench") / "set"
    with EpisodeWriter(folder, SPEC, {}) as writer:
        for _ in range(300):
            writer.add(Episode(rng.integers(0, 256, (33, 3, 64, 64), np.uint8), rng.uniform(-1, 1, (32, 2)).astype(np.float32), np.zeros(32, np.float32),
                               False, rng.uniform(0, 64, (33, 4)).astype(np.float32)))
    return open_dataset(folder)


class Watch(Callback):
    "Seconds of each step, from one `on_step` to the next."
    def on_start(self, run): self.marks = [time.perf_counter()]
    def on_step(self, run): self.marks.append(time.perf_counter())


def compare(benchmark, stored, sample, callbacks=()):
    """Every third step is of the kind to be judged, the two between are the floor: one preloaded batch and no callback.

    They take turns in one run, so whatever else the machine does falls on all alike. How far the two equal kinds come out apart
    is what this machine cannot tell at the moment, and is granted.
    """
    settings = load_settings()
    recipe = settings.training.model_copy(update={"steps": 3 * STEPS + 9})
    windows, watch = Windows(stored, np.arange(len(stored)), recipe.window), Watch()
    loaded = windows.sample(recipe.batch_size, 0, 0)
    torch.manual_seed(0)
    def batch(step): return sample(windows, recipe.batch_size, step) if sample and step % 3 == 0 else loaded
    benchmark.pedantic(lambda: fit(JEPA(settings, SPEC), batch, recipe, [*callbacks, watch]), rounds=1)
    judged, *floor = (np.median(np.diff(watch.marks)[9 + kind::3]) for kind in range(3))
    ratio, blur = judged / np.mean(floor), max(floor) / min(floor)
    benchmark.extra_info |= dict(ratio=round(ratio, 3), blur=round(blur, 3), milliseconds=round(1000 * judged, 1))
    assert ratio <= 1.05 * blur


def test_a_step_through_windows_costs_at_most_a_twentieth_more_than_on_one_preloaded_batch(benchmark, stored):
    compare(benchmark, stored, lambda windows, size, step: windows.sample(size, 0, step))


def test_the_guard_costs_at_most_a_twentieth(benchmark, stored):
    class EveryThird(NaNGuard):
        def before_update(self, run):
            if run.step % 3 == 0: super().before_update(run)
    compare(benchmark, stored, None, [EveryThird()])


def test_encoding_a_dataset(benchmark, stored, tmp_path):
    "Frames a second through the default encoder into the cache."
    torch.manual_seed(0)
    model, count = JEPA(load_settings(), SPEC), iter(range(1000))
    benchmark.pedantic(lambda: encode_dataset(model, stored, tmp_path / str(next(count)), progress=False), rounds=2)
    if benchmark.stats: benchmark.extra_info["frames_per_second"] = round(len(stored.frames) / benchmark.stats.stats.min)
