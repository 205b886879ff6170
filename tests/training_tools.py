"What the tests of training share: a table of numbers to draw batches from, a small network, a callback."
import numpy as np
import torch
from torch import nn

from worldmodels_nb.settings import TrainingSettings
from worldmodels_nb.training.fit import Callback, LossTerms, Trainable

FORTY = TrainingSettings(
    steps=40,
    batch_size=8,
    learning_rate=0.01,
    validate_every=10,
    validation_batches=3,
    checkpoint_every=15,
    picture_every=20,
)


class Rows:
    "n rows of two numbers; batches are drawn by seed and step, as windows are."

    def __init__(self, n, seed=0):
        self.x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return self.x[indices]

    def sample(self, batch_size, seed, step):
        return self.batch(np.random.default_rng([seed, step]).integers(len(self), size=batch_size))


class Small(Trainable):
    "Learns the product of two numbers; counts its steps, draws random numbers, and has a frozen part."

    steps = 0

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 1))
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def loss(self, x):
        self.steps += self.training
        error = (self.net(x) - x.prod(1, keepdim=True)).square().mean()
        return LossTerms(total=2 * error, terms={"error": error.detach()})


class At(Callback):
    "Does something after one step."

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, run):
        if run.step == self.step:
            self.action(run)
