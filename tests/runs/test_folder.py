"A run's folder: what it holds, what its name may be, and what is refused before anything in it is lost."
import ast
import hashlib
import importlib.util
import json
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from run_tools import ROOT, begin, bytes_of, dataset_of, go, inside, refused, run_in, small
from safetensors.numpy import load_file

from worldmodels_nb.data.datasets import verify
from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.data.tworooms import EnvError
from worldmodels_nb.models.base import MODELS
from worldmodels_nb.runs.folder import (
    STAGES,
    RunError,
    RunFolder,
    check_parameters,
    provenance,
    read_evaluation,
    read_models,
    read_status,
    resolve,
)
from worldmodels_nb.runs.training import ensure_data, initial_model
from worldmodels_nb.settings import SettingsError, load_settings, shorten
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.parts import read_result, read_state

# ---------------------------------------------------------------- what a run folder holds

FILES = {"weights.safetensors", "state.pt", "metrics.jsonl", "result.json"}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def check_stage(folder, steps):
    "A trained stage holds its files, whole, and they agree about its steps and its weights."
    assert set(names_in(folder)) - {"encoding.json"} == FILES  # which a stage has that learns from latents
    result, state = read_result(folder), read_state(folder / "state.pt")
    assert result["steps"] == state["step"] == read_metrics(folder / "metrics.jsonl")[-1]["step"] == steps
    weights = folder / "weights.safetensors"
    assert result["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert all(np.isfinite(array).all() for array in load_file(weights).values())


def check_strips(path, s, imagined):
    with np.load(path, allow_pickle=False) as arrays:
        shape = (s.evaluation.filmstrips, max(s.evaluation.horizons) + 1, 3, s.env.size, s.env.size)
        assert arrays["truth"].shape == arrays["decoded"].shape == shape and arrays["truth"].dtype == np.uint8
        assert ("imagined" in arrays) == imagined


def check_pictures(folder, stages):
    "Pictures of a training in one piece lie in the model's folder, those of further parts below it."
    drawn = ["step_000010.png", "step_000020.png"]
    parts = ["decoder", *(stage.name for stage in stages if len(stages) > 1)]
    assert names_in(folder) == sorted(parts + drawn * (len(stages) == 1))
    for part in parts: assert names_in(folder / part) == drawn


def test_a_run_folder_holds_what_it_should(smoke):
    run, s, data = smoke.folder, smoke.settings, ensure_data(smoke)
    assert s.run.models == ["encdec", "encdec_jepa", "jepa", "vjepa2"]
    for model in s.run.models:
        stages = initial_model(model, s, data).stages()
        for stage in stages: check_stage(run.part(model, stage.name), s.recipe(stage.section).steps)
        check_strips(run.part(model, "evaluation.npz"), s, imagined=model.startswith("encdec"))
        check_pictures(run.pictures(model), stages)
    whole = {"comparison.csv", "report.html", "settings.ini", "provenance.json", "status.json", "models.json"}
    assert whole <= set(names_in(run.path))
    assert not [path for path in run.path.parent.parent.rglob(".*")], "something was left half-made"


def test_the_settings_of_a_run_are_kept_resolved(smoke):
    assert load_settings(smoke.folder.path / "settings.ini") == smoke.settings


def test_provenance_says_where_a_run_comes_from(smoke):
    origin = json.loads((smoke.folder.path / "provenance.json").read_text())
    dataset = dataset_of(smoke).folder
    assert origin["dataset_hash"] == verify(dataset).hash and origin["dataset"] == dataset.name
    assert (origin["frames"], origin["episodes"], origin["seed"]) == (24 * 25, 24, 0)
    assert origin["packages"]["torch"] == torch.__version__
    assert origin["python"] and origin["system"] and origin["began"]
    assert origin["commit"] or not (ROOT / ".git").exists()


def test_provenance_needs_no_git(smoke, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(smoke.settings)["commit"] is None


def test_status_says_finished(smoke):
    status = read_status(smoke.folder)
    assert status["status"] == "finished" and set(status["stages"]) == set(STAGES)
    assert status["ended"] and "error" not in status


def test_a_run_says_which_models_it_has_in_order_with_their_colours_and_stages(smoke):
    about = read_models(smoke.folder)
    assert list(about) == smoke.settings.run.models
    for name, said in about.items():
        assert said == dict(color=MODELS[name].color, stages=list(MODELS[name].stage_names))
    assert about["jepa"]["stages"] == ["world"] and about["vjepa2"]["stages"] == ["pretrain", "action"]


def test_every_json_has_a_schema_version(smoke):
    files = [*smoke.folder.path.rglob("*.json"), *dataset_of(smoke).folder.rglob("*.json")]
    assert len(files) >= 9
    for path in files:
        wanted = 2 if path.name == "evaluation.json" else 1
        assert json.loads(path.read_text())["schema_version"] == wanted, path


DAMAGED = {
    "empty": b"",
    "not utf-8": b'{"schema_version": 1, "a": "\xff\xfe"}',
    "cut short": b'{"schema_version": 1, ',
    "another version": b'{"schema_version": 99}',
    "a list": b"[1, 2]",
    "a word": b'"finished"',
    "null": b"null",
    "too deep": b"[" * 100_000,
    "a long number": b'{"schema_version": ' + b"1" * 5_000 + b"}",
    "not a number": b'{"schema_version": 1, "status": NaN, "models": NaN, "rows": NaN, "frames": NaN}',
    "missing keys": b'{"schema_version": 1}',
    "binary": bytes(range(256)),
    "wrong types": b'{"schema_version": 1, "status": 1, "stages": {}, "models": [], "terms": 0, "rows": 1}'}
READERS = {"status.json": read_status, "models.json": read_models,
           "models/jepa/evaluation.json": lambda run: read_evaluation(run, "jepa")}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_or_foreign_record_is_refused_by_name(name, damage, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DAMAGED[damage])
    with refused(RunError, str(path)): READERS[name](RunFolder(tmp_path))


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_place_of_a_record_is_refused_by_name(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with refused(RunError, str(tmp_path / name)): READERS[name](RunFolder(tmp_path))


@pytest.mark.parametrize("models", [
    {"../../etc": {"color": "", "stages": []}}, {"/etc": {"color": "", "stages": []}}, {"a": []}, {"a": {}},
    {"a": {"color": 1, "stages": []}}, {"a": {"color": "", "stages": ["../x"]}},
    {".a": {"color": "", "stages": []}},
    {"a\nb": {"color": "", "stages": []}}, {"": {"color": "", "stages": []}}])
def test_names_in_a_record_lead_nowhere_else(models, tmp_path):
    (tmp_path / "models.json").write_text(json.dumps(dict(schema_version=1, models=models, terms={})))
    with refused(RunError, "models.json", "damaged"): read_models(RunFolder(tmp_path))


# ---------------------------------------------------------------- notebook parameters

KNOWN = dict(run="mine", preset="smoke", seed=None, models=None, stages=None, overrides=None)


@pytest.mark.parametrize("wrong, words", [
    (dict(prest="smoke"), ["'prest'", "'smoke'", "nearest", "'preset'"]),
    (dict(sed=3), ["'sed'", "'seed'"]),
    (dict(override={}), ["'override'", "'overrides'"]),
    (dict(Run="mine"), ["'Run'", "'run'"]),
    (dict(stage=["train"]), ["'stage'", "'stages'"]),
    (dict(zzz=None), ["'zzz'", "known are run, preset"]),
    (dict(models="jepa"), ["'models'", "list", '-y "models: [jepa]"']),
    (dict(stages="train"), ["'stages'", "list"]),
    (dict(overrides="env.id=CartPole-v1"), ["'overrides'", "mapping", "-y"]),
    (dict(overrides=["env.id"]), ["'overrides'", "mapping"])])
def test_wrong_parameters_are_refused(wrong, words):
    known = KNOWN | {name: value for name, value in wrong.items() if name in KNOWN}
    with refused((RunError, SettingsError), *words): check_parameters(KNOWN | wrong, known)


CELL = "\n".join(f"{name}: str = None" for name in KNOWN)


@pytest.mark.parametrize("cells", [
    [], [""], [CELL], [CELL, "# Parameters\nrun = 'mine'\n"], [CELL, "stage = 3", "for model in []: x = 1"],
    [CELL, "# Parameters\nprest = 'x'\n", CELL, "# Parameters\npreset = 'x'\n"],  # mended, and run again
    [CELL, "# Parameters\nprest = 'x'\n", CELL], ["%matplotlib inline", "!ls", CELL, "x = ("]])
def test_what_is_in_memory_is_no_parameter(cells):
    "Names of an earlier Run All, of other cells, and of the kernel itself."
    memory = dict(In=cells, Out={}, _i1="x", _=3, __name__="__main__", Path=Path, go=go, stage="train", x=1,
                  model="jepa", rows=[], prest="x")
    check_parameters(KNOWN | memory, KNOWN)


@pytest.mark.parametrize("cells", [
    [CELL, "# Parameters\nprest = 'x'\n"], [CELL + "\nprest = 'smoke'"],
    ["", CELL, "y = 1", "# Parameters\nprest = 1"],
    [CELL, "# Parameters\nrun = 'a'\n", CELL, "# Parameters\nrun = 'a'\nprest = 2\n"]])
def test_what_was_injected_or_declared_beside_the_parameters_is_refused(cells):
    with refused(RunError, "'prest'", "'preset'"): check_parameters(KNOWN | dict(In=cells, prest=1), KNOWN)


def checked_parameters(tree):
    "Keywords of the dict(…) that check_parameters is given, perhaps by way of a name."
    named = {node.targets[0].id: node.value for node in tree.body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "check_parameters")
    given = call.args[1]
    if isinstance(given, ast.Name): given = named[given.id]
    return [keyword.arg for keyword in given.keywords]


@pytest.mark.parametrize("name", ["70_run_experiment", "71_run_report"])
def test_every_parameter_of_a_notebook_is_checked(name):
    path = ROOT / "nbs" / "7_run" / f"{name}.ipynb"
    asked = papermill.inspect_notebook(str(path))
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    source = next(cell for cell in cells if "check_parameters(" in cell and "import" not in cell)
    assert checked_parameters(ast.parse(source)) == list(asked)
    assert all(about["help"] for about in asked.values()), "a parameter without a word of help"


# ---------------------------------------------------------------- settings of a run

@pytest.mark.parametrize("parameters, words", [
    (dict(preset="smok"), ["'smok'", "'smoke'"]),
    (dict(preset="smoke", models=[]), ["run.models"]),
    (dict(preset="smoke", seed="three"), ["run.seed", "'three'"]),
    (dict(preset="smoke", overrides={"trainin.steps": 3}), ["'trainin'", "'train'"]),
    (dict(preset="smoke", overrides={"train.step": 3}), ["'train.step'", "'train.steps'"]),
    (dict(preset="smoke", overrides={"env": {"id": "CartPole-v1"}}), ["'env'", "section.key"]),
    (dict(preset="smoke", overrides={"train.learning_rate": "3e-4"}), ["train.learning_rate", "'3e-4'"])])
def test_wrong_settings_are_refused(parameters, words):
    with refused(SettingsError, *words): resolve(**parameters)


def test_parameters_lie_over_the_settings_and_overrides_over_them():
    assert resolve("smoke", seed=3).run.seed == 3
    assert resolve("").train.steps == load_settings(ROOT / "settings.ini").train.steps
    assert resolve("smoke", seed=3, overrides={"run.seed": 4}).run.seed == 4
    run = resolve("smoke", models=["jepa"], stages=["data"]).run
    assert run.model_dump(include={"models", "stages"}) == dict(models=["jepa"], stages=["data"])


def test_a_settings_file_with_a_typo_is_refused(tmp_path):
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    (tmp_path / "settings.ini").write_text(text.replace("warmup", "wramup", 1), encoding="utf-8")
    words = ("settings.ini", "'train.wramup'", "'train.warmup'")
    with refused(SettingsError, *words): load_settings(tmp_path / "settings.ini", "smoke")


# ---------------------------------------------------------------- what is refused, and nothing lost

def test_an_unknown_environment_names_near_ones(tmp_path):
    with refused(EnvError, "'env.id'", "'CartPol-v1'", "CartPole-v1"):
        go("mine", small(tmp_path, {"env.id": "CartPol-v1"}))
    assert bytes_of(tmp_path / "datasets") == {}
    run = RunFolder(tmp_path / "runs" / "mine")
    if run.path.exists(): assert "CartPole-v1" in read_status(run)["error"]


def test_a_mistake_that_began_nothing_can_be_mended_under_the_same_name(tmp_path):
    with pytest.raises(EnvError): go("mine", small(tmp_path, {"env.id": "worldmodels_nb/TwoRoms-v0"}))
    assert read_status(RunFolder(run_in(tmp_path)))["status"] == "finished"


def test_an_environment_of_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    real, missing = importlib.util.find_spec, ("ale_py", "minigrid")
    def find_spec(name, *rest): return None if name in missing else real(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with refused(EnvError, "'env.id'", 'pip install "worldmodels_nb[atari]"'):
        go("pong", small(tmp_path, {"env.id": "ALE/Pong-v5"}))
    with refused(EnvError, "'env.id'", 'pip install "worldmodels_nb[minigrid]"'):
        go("grid", small(tmp_path, {"env.id": "MiniGrid-Empty-5x5-v0"}))
    assert bytes_of(tmp_path / "datasets") == {}


def test_a_given_dataset_of_another_size_is_refused_and_kept(smoke, tmp_path):
    given = dataset_of(smoke).folder
    before = bytes_of(given)
    with refused(DatasetError, given.name, "env.size = 64", "32", "data.path"):
        go("mine", small(tmp_path, {"data.path": str(given)}))
    assert bytes_of(given) == before and not (tmp_path / "datasets").exists()


def test_an_unknown_model_is_refused_before_there_is_a_folder(tmp_path):
    with refused(SettingsError, "'run.models'", "'jpea'", "'jepa'", "encdec"):
        go("mine", small(tmp_path, models=["encdec", "jpea"]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong, near", [("trian", "train"), ("pretrian", "pretrain"), ("actoin", "action")])
def test_an_unknown_stage_is_refused_before_there_is_a_folder(wrong, near, tmp_path):
    there = "there are data, train, heads, evaluate, pretrain, action"
    with refused(SettingsError, "'run.stages'", repr(wrong), there, "nearest", repr(near)):
        go("mine", small(tmp_path, {"run.stages": ["data", wrong]}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stages", [list(STAGES), ["evaluate"]])
def test_a_finished_run_is_kept(smoke, stages):
    path = smoke.folder.path
    before = bytes_of(path)
    with refused(RunError, str(path), "finished", "another run name"):
        go("first", inside(path.parent.parent, {"run.stages": stages}))
    assert bytes_of(path) == before


@pytest.mark.parametrize("key, value", [
    ("train.steps", 21), ("env.kwargs", {"wall": "random"}), ("run.seed", 1), ("run.models", ["jepa"])])
def test_a_run_with_other_settings_is_kept(smoke, key, value):
    path, was = smoke.folder.path, smoke.settings.flat()[key]
    before = bytes_of(path)
    with refused(RunError, str(path), f"{key} is {was!r} there and {value!r} here", "another run name"):
        go("first", inside(path.parent.parent, {key: value}))
    assert bytes_of(path) == before


def test_a_run_with_damaged_settings_is_kept_and_named(tmp_path):
    path = begin("mine", small(tmp_path)).folder.path / "settings.ini"
    path.write_text(path.read_text().replace("warmup", "wramup"))
    before = bytes_of(tmp_path)
    with refused((SettingsError, RunError), "train.wramup", str(path.parent)): go("mine", small(tmp_path))
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
    begin("mine", small(tmp_path))


NO_FOLDERS = ["", ".", "..", "../x", "a/b", "a\\b", "/x", ".hidden", "two words", "line\n", "\ud800",
              "x" * 300, "é" * 120]


@pytest.mark.parametrize("name", [*NO_FOLDERS, 7, 1.5, True, None, ["a"]])  # papermill makes a number of 7
def test_names_that_are_no_folder_are_refused(name, tmp_path):
    with refused(RunError, "run", shorten(name)): begin(name, small(tmp_path / "deep"))
    assert list(tmp_path.iterdir()) == []
