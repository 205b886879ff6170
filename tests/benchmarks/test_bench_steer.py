"How fast one can steer, without a browser; printed. Run: pytest --benchmark-only -s."
import time

import numpy as np
import pytest

from worldmodels_nb.runs.reopen import open_run
from worldmodels_nb.widgets.base import picture_bytes
from worldmodels_nb.widgets.drive import draw_scene
from worldmodels_nb.widgets.steer import Steer

STEPS = 60


@pytest.fixture(scope="module")
def steer():
    view = Steer(open_run("sample"))
    for _ in range(5): view.act([0.5, 0.5])                     # what is made once
    yield view
    view.close()


def test_steering_is_at_least_twelve_frames_a_second(benchmark, steer):
    "Environment, all models of the sample, their decoders and heads, the picture, its PNG: processor time."
    actions, spent = np.random.default_rng(0).uniform(-1, 1, (STEPS, 2)), []

    def act():
        began = time.process_time(), time.perf_counter()
        for action in actions: steer.act(action)
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))

    benchmark.pedantic(act, rounds=3)
    processor, clock = (min(seconds) / STEPS for seconds in zip(*spent))
    benchmark.extra_info |= dict(
        models=len(steer.scene.imagined), processor_milliseconds=round(1000 * processor, 1),
        frames_per_second=round(1 / clock, 1), frames_per_processor_second=round(1 / processor, 1))
    print("\nsteering:", benchmark.extra_info)
    assert 1 / processor >= 12


def test_bench_picture_of_a_scene(benchmark, steer):
    "Drawing and PNG alone."
    picture = benchmark(lambda: picture_bytes(draw_scene(steer.scene)))
    benchmark.extra_info["kilobytes"] = round(len(picture) / 1000, 1)
