"What several benchmarks share: a clock for training steps, and a dataset of noise."
import time

import numpy as np

from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.training.fit import Callback

STATES = ["agent x", "agent y", "wall x", "door y"]
SPEC = DataSpec((3, 64, 64), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), STATES, [0, 1])


class Watch(Callback):
    "Seconds of each step, from one `on_step` to the next."

    def on_start(self, run):
        self.marks = [time.perf_counter()]

    def on_step(self, run):
        self.marks.append(time.perf_counter())


def write_noise(folder, episodes):
    "So many episodes of 32 steps: random frames of 64×64 px, actions and states."
    rng = np.random.default_rng(0)
    with EpisodeWriter(folder, SPEC, {}) as writer:
        for _ in range(episodes):
            frames = rng.integers(0, 256, (33, 3, 64, 64), np.uint8)
            actions = rng.uniform(-1, 1, (32, 2)).astype(np.float32)
            states = rng.uniform(0, 64, (33, 4)).astype(np.float32)
            writer.add(Episode(frames, actions, np.zeros(32, np.float32), False, states))
