"What can be known to fail is refused before anything is made, in a sentence that names the setting."

import pytest
import torch
from run_tools import SMALL, TWO, evaluation_of, go, inside, refused, run_in, small
from safetensors.torch import save_file

from worldmodels_nb.data.datasets import open_dataset
from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.runs.experiment import check_experiment, run_experiment
from worldmodels_nb.runs.training import ensure_data, split_data

BEFORE = [  # settings, and words of the refusal
    ({"run.models": ["vjepa2"], "vjepa2.action.window_steps": 30}, ["vjepa2.action.window_steps"]),
    ({"run.models": ["encdec", "vjepa2"], "vjepa2.pretrain.frames": 32}, ["vjepa2.pretrain"]),
    ({"run.models": ["vjepa2"], "vjepa2.pretrain.patch_size": 5}, ["vjepa2.pretrain.patch_size"]),
    ({"run.models": ["vjepa2"], "vjepa2.pretrain.pretrained": "./nowhere"},
     ["vjepa2.pretrain.pretrained", "nowhere"]),
    ({"run.models": ["vjepa2"], "vjepa2.action.load": "no/where"}, ["vjepa2.action.load", "no/where"]),
    ({"jepa.load": "data/runs/nowhere"}, ["jepa.load", "nowhere"]),
    ({"run.models": ["encdec", "jepa"], "jepa.load": "~/no.safetensors"}, ["jepa.load", "no.safetensors"]),
    ({"predictor.type": "mlp", "predictor.hidden": [-5]}, ["predictor.hidden"]),
    ({"model.encoder": "cnn", "encoder.cnn.layers": 8, "encoder.cnn.padding": 0}, ["encoder.cnn"]),
    ({"model.encoder": "cnn", "encoder.cnn.kernel_size": 15, "encoder.cnn.padding": 0,
      "encoder.cnn.layers": 4}, ["encoder.cnn"]),
    ({"run.stages": ["evaluate"], "evaluation.horizons": [100]}, ["evaluation.horizons", "collect.steps"]),
    ({"evaluation.horizons": [7, 9]}, ["evaluation.horizons"]),
    ({"collect.steps": 1}, ["collect.steps", "train.window_steps"]),
    ({"train.window_steps": 9}, ["train.window_steps"]),
    ({"collect.policy": "ppo", "env.size": 64, "collect.ppo.load": "no/agent"}, ["collect.ppo.load"]),
    ({"env.kwargs": {"walls": 3}}, ["env.kwargs"]),
]


@pytest.mark.parametrize("changes, words", BEFORE)
def test_what_can_be_known_is_refused_before_there_is_a_folder(changes, words, tmp_path):
    with refused(ValueError, *words):
        models = changes.get("run.models", ["jepa"])
        run_experiment("mine", inside(tmp_path, changes, base=SMALL | TWO, models=models), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_models_that_are_not_asked_for_refuse_nothing(tmp_path):
    unasked = {"vjepa2.pretrain.patch_size": 5, "vjepa2.action.window_steps": 30, "encdec.load": "no/where"}
    check_experiment(small(tmp_path, unasked))


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    "A run on episodes of six steps, and its dataset."
    session = go("six", small(tmp_path_factory.mktemp("six")), ("data",))
    return session


@pytest.mark.parametrize("changes, words", [
    ({"train.window_steps": 7}, ["train.window_steps", "7"]),
    ({"run.models": ["vjepa2"], **TWO, "vjepa2.action.window_steps": 8}, ["vjepa2.action.window_steps", "8"]),
    ({"run.models": ["vjepa2"], **TWO, "vjepa2.pretrain.frames": 10}, ["vjepa2.pretrain.frames"]),
    ({"evaluation.horizons": [7]}, ["evaluation.horizons"])])
def test_windows_of_given_data_are_cut_before_anything_is_made(changes, words, six, tmp_path):
    given = {"data.path": str(ensure_data(six).dataset.folder)}
    settings = inside(tmp_path, given | changes, base=SMALL, models=changes.get("run.models", ["jepa"]))
    with refused(ValueError, *words): run_experiment("mine", settings, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_data_alone_are_gathered_whatever_models_need(tmp_path):
    run_in(tmp_path, {"run.stages": ["data"], "train.window_steps": 5, "collect.steps": 5})


@pytest.mark.parametrize("steps, horizons", [(1, [1]), (2, [1, 2]), (3, [3])])
def test_heads_and_protocols_that_short_episodes_cannot_have_are_left_out(steps, horizons, tmp_path):
    short = {"collect.steps": steps, "train.window_steps": 1, "evaluation.horizons": horizons}
    folder = run_in(tmp_path, short | {"evaluation.history": 1})
    found = evaluation_of(folder, "jepa")
    assert any("reward" in note.lower() for note in found["notes"]) or any(
        row["protocol"] == "reward" for row in found["rows"])
    assert any(row["protocol"] == "rollout" for row in found["rows"])


@pytest.mark.parametrize("model", ["encdec", "encdec_jepa", "jepa"])
def test_weights_of_another_shape_are_found_before_anything_is_made(model, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"encoder.weight": torch.zeros(3, 4)}, path)
    settings = small(tmp_path, {f"{model}.load": str(path)}, [model])
    with refused(ValueError, f"{model}.load", "other.safetensors"):
        run_experiment("mine", settings, progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.safetensors"]


def test_a_dataset_of_one_episode_is_refused_early(six, tmp_path):
    dataset = open_dataset(ensure_data(six).dataset.folder)
    dataset.lengths = dataset.lengths[:1]
    with refused(DatasetError, "one episode"): split_data(dataset, six.settings)


def test_checking_touches_no_random_numbers(tmp_path):
    torch.manual_seed(3)
    settings = inside(tmp_path, base=SMALL | TWO, models=["encdec", "encdec_jepa", "jepa", "vjepa2"])
    worlds = check_experiment(settings)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert all(p.device.type == "meta" for world in worlds.values() for p in world.parameters())
