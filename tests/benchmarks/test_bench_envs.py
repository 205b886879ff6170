"How fast frames are made: read extra_info['frames_per_second']. Run: pytest --benchmark-only."

import numpy as np
import pytest

from worldmodels_nb.data.collect import gather
from worldmodels_nb.data.envs import FrameEnv, FrameVector, to_frames
from worldmodels_nb.data.tworooms import TwoRooms
from worldmodels_nb.settings import EnvSettings, load_settings


def frames_per_second(benchmark, frames):
    if benchmark.stats:
        benchmark.extra_info["frames_per_second"] = round(frames / benchmark.stats["min"])


@pytest.mark.parametrize("wall", ["fixed", "random"])
def test_bench_two_rooms_step_and_render(benchmark, wall):
    room, rng = TwoRooms(wall), np.random.default_rng(0)
    states, actions = room.reset(1024, rng), rng.uniform(-1, 1, (1024, 2))
    benchmark(lambda: room.render(room.step(states, actions)[0]))
    frames_per_second(benchmark, 1024)
    if benchmark.stats:
        assert 1024 / benchmark.stats["min"] > 20_000


def test_bench_two_rooms_step_only(benchmark):
    room, rng = TwoRooms("random"), np.random.default_rng(0)
    states, actions = room.reset(4096, rng), rng.uniform(-1, 1, (4096, 2))
    benchmark(room.step, states, actions)
    frames_per_second(benchmark, 4096)


def test_bench_frame_vector(benchmark):
    vector = FrameVector(EnvSettings(), 256)
    vector.reset(list(range(256)))
    actions = np.random.default_rng(0).uniform(-1, 1, (256, 2)).astype(np.float32)
    benchmark(vector.step, actions)
    frames_per_second(benchmark, 256)


@pytest.mark.parametrize("shape", [(400, 600, 3), (210, 160, 3)])
def test_bench_resize(benchmark, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    benchmark(to_frames, image, 64)
    frames_per_second(benchmark, 1)


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1"])
def test_bench_frame_env(benchmark, id):
    env = FrameEnv(EnvSettings(id=id))
    action = env.action.zeros(1)[0]

    def ten_steps():
        env.reset(0)
        for _ in range(8):
            env.step(action)

    benchmark(ten_steps)
    frames_per_second(benchmark, 9)


def test_bench_gather_two_rooms(benchmark):
    settings = load_settings(overrides={"collect.episodes": 128, "collect.steps": 32})
    benchmark.pedantic(
        lambda: [len(episode.frames) for episode in gather(settings, progress=False)], rounds=3
    )
    frames_per_second(benchmark, 128 * 33)
