"Whole runs, from settings to a report: what a run folder holds, what is refused before anything is lost, what an interruption costs."
import ast
import base64
import csv
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import gymnasium as gym
import nbformat
import numpy as np
import papermill
import pytest
import torch
from safetensors.numpy import load_file

import worldmodels_nb.episodes as episodes_module
import worldmodels_nb.training.callbacks as callbacks_module
import worldmodels_nb.training.latents as latents_module
from worldmodels_nb.data.tworooms import EnvError
from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.data.datasets import verify
from worldmodels_nb.runs.experiment import Experiment, RunError, check_parameters, provenance, read_status, resolve
from worldmodels_nb.models.encdec import EncoderDecoder
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.runs.report import COLUMNS, write_report
from worldmodels_nb.settings import SettingsError, load_settings, repo_root
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.parts import read_result, read_state

ROOT = repo_root(Path(__file__).parent)
STAGES = ("data", "train", "heads", "evaluate")
SMALL = {"collect.episodes": 8, "collect.steps": 6, "data.validation_split": .4, "env.size": 32,
         "train.steps": 6, "train.batch_size": 4, "train.window_steps": 2, "train.validate_every": 2, "train.checkpoint_every": 2, "train.picture_every": 0,
         "train.state_decoder.steps": 4, "train.state_decoder.batch_size": 4, "train.reward_mlp.steps": 4, "train.reward_mlp.batch_size": 4, "train.reward_mlp.hidden": [8], "train.larp.steps": 4, "train.larp.batch_size": 4, "train.larp.hidden": [8],
         "evaluation.probe.mlp_steps": 4, "evaluation.horizons": [1, 2], "evaluation.n_windows": 6, "evaluation.bootstrap": 10}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inside(folder, changes=(), preset="smoke", base=(), models=None):
    "Settings that keep runs and datasets in one folder."
    return resolve(preset, models=models, overrides={**dict(base), "run.dir": str(folder / "runs"), "data.dir": str(folder / "datasets"), **dict(changes)})


def small(folder, changes=(), models=("jepa",)): return inside(folder, changes, base=SMALL, models=list(models))


def go(run, settings, stages=STAGES):
    experiment = Experiment(run, settings, progress=False)
    for stage in stages: experiment.do(stage)
    if stages == STAGES: experiment.finish()
    return experiment


def results(folder):
    "What a run found, but for how long it took."
    return {model.name: [row for row in json.loads((model / "evaluation.json").read_text())["rows"] if row["metric"] != "seconds"] for model in sorted((folder / "models").iterdir())}


def bytes_of(folder): return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def refused(kind, *words):
    "One sentence with these words in it."
    with pytest.raises(kind) as caught: yield caught
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(caught.value)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "One run of the smoke preset with its report, shared; nobody changes it."
    folder = tmp_path_factory.mktemp("smoke")
    experiment = go("first", inside(folder))
    write_report(experiment.folder)
    return experiment


# ---------------------------------------------------------------- what a run folder holds

def test_a_run_folder_holds_what_it_should(smoke):
    folder, s = smoke.folder, smoke.settings
    assert s.run.models == ["encdec", "encdec_jepa", "jepa", "vjepa2"]
    for model in s.run.models:
        stages = smoke.fresh(model).stages()
        for stage in stages:
            world = folder / "models" / model / stage.name
            assert {path.name for path in world.iterdir()} == {"weights.safetensors", "state.pt", "metrics.jsonl", "result.json"}
            result, state = read_result(world), read_state(world / "state.pt")
            assert result["steps"] == state["step"] == read_metrics(world / "metrics.jsonl")[-1]["step"] == s.recipe(stage.section).steps
            assert result["weights"] == hashlib.sha256((world / "weights.safetensors").read_bytes()).hexdigest()
            assert all(np.isfinite(array).all() for array in load_file(world / "weights.safetensors").values())
        with np.load(folder / "models" / model / "evaluation.npz", allow_pickle=False) as arrays:
            frames = (s.evaluation.filmstrips, max(s.evaluation.horizons) + 1, 3, s.env.size, s.env.size)
            assert arrays["truth"].shape == arrays["decoded"].shape == frames and arrays["truth"].dtype == np.uint8
            assert ("imagined" in arrays) == model.startswith("encdec")
        drawn, pictures = ["step_000010.png", "step_000020.png"], folder / "pictures" / model
        parts = ["decoder", *(stage.name for stage in stages if len(stages) > 1)]
        assert [path.name for path in sorted(pictures.iterdir())] == sorted(parts + drawn * (len(stages) == 1))
        for part in parts: assert [path.name for path in sorted((pictures / part).iterdir())] == drawn
    assert {"comparison.csv", "report.html", "settings.ini", "provenance.json", "status.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.parent.parent.rglob(".*")], "something was left half-made"


def test_the_settings_of_a_run_are_kept_resolved(smoke):
    assert load_settings(smoke.folder / "settings.ini") == smoke.settings


def test_provenance_says_where_a_run_comes_from(smoke):
    origin = json.loads((smoke.folder / "provenance.json").read_text())
    assert origin["dataset_hash"] == verify(smoke.dataset.folder).hash and origin["dataset"] == smoke.dataset.folder.name
    assert (origin["frames"], origin["episodes"], origin["seed"]) == (24 * 25, 24, 0)
    assert origin["packages"]["torch"] == torch.__version__ and origin["python"] and origin["system"] and origin["began"]
    assert origin["commit"] or not (ROOT / ".git").exists()


def test_provenance_needs_no_git(smoke, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(smoke.settings)["commit"] is None


def test_status_says_finished(smoke):
    status = read_status(smoke.folder)
    assert status["status"] == "finished" and set(status["stages"]) == set(STAGES) and status["ended"] and "error" not in status


def test_every_json_has_a_schema_version(smoke):
    files = [*smoke.folder.rglob("*.json"), *smoke.dataset.folder.rglob("*.json")]
    assert len(files) >= 9 and [path.name for path in files if json.loads(path.read_text())["schema_version"] != 1] == []


@pytest.fixture(scope="module")
def comparison(smoke):
    with open(smoke.folder / "comparison.csv", newline="", encoding="utf-8") as file: return list(csv.DictReader(file))


def test_the_comparison_is_tidy(smoke, comparison):
    assert (smoke.folder / "comparison.csv").read_text().splitlines()[0] == "env,model,protocol,metric,horizon,seed,value,low,high,n" == ",".join(COLUMNS)
    keys = [tuple(row[column] for column in COLUMNS[:6]) for row in comparison]
    assert len(set(keys)) == len(keys) > 50
    assert {row["env"] for row in comparison} == {"worldmodels_nb/TwoRooms-v0"} and {row["seed"] for row in comparison} == {"0"}
    assert {row["protocol"] for row in comparison} == {"probe", "rollout", "reward", "collapse", "cost"}
    assert all(int(row["n"]) >= 1 and math.isfinite(float(row["value"])) for row in comparison)
    written = {row["metric"] for rows in results(smoke.folder).values() for row in rows}
    assert {row["metric"] for row in comparison} == written | {"seconds"}


def test_the_comparison_has_models_floors_and_horizons(smoke, comparison):
    models = {row["model"] for row in comparison}
    assert {"encdec", "jepa", "floor:persistence"} <= models
    for model in ("encdec", "encdec_jepa", "jepa"):
        assert {f"floor:{floor} ({model})" for floor in ("persistence", "shuffled-actions", "untrained", "probe", "decoder")} <= models
        rolled = [row for row in comparison if row["model"] == model and row["protocol"] == "rollout"]
        assert {row["metric"] for row in rolled} == {f"{kind}{ratio}" for kind in ("latent", "position", "pixel") for ratio in ("", "_ratio")}
        assert all({int(row["horizon"]) for row in rolled if row["metric"] == metric} == {1, 2, 4, 8, 16} for metric in ("latent", "latent_ratio", "position", "pixel"))
        assert {row["metric"] for row in comparison if row["model"] == model and row["protocol"] == "probe"} == {f"{kind}r2 {what}" for kind in ("", "mlp ") for what in ("agent x", "agent y", "position")}
        for head in ("reward_mlp", "reward_mlp_no_action", "larp"):
            paid = [row for row in comparison if row["model"] == f"{model} {head}"]
            assert {row["metric"] for row in paid} == {"mse", "mse_ratio"} | ({"mse_vs_mlp"} if head != "reward_mlp" else set())
            assert {int(row["horizon"]) for row in paid} == {1, 2, 4, 8, 16}
    assert {f"floor:{floor}" for floor in ("mean-reward", "last-reward", "oracle", "oracle-ahead")} <= models
    assert not [row for row in comparison if row["model"].startswith("floor:") and row["protocol"] == "cost"]


def test_intervals_hold_their_values(comparison):
    given = [row for row in comparison if row["low"] or row["high"]]
    assert {row["protocol"] for row in given} == {"probe", "rollout", "reward"} and len(given) > 40
    assert [row for row in given if not float(row["low"]) <= float(row["value"]) <= float(row["high"])] == []
    assert [row for row in comparison if row["protocol"] in ("probe", "rollout", "reward") and not (row["low"] and row["high"])] == []


class Page(HTMLParser):
    "Tags with their attributes, and all text."
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.tags.append((tag, dict(attributes)))
    def handle_data(self, data): self.text += data


def test_the_report_is_one_file_that_loads_nothing(smoke):
    page = Page((smoke.folder / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert [name for _, attributes in page.tags for name in attributes if name in ("href", "srcset", "background") or name.startswith("on")] == []
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) >= 9 and all(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG") for source in sources)
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_report_names_every_model_and_floor(smoke, comparison):
    page = Page((smoke.folder / "report.html").read_text(encoding="utf-8"))
    assert [model for model in {row["model"] for row in comparison} if model.removeprefix("floor:") not in page.text] == []
    said = json.loads((smoke.folder / "provenance.json").read_text())
    assert all(word in page.text for word in ("first", "600 frames", "24 episodes", "20 steps", said["dataset_hash"], "checkpoint_every = 10"))


def test_a_report_can_be_made_again_and_tells_the_steps_that_were_made(tmp_path):
    folder = go("mine", small(tmp_path, {"train.epochs": .5})).folder
    steps = read_result(folder / "models" / "jepa" / "world")["steps"]
    text, before = Page(write_report(folder).read_text()).text, bytes_of(folder)
    write_report(folder)
    assert bytes_of(folder) == before
    assert steps not in (6, 20, 600) and re.search(rf"\b{steps} steps", text), "settings.train.steps is not what an epoch comes to"


def test_a_report_survives_a_collapsed_model(tmp_path):
    "Equal latents have no relative error, no rank and no R²: such numbers are left empty, and the page says so."
    folder = go("mine", small(tmp_path)).folder
    path = folder / "models" / "jepa" / "evaluation.json"
    found = json.loads(path.read_text())
    for row in found["rows"]:
        if row["metric"].startswith(("latent", "prediction_ratio")): row.update(value=None, low=None, high=None)
    path.write_text(json.dumps(found))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(folder)
    assert "–" in page.read_text() and ",,," in (folder / "comparison.csv").read_text()


def test_a_report_of_nothing_is_refused(tmp_path):
    with refused(RunError, "no run folder", "70_run_experiment"): write_report(tmp_path / "nowhere")
    with refused(RunError, "no evaluation", "evaluate"): write_report(Experiment("mine", small(tmp_path), progress=False).folder)


# ---------------------------------------------------------------- notebook parameters

KNOWN = dict(run="mine", preset="smoke", seed=None, models=None, stages=None, overrides=None)


@pytest.mark.parametrize("wrong, words", [
    (dict(prest="smoke"), ["'prest'", "'smoke'", "nearest", "'preset'"]), (dict(sed=3), ["'sed'", "'seed'"]), (dict(override={}), ["'override'", "'overrides'"]),
    (dict(Run="mine"), ["'Run'", "'run'"]), (dict(stage=["train"]), ["'stage'", "'stages'"]), (dict(zzz=None), ["'zzz'", "known are run, preset"]),
    (dict(models="jepa"), ["'models'", "list", '-y "models: [jepa]"']), (dict(stages="train"), ["'stages'", "list"]),
    (dict(overrides="env.id=CartPole-v1"), ["'overrides'", "mapping", "-y"]), (dict(overrides=["env.id"]), ["'overrides'", "mapping"])])
def test_wrong_parameters_are_refused(wrong, words):
    known = KNOWN | {name: value for name, value in wrong.items() if name in KNOWN}
    with refused((RunError, SettingsError), *words): check_parameters(KNOWN | wrong, known)


def test_what_a_kernel_brings_along_is_no_parameter():
    check_parameters(KNOWN | dict(In=["", "x"], Out={}, _i1="x", _=3, __name__="__main__", Path=Path, json=json, go=go), KNOWN)


@pytest.mark.parametrize("name", ["70_run_experiment", "71_run_report"])
def test_every_parameter_of_a_notebook_is_checked(name):
    path = ROOT / "nbs" / f"{name}.ipynb"
    asked = papermill.inspect_notebook(str(path))
    source = next(cell.source for cell in nbformat.read(path, as_version=4).cells if "check_parameters(" in cell.source and cell.cell_type == "code" and "import" not in cell.source)
    call = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_parameters")
    assert [keyword.arg for keyword in call.args[1].keywords] == list(asked)
    assert all(about["help"] for about in asked.values()), "a parameter without a word of help"


@pytest.mark.parametrize("parameters, words", [
    (dict(preset="smok"), ["'smok'", "'smoke'"]), (dict(preset="smoke", models=[]), ["run.models"]), (dict(preset="smoke", stages=["trian"]), ["run.stages", "train"]),
    (dict(preset="smoke", seed="three"), ["run.seed", "'three'"]), (dict(preset="smoke", overrides={"trainin.steps": 3}), ["trainin", "training"]),
    (dict(preset="smoke", overrides={"training.step": 3}), ["training.step", "train.steps"]), (dict(preset="smoke", overrides={"env": {"id": "CartPole-v1"}}), ["'env'", "section.key"]),
    (dict(preset="smoke", overrides={"train.learning_rate": "3e-4"}), ["train.learning_rate", "'3e-4'"])])
def test_wrong_settings_are_refused(parameters, words):
    with refused(SettingsError, *words): resolve(**parameters)


def test_parameters_lie_over_the_settings_and_overrides_over_them():
    assert resolve("smoke", seed=3).run.seed == 3 and resolve("").training.steps == load_settings(ROOT / "settings.ini").train.steps
    assert resolve("smoke", seed=3, overrides={"run.seed": 4}).run.seed == 4
    assert resolve("smoke", models=["jepa"], stages=["data"]).run.model_dump(include={"models", "stages"}) == dict(models=["jepa"], stages=["data"])


def test_a_settings_file_with_a_typo_is_refused(tmp_path, monkeypatch):
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text(text.replace("warmup", "wramup", 1), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with refused(SettingsError, "settings.ini", "'training.wramup'", "'train.warmup'"): go("mine", resolve("smoke"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nbs", "settings.ini"]


# ---------------------------------------------------------------- papermill

def run_notebook(name, output, *arguments, cwd):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs" / name), str(output), "--no-progress-bar", "--execution-timeout", "120", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, env=os.environ | dict(OMP_NUM_THREADS="1", MPLBACKEND="agg"))


def errors_in(path): return [out["evalue"] for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code" for out in cell.outputs if out.output_type == "error"]


def places(folder): return {"run.dir": str(folder / "runs"), "data.dir": str(folder / "datasets")}


def test_papermill_makes_a_run_and_its_report_from_any_directory(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    given = json.dumps(dict(models=["jepa"], seed=3, overrides=SMALL | places(tmp_path)))
    done = run_notebook("70_run_experiment.ipynb", tmp_path / "run.ipynb", "-p", "run", "mine", "-p", "preset", "smoke", "-y", given, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "mine"
    assert read_status(folder)["status"] == "finished" and load_settings(folder / "settings.ini") == small(tmp_path, {"run.seed": 3})
    assert errors_in(tmp_path / "run.ipynb") == [] and (tmp_path / "run.ipynb").stat().st_size < 1e6
    done = run_notebook("71_run_report.ipynb", tmp_path / "report.ipynb", "-p", "run", "mine", "-p", "runs", str(tmp_path / "runs"), cwd=elsewhere)
    assert (folder / "report.html").exists() and (folder / "comparison.csv").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(elsewhere.iterdir()) == []


def test_papermill_refuses_a_misspelt_parameter_before_anything_runs(tmp_path):
    done = run_notebook("70_run_experiment.ipynb", tmp_path / "run.ipynb", "-p", "run", "mine", "-p", "prest", "smoke", "-y", json.dumps(dict(overrides=places(tmp_path))), cwd=tmp_path)
    assert done.returncode == 1
    assert ["'prest'" in said and "'preset'" in said for said in errors_in(tmp_path / "run.ipynb")] == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["run.ipynb"]


# ---------------------------------------------------------------- what is refused, and nothing lost

def test_an_unknown_environment_names_near_ones(tmp_path):
    with refused(EnvError, "'env.id'", "'CartPol-v1'", "CartPole-v1"): go("mine", small(tmp_path, {"env.id": "CartPol-v1"}))
    assert bytes_of(tmp_path / "datasets") == {}
    if (tmp_path / "runs" / "mine").exists(): assert "CartPole-v1" in read_status(tmp_path / "runs" / "mine")["error"]


def test_a_mistake_that_began_nothing_can_be_mended_under_the_same_name(tmp_path):
    with pytest.raises(EnvError): go("mine", small(tmp_path, {"env.id": "worldmodels_nb/TwoRoms-v0"}))
    assert read_status(go("mine", small(tmp_path)).folder)["status"] == "finished"


def test_an_environment_of_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("ale_py", "minigrid") else real(name, *rest))
    with refused(EnvError, "'env.id'", 'pip install "worldmodels_nb[atari]"'): go("pong", small(tmp_path, {"env.id": "ALE/Pong-v5"}))
    with refused(EnvError, "'env.id'", 'pip install "worldmodels_nb[minigrid]"'): go("grid", small(tmp_path, {"env.id": "MiniGrid-Empty-5x5-v0"}))
    assert bytes_of(tmp_path / "datasets") == {}


def test_a_given_dataset_of_another_size_is_refused_and_kept(smoke, tmp_path):
    given, before = smoke.dataset.folder, bytes_of(smoke.dataset.folder)
    with refused(DatasetError, given.name, "env.size = 64", "32", "data.path"): go("mine", small(tmp_path, {"data.path": str(given)}))
    assert bytes_of(given) == before and not (tmp_path / "datasets").exists()


def test_an_unknown_model_is_refused_before_there_is_a_folder(tmp_path):
    with refused(SettingsError, "'run.models'", "'jpea'", "'jepa'", "encdec"): go("mine", small(tmp_path, models=["encdec", "jpea"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stages", [list(STAGES), ["evaluate"]])
def test_a_finished_run_is_kept(smoke, stages):
    before = bytes_of(smoke.folder)
    with refused(RunError, str(smoke.folder), "finished", "another run name"): go("first", inside(smoke.folder.parent.parent, {"run.stages": stages}))
    assert bytes_of(smoke.folder) == before


@pytest.mark.parametrize("key, value", [("train.steps", 21), ("env.kwargs", {"wall": "random"}), ("run.seed", 1), ("run.models", ["jepa"])])
def test_a_run_with_other_settings_is_kept(smoke, key, value):
    before, was = bytes_of(smoke.folder), smoke.settings.model_dump()[key.split(".")[0]][key.split(".")[1]]
    with refused(RunError, str(smoke.folder), f"{key} is {was!r} there and {value!r} here", "another run name"): go("first", inside(smoke.folder.parent.parent, {key: value}))
    assert bytes_of(smoke.folder) == before


def test_a_run_with_damaged_settings_is_kept_and_named(tmp_path):
    path = Experiment("mine", small(tmp_path), progress=False).folder / "settings.ini"
    path.write_text(path.read_text().replace("warmup", "wramup"))
    before = bytes_of(tmp_path)
    with refused((SettingsError, RunError), "training.wramup", str(path.parent)): go("mine", small(tmp_path))
    assert bytes_of(tmp_path) == before


def test_a_folder_that_is_no_run_is_kept(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("years of work")
    before = bytes_of(tmp_path)
    with refused(RunError, "mine", "no run", "another run name"): go("mine", small(tmp_path))
    assert bytes_of(tmp_path) == before


def test_a_file_where_the_folder_should_be_is_kept(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").write_text("a note")
    with refused(RunError, "mine", "another run name"): go("mine", small(tmp_path))
    assert (tmp_path / "runs" / "mine").read_text() == "a note"


def test_an_empty_folder_is_good_enough(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    Experiment("mine", small(tmp_path), progress=False)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/x", ".hidden", "two words", "line\n", 7])  # papermill makes a number of 7
def test_names_that_are_no_folder_are_refused(name, tmp_path):
    with refused(RunError, "run", repr(name)): Experiment(name, small(tmp_path / "deep"), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_episodes_shorter_than_a_window_are_refused(tmp_path):
    with refused(DatasetError, "train.window_steps is 4", "has 3", "collect.steps"): go("mine", small(tmp_path, {"collect.steps": 3, "train.window_steps": 4}))


def counted(monkeypatch, module, name, of):
    "Note each call of a module's function, by what `of` makes of its first argument."
    calls, real = [], getattr(module, name)
    def call(first, *rest, **more):
        calls.append(of(first))
        return real(first, *rest, **more)
    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("changes, words", [({"evaluation.horizons": [8, 16]}, ["evaluation.horizons", "[8, 16]", "6 steps", "collect.steps"]),
                                            ({"evaluation.horizons": [0, 2]}, ["evaluation.horizons"]), ({"collect.episodes": 2}, ["collect.episodes"])])
def test_what_cannot_be_evaluated_is_refused_before_it_is_trained(changes, words, tmp_path, monkeypatch):
    fits = counted(monkeypatch, callbacks_module, "fit", lambda model: type(model).__name__)
    with refused(ValueError, *words): go("mine", small(tmp_path, changes))
    assert fits == [], "an hour of training for a run that could not be evaluated"


def test_horizons_beyond_every_episode_are_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="evaluation.horizons"): folder = go("mine", small(tmp_path, {"evaluation.horizons": [1, 6, 7]})).folder
    assert {row["horizon"] for row in results(folder)["jepa"] if row["protocol"] == "rollout"} == {1, 6}


class Lengths(gym.Env):
    "Episodes of given lengths, one after the other, in which a grey picture brightens."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def __init__(self, lengths, render_mode=None): self.lengths, self.episode, self.render_mode = lengths, -1, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.shade = self.episode + 1, 0, self.np_random.integers(100)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1., self.t == self.lengths[self.episode % len(self.lengths)], False, {}

    def render(self): return np.full((32, 32, 3), self.shade + 10 * self.t, np.uint8)


def test_a_horizon_that_only_one_validation_episode_reaches_is_left_out(tmp_path):
    "An interval over episodes needs two of them."
    gym.register("Lengths-v0", Lengths, disable_env_checker=True) if "Lengths-v0" not in gym.registry else None
    long = int(np.random.default_rng(0).permutation(8)[0])  # first of the validation episodes, as `Dataset.split` draws them
    settings = small(tmp_path, {"env.id": "Lengths-v0", "env.kwargs": {"lengths": [6 if i == long else 3 for i in range(8)]}, "evaluation.horizons": [1, 5]})
    with pytest.warns(UserWarning, match="evaluation.horizons"): experiment = go("mine", settings)
    assert sorted(experiment.dataset.lengths[experiment.episodes[1]]) == [3, 3, 6]
    assert {row["horizon"] for row in results(experiment.folder)["jepa"] if row["protocol"] == "rollout"} == {1}


@contextmanager
def full_disk(after):
    "No room for datasets after so many writes."
    real, written = episodes_module.RowFile.append, []
    def append(self, rows):
        if len(written) >= after: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(rows))
        real(self, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes_module.RowFile, "append", append)
        yield
    assert len(written) == after


def test_a_full_disk_leaves_nothing_and_the_run_can_be_started_again(tmp_path):
    with full_disk(after=17), refused(DatasetError, "No space left on device", "make room", "data.dir"): go("mine", small(tmp_path))
    assert list((tmp_path / "datasets").iterdir()) == []
    status = read_status(tmp_path / "runs" / "mine")
    assert (status["status"], status["stage"]) == ("failed", "data") and "No space left" in status["error"] and status["schema_version"] == 1
    assert read_status(go("mine", small(tmp_path)).folder)["status"] == "finished"


def test_after_a_full_disk_the_same_run_can_use_another(tmp_path):
    "What the refusal proposes, another data.dir, is no other run: the dataset is the same wherever it lies."
    with full_disk(after=17), pytest.raises(DatasetError): go("mine", small(tmp_path))
    assert read_status(go("mine", small(tmp_path, {"data.dir": str(tmp_path / "large disk")})).folder)["status"] == "finished"


# ---------------------------------------------------------------- interruptions

HEADS, ORACLES = ["StateDecoder", "RewardMLP", "RewardMLP", "LookAheadRewardPredictor"], ["RewardMLP", "LookAheadRewardPredictor"]  # in the order they are trained


class Interrupted(KeyboardInterrupt): "Somebody pressed the stop button."


DROPPY = {"model.encoder": "cnn", "encoder.cnn.base_filters": 4, "encoder.cnn.dropout": .3, "train.checkpoint_every": 3}  # dropout: random numbers matter


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return go("mine", small(tmp_path_factory.mktemp("undisturbed"), DROPPY, models=["jepa", "encdec"])).folder


@pytest.mark.parametrize("kind", [JEPA, EncoderDecoder])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(kind, undisturbed, tmp_path):
    settings = small(tmp_path, DROPPY, models=["jepa", "encdec"])
    def stop(self, step, steps):
        if step == 5: raise Interrupted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "after_step", stop)
        with pytest.raises(Interrupted): go("mine", settings)
    folder = tmp_path / "runs" / "mine"
    status = read_status(folder)
    assert (status["status"], status["stage"]) == ("failed", "train") and "Interrupted" in status["error"]
    torch.rand(7); np.random.rand(7)  # whoever goes on has drawn other numbers
    with pytest.MonkeyPatch.context() as patch:
        fits, steps = counted(patch, callbacks_module, "fit", lambda model: type(model).__name__), []
        patch.setattr(kind, "after_step", lambda self, step, steps_: steps.append(step))
        go("mine", settings)
    assert fits == (["JEPA"] if kind is JEPA else []) + ["EncoderDecoder", *HEADS, *ORACLES, *HEADS] and steps == [4, 5, 6]
    status = read_status(folder)
    assert status["status"] == "finished" and "error" not in status
    for model in ("jepa", "encdec"):
        for part in ("world", "decoder", "reward_mlp", "reward_mlp_no_action", "larp"):
            assert (folder / "models" / model / part / "weights.safetensors").read_bytes() == (undisturbed / "models" / model / part / "weights.safetensors").read_bytes(), (model, part)
    assert results(folder) == results(undisturbed)


def test_an_interruption_after_training_does_not_train_again(tmp_path, monkeypatch):
    fits = counted(monkeypatch, callbacks_module, "fit", lambda model: type(model).__name__)
    encoded = counted(monkeypatch, latents_module, "_encode_to", lambda path: path.name)
    settings = small(tmp_path)
    weights = go("mine", settings, ("data", "train")).part("jepa", "world") / "weights.safetensors"
    before = weights.read_bytes()
    assert fits == ["JEPA"] and read_status(tmp_path / "runs" / "mine")["status"] == "begun"
    with pytest.MonkeyPatch.context() as patch:
        def stop(*_): raise Interrupted
        patch.setattr(Experiment, "panel_rows", stop)
        with pytest.raises(Interrupted): go("mine", settings)
    assert fits == ["JEPA", *HEADS, *ORACLES] and read_status(tmp_path / "runs" / "mine")["stage"] == "evaluate"
    go("mine", settings)
    assert fits == ["JEPA", *HEADS, *ORACLES] and weights.read_bytes() == before
    assert len(encoded) == 2, "every frame once by the trained encoder, and once by the untrained floor"


def test_stages_can_be_run_one_after_another(tmp_path):
    for stage in STAGES: folder = go("mine", small(tmp_path, {"run.stages": [stage]})).folder
    assert set(read_status(folder)["stages"]) == set(STAGES)
    whole = go("whole", small(tmp_path)).folder
    assert results(folder) == results(whole)


# ---------------------------------------------------------------- a model in two stages

TWO = {"vjepa2.pretrain.steps": 4, "vjepa2.pretrain.batch_size": 4, "vjepa2.pretrain.patch_size": 16, "vjepa2.pretrain.dim": 12, "vjepa2.pretrain.depth": 1, "vjepa2.pretrain.heads": 1, "vjepa2.pretrain.predictor_dim": 12, "vjepa2.pretrain.predictor_depth": 1,
       "vjepa2.pretrain.frames": 2, "vjepa2.action.window_steps": 2, "vjepa2.action.context_length": 2, "vjepa2.action.rollout_steps": 1, "vjepa2.action.dim": 12, "vjepa2.action.depth": 1, "vjepa2.action.heads": 1, "vjepa2.action.steps": 4, "vjepa2.action.batch_size": 4}


def test_a_model_in_two_stages_is_a_model_like_any_other(tmp_path):
    experiment = go("mine", small(tmp_path, TWO, models=["vjepa2"]))
    rows = results(experiment.folder)["vjepa2"]
    assert {row["protocol"] for row in rows} == {"probe", "rollout", "reward", "collapse", "cost"}
    costs = {row["metric"]: row["value"] for row in rows if row["protocol"] == "cost"}
    assert costs["steps"] == 8 and costs["frames_seen"] == 4 * 4 * 2 + 4 * 4 * 3
    text = Page(write_report(experiment.folder).read_text()).text
    assert "vjepa2 for 8 steps" in text and (experiment.folder / "pictures" / "training_vjepa2_masked.png").exists()


def test_a_stage_alone_needs_the_one_before_it_and_can_take_it_from_elsewhere(tmp_path):
    def alone(run, stage, changes=()):
        experiment = Experiment(run, small(tmp_path, TWO | {"run.stages": [stage], **dict(changes)}, models=["vjepa2"]), progress=False)
        experiment.do(stage)
        return experiment
    with refused(RunError, "ac of vjepa2 needs the weights of masked", "vjepa2.pretrain.load"): alone("first", "ac")
    alone("second", "masked")
    both = alone("second", "ac")
    assert [read_result(both.part("vjepa2", part))["steps"] for part in ("masked", "ac")] == [4, 4]
    third = alone("third", "ac", {"vjepa2.pretrain.load": str(both.folder)})
    assert [read_result(third.part("vjepa2", part))["steps"] for part in ("masked", "ac")] == [0, 4]
    assert (third.part("vjepa2", "ac") / "weights.safetensors").read_bytes() == (both.part("vjepa2", "ac") / "weights.safetensors").read_bytes()
    with refused(RunError, "none of run.models = ['jepa']", "vjepa2"):
        Experiment("fourth", small(tmp_path, {"run.stages": ["masked"]}), progress=False).do("masked")


# ---------------------------------------------------------------- the same again

def test_the_same_settings_give_the_same_numbers_and_another_seed_others(undisturbed, tmp_path):
    torch.rand(5); np.random.rand(5)
    again = go("again", small(tmp_path, DROPPY, models=["jepa", "encdec"])).folder
    assert results(again) == results(undisturbed)
    a, b = (json.loads((folder / "provenance.json").read_text()) for folder in (again, undisturbed))
    assert a["dataset_hash"] == b["dataset_hash"]
    other = go("other", small(tmp_path, DROPPY | {"run.seed": 1})).folder
    assert [row["value"] for row in results(other)["jepa"] if row["metric"] == "latent"] != [row["value"] for row in results(undisturbed)["jepa"] if row["metric"] == "latent"]


def test_a_model_does_not_depend_on_its_company(undisturbed, tmp_path):
    alone = go("alone", small(tmp_path, DROPPY)).folder
    assert results(alone)["jepa"] == results(undisturbed)["jepa"]


# ---------------------------------------------------------------- weights from elsewhere

@pytest.fixture(scope="module")
def trained(tmp_path_factory): return go("first", small(tmp_path_factory.mktemp("trained")))


def without_cost(rows): return [row for row in rows["jepa"] if row["protocol"] != "cost"]


@pytest.mark.parametrize("kind", ["run", "file"])
def test_loaded_weights_are_taken_as_they_are_and_judged_the_same(kind, trained, tmp_path, monkeypatch):
    fits = counted(monkeypatch, callbacks_module, "fit", lambda model: type(model).__name__)
    source = trained.folder if kind == "run" else trained.part("jepa", "world") / "weights.safetensors"
    folder = go("second", small(tmp_path, {"jepa.load": str(source)})).folder
    assert "JEPA" not in fits and len(fits) == 6                                    # decoder, three reward heads, two oracles
    result = read_result(folder / "models" / "jepa" / "world")
    assert result["steps"] == 0 and str(source) in result["reason"]
    assert result["weights"] == read_result(trained.part("jepa", "world"))["weights"]
    assert without_cost(results(folder)) == without_cost(results(trained.folder))
    assert "jepa for 0 steps" in Page(write_report(folder).read_text()).text


def test_training_can_go_on_from_loaded_weights(trained, tmp_path):
    again = go("second", small(tmp_path, {"jepa.load": str(trained.folder), "jepa.train_loaded": True, "jepa.steps": 2}), ("data", "train"))
    part = again.part("jepa", "world")
    assert read_result(part)["steps"] == 2
    before, after = (load_file(path / "weights.safetensors") for path in (trained.part("jepa", "world"), part))
    fresh = again.fresh("jepa").state_dict()
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    assert 0 < max(moved.values()) < .1 and any(np.abs(fresh[name].numpy() - before[name]).max() > max(moved.values()) for name in before)


@pytest.mark.parametrize("changes, words", [
    ({"model.latent_dim": 64}, ["'jepa.load'", "encoder.readout", "model.latent_dim = 128 (here 64)"]),
    ({"predictor.type": "mlp"}, ["predictor.net", "is missing", 'predictor.type = "gru" (here "mlp")']),
    ({"jepa.target": "vjepa2"}, ["target.", "is missing", 'jepa.target = "none" (here "vjepa2")'])])
def test_weights_of_another_architecture_name_tensors_and_the_setting(changes, words, trained, tmp_path):
    with refused(RunError, *words): go("second", small(tmp_path, {"jepa.load": str(trained.folder), **changes}), ("data", "train"))
    assert not (tmp_path / "runs" / "second" / "models").exists()


def test_a_bare_file_of_another_architecture_names_tensors_and_sections(trained, tmp_path):
    file = trained.part("jepa", "world") / "weights.safetensors"
    with refused(RunError, "encoder.readout", "[model]", "[predictor]"): go("second", small(tmp_path, {"jepa.load": str(file), "model.latent_dim": 64}), ("data", "train"))


class Bomb:
    def __reduce__(self): return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("damage", ["cut", "pickle", "text", "missing", "changed"])
def test_foreign_and_broken_weight_files_are_refused_by_name_and_nothing_runs(damage, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = trained.part("jepa", "world") / "weights.safetensors"
    file, content, words = tmp_path / "weights.safetensors", source.read_bytes(), ["weights.safetensors", "not a whole safetensors file"]
    if damage == "cut": file.write_bytes(content[:-100])
    elif damage == "pickle": torch.save({"a": Bomb()}, file)
    elif damage == "text": file.write_text("hello")
    elif damage == "missing": words = ["weights.safetensors", "there is no"]
    else:
        other = tmp_path / "runs" / "other"
        for path in ("models/jepa/world", ""): (other / path).mkdir(parents=True, exist_ok=True)
        for name in ("settings.ini", "models/jepa/world/result.json"): (other / name).write_bytes((trained.folder / name).read_bytes())
        (other / "models/jepa/world/weights.safetensors").write_bytes(content[:-4] + b"\0\0\0\0")
        file, words = other, ["weights.safetensors", "not the file that training wrote"]
    with refused(RunError, "'jepa.load'", *words): go("second", small(tmp_path, {"jepa.load": str(file)}), ("data", "train"))
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- rewards and tracking

def test_a_constant_reward_is_said_and_left_out(tmp_path):
    changes = {"env.id": "CartPole-v1", "collect.episodes": 8, "evaluation.horizons": [1, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = go("mine", small(tmp_path, changes)).folder
    assert not [row for row in results(folder)["jepa"] if row["protocol"] == "reward"] and not (folder / "oracles").exists()
    assert re.search(r"No reward heads: all \d+ training steps of dataset .* earn 1 ", Page(write_report(folder).read_text()).text)


def test_switched_off_heads_are_not_trained(tmp_path, monkeypatch):
    fits = counted(monkeypatch, callbacks_module, "fit", lambda model: type(model).__name__)
    folder = go("mine", small(tmp_path, {"train.larp.enabled": False})).folder
    assert sorted(fits) == ["JEPA", "RewardMLP", "RewardMLP", "RewardMLP", "StateDecoder"]
    assert {row["model"] for row in results(folder)["jepa"] if row["protocol"] == "reward"} == {"jepa reward_mlp", "jepa reward_mlp_no_action", "floor:oracle", "floor:mean-reward", "floor:last-reward"}


def test_the_state_decoder_can_learn_from_predictions(tmp_path):
    experiment = go("mine", small(tmp_path, {"train.state_decoder.latents": "predicted"}))
    plain = go("plain", small(tmp_path))
    a, b = (load_file(e.part("jepa", "decoder") / "weights.safetensors") for e in (experiment, plain))
    assert any(not np.array_equal(a[name], b[name]) for name in a)
    assert (experiment.part("jepa", "world") / "weights.safetensors").read_bytes() == (plain.part("jepa", "world") / "weights.safetensors").read_bytes()


def test_a_tracked_run_leaves_an_offline_run_with_metrics_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracked = go("tracked", small(tmp_path, {"tracking.enabled": True, "tracking.mode": "offline", "tracking.project": "mine", "train.picture_every": 3}))
    log, = (tracked.folder / "wandb").glob("offline-run-*/run-*.wandb")
    read = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", log], env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in read.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    keys = {key for row in rows for key in row}
    assert {"jepa/train/prediction", "jepa/decoder/train/pixels", "jepa/reward_mlp/train/reward", "jepa/larp/train/reward", "oracles/oracle/train/reward"} <= keys
    assert {"jepa/evaluation/rollout/latent_ratio/1", "jepa/evaluation/probe/r2 position"} <= keys
    assert [row["jepa/step"] for row in rows if "jepa/train/total" in row] == [row["step"] for row in read_metrics(tracked.part("jepa", "world") / "metrics.jsonl")]
    pictures = [row[key] for row in rows for key in row if key.endswith("picture.path") or key.endswith("filmstrip.path")]
    assert len(pictures) == 5 and all((log.parent / "files" / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["project"] == "mine" and re.fullmatch(r"exp-\d{8}-\d{6}", run["display_name"])
    plain = go("plain", small(tmp_path, {"train.picture_every": 3}))
    assert results(plain.folder) == results(tracked.folder)


# ---------------------------------------------------------------- other environments

ENVIRONMENTS = {"CartPole-v1": ("discrete", {"cart position", "cart velocity", "pole angle", "pole velocity"}), "Pendulum-v1": ("continuous", {"cos θ", "sin θ", "angular velocity"})}


@pytest.mark.parametrize("id", ENVIRONMENTS)
def test_another_environment(id, tmp_path):
    kind, names = ENVIRONMENTS[id]
    changes = {key: SMALL[key] for key in SMALL if key.startswith(("training", "state_decoder", "reward_mlp", "larp", "probe", "env"))} | {"env.id": id, "collect.episodes": 12, "model.frame_stack": 2, "evaluation.horizons": [1, 4]}
    experiment = go("mine", inside(tmp_path, changes))
    assert experiment.dataset.spec.action.kind == kind and set(experiment.dataset.spec.state_names) == names
    for model in ("encdec", "jepa"):
        rows = results(experiment.folder)[model]
        assert {row["metric"].removeprefix("mlp ").removeprefix("r2 ") for row in rows if row["protocol"] == "probe"} == names | {"position"}
        assert {row["horizon"] for row in rows if row["protocol"] == "rollout"} == {1, 4}
        assert all(math.isfinite(row["value"]) for row in rows)
        assert {f"inverse_{'accuracy' if kind == 'discrete' else 'r2'}", "inverse_floor"} <= {row["metric"] for row in rows}
    page = Page(write_report(experiment.folder).read_text()).text
    assert id in page and not [name for name in names if name not in page]


def test_positions_of_different_units_are_never_mixed(tmp_path):
    "Metres and radians have no common distance: each counts in its standard deviations, and the metric says so."
    folder = go("mine", small(tmp_path, {"env.id": "CartPole-v1"})).folder
    assert {"position_std", "position_std_ratio"} <= {row["metric"] for row in results(folder)["jepa"]} and "position" not in {row["metric"] for row in results(folder)["jepa"]}


def test_the_seed_projects_own_settings_run(tmp_path):
    pytest.importorskip("ale_py"); pytest.importorskip("stable_baselines3")
    settings = inside(tmp_path, {"collect.ppo.train_steps": 64, "collect.ppo.n_envs": 1, "collect.ppo.n_steps": 32, "collect.ppo.batch_size": 32, "collect.ppo.n_epochs": 1, "collect.ppo.subprocesses": False,
                                 "collect.episodes": 4, "collect.steps": 8, "data.validation_split": .5, "train.epochs": None, "train.steps": 2, "train.batch_size": 4,
                                 "train.validate_every": 2, "train.validation_batches": 1, "train.checkpoint_every": 2, "train.picture_every": 0,
                                 "train.state_decoder.epochs": None, "train.state_decoder.steps": 4, "train.state_decoder.batch_size": 8, "train.reward_mlp.epochs": None, "train.reward_mlp.steps": 4, "train.larp.epochs": None, "train.larp.steps": 4, "evaluation.probe.mlp_steps": 4,
                                 "tracking.enabled": False, "evaluation.horizons": [1, 2], "evaluation.n_windows": 4, "evaluation.bootstrap": 10}, preset="seed")
    experiment = go("seed", settings)
    assert experiment.dataset.spec.frame_shape == (1, 64, 64) and experiment.dataset.states.shape[1] == 128
    assert [path.name[:4] for path in (tmp_path / "datasets" / "agents").iterdir()] == ["ppo-"]
    for rows in results(experiment.folder).values():
        assert {row["protocol"] for row in rows} == {"probe", "rollout", "collapse", "cost"} and not [row for row in rows if row["metric"].startswith("position")]
    assert "Assault" in write_report(experiment.folder).read_text()
