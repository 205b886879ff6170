"Runs to look at that nobody trained: a tiny dataset, fresh models, decoders and probes of small numbers."
import numpy as np
import torch
from run_tools import SMALL, TWO, inside

from worldmodels_nb.data.datasets import write_dataset
from worldmodels_nb.eval.heads import LinearProbe, StateDecoder
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.runs.folder import RunFolder
from worldmodels_nb.runs.reopen import OpenRun
from worldmodels_nb.runs.training import RunData
from worldmodels_nb.training.fit import freeze

BOTH = ("encdec", "jepa")


def loud(module):
    "The same module with numbers in place of its zeros, so that what goes in can be seen in what comes out."
    for weight in module.parameters(): torch.nn.init.normal_(weight, std=.1)
    return freeze(module)


def a_probe(world):
    "A probe that reads something."
    probe = LinearProbe(int(np.prod(world.latent_shape)), len(world.spec.state_names))
    torch.nn.init.normal_(probe.weight)
    torch.nn.init.ones_(probe.unit)
    return freeze(probe)


def untrained_run(folder, changes=(), models=BOTH) -> OpenRun:
    "A run of fresh models; all but the first episode are held out."
    settings = inside(folder, {"collect.episodes": 4, "env.size": 32} | dict(changes), base=SMALL | TWO)
    dataset = write_dataset(settings, folder / "data", progress=False)
    data = RunData(dataset, np.arange(1), np.arange(1, len(dataset)), settings.model.frame_stack)
    frames = torch.from_numpy(dataset.frames[:20].copy())
    worlds = {name: freeze(fresh_model(name, settings, dataset.spec, frames)) for name in models}
    for world in worlds.values():
        if world.decodes: loud(world)
    decoders = {name: loud(StateDecoder(world.latent_shape, dataset.spec.frame_shape, 4))
                for name, world in worlds.items()}
    probes = {name: a_probe(world) for name, world in worlds.items()} if dataset.spec.state_names else {}
    status = dict(status="finished")
    return OpenRun(RunFolder(folder), settings, status, data, worlds, decoders, probes, {}, [], [])
