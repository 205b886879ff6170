"Speed of whole commands, as seconds and shares; run with `make bench`."

import pytest
import torch

from worldmodels_nb.data.datasets import Windows, make_dataset
from worldmodels_nb.models.base import MODELS, build_model, known_stages
from worldmodels_nb.settings import load_settings

known_stages()  # to ask for the stages of all models is to register them


@pytest.mark.parametrize("name", [name for name in sorted(MODELS) if name != "vjepa2"])
def test_training_step(benchmark, name, tmp_path):
    "One gradient step of the demo recipe, forward and backward."
    settings = load_settings(preset="demo", overrides={"collect.episodes": 64, "data.dir": str(tmp_path)})
    data = make_dataset(settings, progress=False)
    model = build_model(name, settings, data.spec)
    batch = Windows(data, range(len(data)), settings.train.window_steps).sample(
        settings.train.batch_size, 0, 0
    )
    benchmark.pedantic(lambda: model.loss(batch).total.backward(), rounds=5, warmup_rounds=1)
    benchmark.extra_info |= dict(
        parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads()
    )
