"Heads and evaluation on a device that is not the CPU: everything runs, and says the same."
import warnings
from dataclasses import replace

import pytest
from device_tools import ELSEWHERE, Device
from run_tools import SMALL, TWO, begin, go, inside, results

from worldmodels_nb.runs.evaluation import evaluate_model, pixel_part
from worldmodels_nb.runs.heads import train_heads
from worldmodels_nb.runs.training import ensure_data, train_models

CHANGES = [
    {}, {"env.id": "CartPole-v1", "model.frame_stack": 2, "model.encoder": "cnn", "train.picture_every": 2},
    {"model.tokens": True, "predictor.type": "transformer", "train.state_decoder.latents": "predicted"}]


@pytest.mark.parametrize("changes", CHANGES)
def test_heads_and_evaluation_say_the_same_on_another_device(changes, tmp_path):
    models = ["encdec", "encdec_jepa", "jepa", *(["vjepa2"] if not changes else [])]
    settings = inside(tmp_path, changes, base=SMALL | TWO, models=models)
    here = results(go("here", settings).folder.path)
    session = begin("there", settings)
    data = ensure_data(session)
    train_models(session, data)
    session = replace(session, device=ELSEWHERE)
    with Device(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="for .*copying from a non-meta parameter")
        for world in train_models(session, data).values():
            train_heads(session, data, world)
            evaluate_model(session, data, world, pixel_part(session, data))
    there = results(session.folder.path)
    assert here.keys() == there.keys() == set(models)
    for model in models:
        assert [row["metric"] for row in here[model]] == [row["metric"] for row in there[model]]
        for one, two in zip(here[model], there[model]):
            # heads are trained there, briefly, on axes of which those of hardly any spread turn by a rounding
            near = .5 if one["protocol"] == "reward" else 1e-2
            assert two["value"] == pytest.approx(one["value"], rel=near, abs=1e-3), (model, one["metric"])
