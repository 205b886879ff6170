"""How fast windows are read and episodes written, beside the memory's own speed; how little memory it takes.

Run: pytest --benchmark-only.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from bench_tools import SPEC, write_noise

from worldmodels_nb.data.datasets import Windows, open_dataset
from worldmodels_nb.data.episodes import Episode, EpisodeWriter
from worldmodels_nb.settings import repo_root

MARK = 200_000  # windows of four frames per second


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "49,500 frames on disk, 608 MB: as many as the default settings collect."
    folder = tmp_path_factory.mktemp("bench") / "set"
    write_noise(folder, 1500)
    yield open_dataset(folder)
    shutil.rmtree(folder)


def memory_speed(data, B):
    "Bytes of B windows copied in one piece each time, from all over the same file: windows per second."
    frames, size = data.frames, 4 * B
    space = np.empty((size, *frames.shape[1:]), np.uint8)

    def pass_over():
        begun = time.perf_counter()
        for start in range(0, len(frames) - size, size):
            np.copyto(space, frames[start : start + size])
        return (len(frames) - size) / 4 / (time.perf_counter() - begun)

    pass_over()
    return max(pass_over() for _ in range(3))


@pytest.mark.parametrize("B", [64, 256])
def test_windows_per_second(benchmark, stored, B):
    "At least 200,000 four-frame windows a second, or half of what copying as many bytes at once reaches."
    windows = Windows(stored, np.arange(len(stored)), 3)
    ceiling, step = memory_speed(stored, B), iter(range(10**9))
    benchmark.pedantic(
        lambda: windows.sample(B, 0, next(step)), rounds=30, iterations=16384 // B, warmup_rounds=3
    )
    if not benchmark.stats:
        return
    reached = B / benchmark.stats.stats.min
    benchmark.extra_info |= dict(
        windows_per_second=round(reached),
        median_windows_per_second=round(B / benchmark.stats.stats.median),
        one_piece=round(ceiling),
    )
    assert reached >= min(MARK, ceiling / 2)


def test_writing(benchmark, tmp_path):
    "Megabytes a second through the writer, hashes included."
    frames, count = np.random.default_rng(0).integers(0, 256, (33, 3, 64, 64), np.uint8), iter(range(1000))
    episode = Episode(
        frames, np.zeros((32, 2), np.float32), np.zeros(32, np.float32), False, np.zeros((33, 4), np.float32)
    )

    def write():
        with EpisodeWriter(tmp_path / str(next(count)), SPEC, {}) as writer:
            for _ in range(200):
                writer.add(episode)

    benchmark.pedantic(write, rounds=3)
    if benchmark.stats:
        benchmark.extra_info["MB_per_second"] = round(200 * frames.nbytes / 1e6 / benchmark.stats.stats.min)


TRAIN = """
import sys
from pathlib import Path
import numpy as np, torch
from worldmodels_nb.data.datasets import Windows, open_dataset
torch.set_num_threads(1)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e3
data = open_dataset(sys.argv[1])
windows = Windows(data, data.split(.2)[0], 8)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Flatten(), torch.nn.Linear(1024, 4))
optimizer = torch.optim.AdamW(model.parameters())
def train(steps):
    for step in steps:
        batch = windows.sample(64, 0, step)
        loss = (model(batch.frames[:, 0] / 255) - batch.states[:, 0]).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
before = anonymous()
train(range(200))
print(data.frames.nbytes / 1e9, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_four_gigabytes_train_in_little_memory(benchmark, tmp_path):
    "200 gradient steps on a dataset of 4 GB: anonymous memory grows by at most 200 MB."
    lengths = np.full(10_000, 32)
    n = int((lengths + 1).sum())
    shapes = dict(
        frames=(np.uint8, (n, 3, 64, 64)),
        actions=(np.float32, (n, 2)),
        rewards=(np.float32, (n,)),
        terminated=(bool, (n,)),
        states=(np.float32, (n, 4)),
    )
    for name, (dtype, shape) in shapes.items():
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", dtype, shape)  # sparse: nothing is written
    np.save(tmp_path / "lengths.npy", lengths)
    record = dict(
        schema_version=1,
        settings={},
        spec=asdict(SPEC),
        hash="0",
        files={path.stem: dict(bytes=path.stat().st_size, sha256="0") for path in tmp_path.glob("*.npy")},
    )
    (tmp_path / "dataset.json").write_text(json.dumps(record))

    def train():
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=repo_root(),
            timeout=500,
        )
        assert not done.returncode, done.stderr[-1000:]
        return map(float, done.stdout.split())

    size, grown = benchmark.pedantic(train, rounds=1)
    benchmark.extra_info |= dict(dataset_GB=round(size, 2), anonymous_MB=round(grown, 1))
    assert size > 4 and grown <= 200
