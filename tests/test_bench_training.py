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
STEPS = 60  # of each kind


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


def report(benchmark, ours, floor):
    "Note the ratio of medians; judge by the lower quartiles, which a busy machine disturbs less."
    benchmark.extra_info |= dict(ratio=round(np.median(ours) / np.median(floor), 3), quartile_ratio=round(np.quantile(ours, .25) / np.quantile(floor, .25), 3),
                                 milliseconds=round(1000 * np.median(ours), 1))
    assert np.quantile(ours, .25) <= 1.05 * np.quantile(floor, .25)


def test_a_step_through_windows_costs_at_most_a_twentieth_more_than_on_one_preloaded_batch(benchmark, stored):
    "Steps of the two kinds take turns in one run, so that whatever else the machine does falls on both alike."
    settings = load_settings()
    recipe = settings.training.model_copy(update={"steps": 2 * STEPS + 10})
    windows = Windows(stored, np.arange(len(stored)), recipe.window)
    loaded, watch = windows.sample(recipe.batch_size, 0, 0), Watch()
    torch.manual_seed(0)
    benchmark.pedantic(lambda: fit(JEPA(settings, SPEC), lambda step: windows.sample(recipe.batch_size, 0, step) if step % 2 else loaded, recipe, [watch]), rounds=1)
    seconds = np.diff(watch.marks)[10:]
    report(benchmark, seconds[1::2], seconds[::2])


def test_the_guard_costs_next_to_nothing(benchmark, stored):
    settings = load_settings()
    recipe = settings.training.model_copy(update={"steps": 2 * STEPS + 10})
    loaded, watch = Windows(stored, np.arange(len(stored)), recipe.window).sample(recipe.batch_size, 0, 0), Watch()
    class EverySecond(NaNGuard):
        def before_update(self, run):
            if run.step % 2: super().before_update(run)
    benchmark.pedantic(lambda: fit(JEPA(settings, SPEC), lambda step: loaded, recipe, [EverySecond(), watch]), rounds=1)
    seconds = np.diff(watch.marks)[10:]
    report(benchmark, seconds[1::2], seconds[::2])


def test_encoding_a_dataset(benchmark, stored, tmp_path):
    "Frames a second through the default encoder into the cache."
    torch.manual_seed(0)
    model, count = JEPA(load_settings(), SPEC), iter(range(1000))
    benchmark.pedantic(lambda: encode_dataset(model, stored, tmp_path / str(next(count)), progress=False), rounds=2)
    if benchmark.stats: benchmark.extra_info["frames_per_second"] = round(len(stored.frames) / benchmark.stats.stats.min)
