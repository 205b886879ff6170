"Whole runs: by papermill, after failures and interruptions, again with the same numbers, and extended."
import copy
import errno
import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import nbformat
import numpy as np
import papermill
import pytest
import torch
from nbclient import NotebookClient
from run_tools import (
    DROPPY,
    HEADS,
    ORACLES,
    ROOT,
    SMALL,
    Interrupted,
    Page,
    begin,
    bytes_of,
    counted,
    counted_fits,
    dataset_of,
    go,
    inside,
    places,
    read_csv,
    refused,
    results,
    run_in,
    small,
    weights_of,
)

from worldmodels_nb import settings as settings_module
from worldmodels_nb import viz
from worldmodels_nb.data import episodes
from worldmodels_nb.data.episodes import DatasetError
from worldmodels_nb.eval import latents
from worldmodels_nb.eval.costs import stage_result
from worldmodels_nb.models.base import MODELS
from worldmodels_nb.models.encdec import EncoderDecoder
from worldmodels_nb.models.jepa import JEPA
from worldmodels_nb.nn.regularizer import TERMS
from worldmodels_nb.runs import evaluation
from worldmodels_nb.runs.facts import part_seconds, stage_seconds
from worldmodels_nb.runs.folder import STAGES, RunFolder, read_models, read_status
from worldmodels_nb.runs.report import write_report
from worldmodels_nb.settings import SettingsError, load_settings
from worldmodels_nb.training.callbacks import read_metrics


def status_of(folder):
    return read_status(RunFolder(folder))


# ---------------------------------------------------------------- papermill

def run_notebook(name, output, *arguments, cwd):
    command = [sys.executable, "-m", "papermill", ROOT / "nbs" / "7_run" / name, output,
               "--no-progress-bar", "--execution-timeout", "120", *arguments]
    env = os.environ | dict(OMP_NUM_THREADS="1", MPLBACKEND="agg")
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, env=env)


def errors_in(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [out["evalue"] for cell in code for out in cell.outputs if out.output_type == "error"]


def check_lines(path):
    "Of each part's progress its output notebook keeps a line, and no widget; the collapse panel is drawn."
    book = nbformat.read(path, as_version=4)
    outputs = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]
    lines = "".join(out.text for out in outputs if out.output_type == "stream").splitlines()
    parts = [line.partition(": ")[0] for line in lines if "00:00 left" in line]
    assert {"gathering", "jepa, 1 of 1", "jepa/decoder, 1 of 1", "oracles/oracle", "evaluate"} <= set(parts)
    assert len(lines) < 40 and "widgets" not in book.metadata
    assert not any("widget-view" in kind for out in outputs for kind in out.get("data", {}))


def test_papermill_makes_a_run_and_its_report_from_any_directory(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    given = json.dumps(dict(models=["jepa"], seed=3, overrides=SMALL | places(tmp_path)))
    done = run_notebook("70_run_experiment.ipynb", tmp_path / "run.ipynb", "-p", "run", "mine",
                        "-p", "preset", "smoke", "-y", given, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "mine"
    assert status_of(folder)["status"] == "finished"
    assert load_settings(folder / "settings.ini") == small(tmp_path, {"run.seed": 3})
    assert errors_in(tmp_path / "run.ipynb") == [] and (tmp_path / "run.ipynb").stat().st_size < 1e6
    check_lines(tmp_path / "run.ipynb")
    done = run_notebook("71_run_report.ipynb", tmp_path / "report.ipynb", "-p", "run", "mine",
                        "-p", "runs", str(tmp_path / "runs"), cwd=elsewhere)
    assert (folder / "report.html").exists() and (folder / "comparison.csv").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(elsewhere.iterdir()) == []


def test_papermill_refuses_a_misspelt_parameter_before_anything_runs(tmp_path):
    given = json.dumps(dict(overrides=places(tmp_path)))
    done = run_notebook("70_run_experiment.ipynb", tmp_path / "run.ipynb", "-p", "run", "mine",
                        "-p", "prest", "smoke", "-y", given, cwd=tmp_path)
    assert done.returncode == 1
    assert ["'prest'" in said and "'preset'" in said for said in errors_in(tmp_path / "run.ipynb")] == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["run.ipynb"]


SENTINEL = "every cell has run"


def run_twice(name, output, between, **parameters):
    "Execute a notebook with these parameters, and then all its cells once more in the same kernel."
    papermill.execute_notebook(str(ROOT / "nbs" / "7_run" / name), None if output is None else str(output),
                               parameters=parameters, prepare_only=True)
    book = nbformat.read(output, as_version=4)
    again = [copy.deepcopy(cell) for cell in book.cells]
    for cell in again: cell.id += "x"
    changed = nbformat.v4.new_code_cell(between)
    first = [k for k, cell in enumerate(again) if "injected-parameters" in cell.metadata.get("tags", [])][0]
    again.insert(first + 1, changed)
    book.cells += [*again, nbformat.v4.new_code_cell(f"print({SENTINEL!r})")]
    NotebookClient(book, timeout=120).execute()
    return [out.get("text", "") for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]


@pytest.mark.parametrize("between", ["", "run = 'another'", "seed = 4; run = 'third'"])
def test_run_all_a_second_time(between, tmp_path):
    "The run is shown again, or the edited one is made: nothing in the kernel's memory gets in the way."
    said = run_twice("70_run_experiment.ipynb", tmp_path / "run.ipynb", between, run="mine", preset="smoke",
                     models=["jepa"], overrides=SMALL | places(tmp_path))
    assert SENTINEL in "".join(said)
    made = {path.name for path in (tmp_path / "runs").iterdir()}
    assert made == {"mine", *([between.split("'")[1]] if between else [])}


@pytest.mark.parametrize("name, given", [
    ("71_run_report.ipynb", dict(run="mine")), ("72_reward_study.ipynb", {})])
def test_run_all_a_second_time_in_notebooks_that_read(name, given, tmp_path):
    if given: run_in(tmp_path)
    said = run_twice(name, tmp_path / "read.ipynb", "", runs=str(tmp_path / "runs"), **given)
    assert SENTINEL in "".join(said)


# ---------------------------------------------------------------- a full disk

@contextmanager
def full_disk(after):
    "No room for datasets after so many writes."
    real, written = episodes.RowFile.append, []
    def append(self, rows):
        if len(written) >= after: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(rows))
        real(self, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(episodes.RowFile, "append", append)
        yield
    assert len(written) == after


def test_a_full_disk_leaves_nothing_and_the_run_can_be_started_again(tmp_path):
    words = ("No space left on device", "make room", "data.dir")
    with full_disk(after=17), refused(DatasetError, *words): run_in(tmp_path)
    assert list((tmp_path / "datasets").iterdir()) == []
    status = status_of(tmp_path / "runs" / "mine")
    assert (status["status"], status["stage"]) == ("failed", "data")
    assert "No space left" in status["error"] and status["schema_version"] == 1
    assert status_of(run_in(tmp_path))["status"] == "finished"


def test_after_a_full_disk_the_same_run_can_use_another(tmp_path):
    "What the refusal proposes, another data.dir, is no other run: the dataset is the same wherever it lies."
    with full_disk(after=17), pytest.raises(DatasetError): run_in(tmp_path)
    folder = run_in(tmp_path, {"data.dir": str(tmp_path / "large disk")})
    assert status_of(folder)["status"] == "finished"


# ---------------------------------------------------------------- interruptions

def interrupt(kind, settings):
    "Begin a run, and stop it at the fifth step of this model's training."
    def stop(self, step, steps):
        if step == 5: raise Interrupted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "after_step", stop)
        with pytest.raises(Interrupted): go("mine", settings)


def go_on(kind, settings):
    "Go on with it: what is trained, and which steps of this model are made."
    with pytest.MonkeyPatch.context() as patch:
        fits, steps = counted_fits(patch), []
        patch.setattr(kind, "after_step", lambda self, step, steps_: steps.append(step))
        return fits, steps, go("mine", settings)


@pytest.mark.parametrize("kind", [JEPA, EncoderDecoder])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bytes(kind, undisturbed, tmp_path):
    settings = small(tmp_path, DROPPY, models=["jepa", "encdec"])
    interrupt(kind, settings)
    folder = tmp_path / "runs" / "mine"
    status = status_of(folder)
    assert (status["status"], status["stage"]) == ("failed", "train") and "Interrupted" in status["error"]
    torch.rand(7)  # whoever goes on has drawn other numbers
    np.random.rand(7)
    fits, steps, _ = go_on(kind, settings)
    assert fits == (["JEPA"] if kind is JEPA else []) + ["EncoderDecoder", *HEADS, *ORACLES, *HEADS]
    assert steps == [4, 5, 6]
    status = status_of(folder)
    assert status["status"] == "finished" and "error" not in status
    for model in ("jepa", "encdec"):
        for part in ("world", "decoder", "reward_mlp", "reward_mlp_no_action", "larp"):
            file = f"models/{model}/{part}/weights.safetensors"
            assert (folder / file).read_bytes() == (undisturbed / file).read_bytes(), (model, part)
    assert results(folder) == results(undisturbed)


def test_an_interruption_after_training_does_not_train_again(tmp_path, monkeypatch):
    fits = counted_fits(monkeypatch)
    encoded = counted(monkeypatch, latents, "_latent_batches", lambda model: type(model).__name__)
    settings = small(tmp_path)
    begun = go("mine", settings, ("data", "train"))
    before = weights_of(begun, "jepa")
    assert fits == ["JEPA"] and read_status(begun.folder)["status"] == "begun"
    with pytest.MonkeyPatch.context() as patch:
        def stop(*_): raise Interrupted
        patch.setattr(evaluation, "collapse_results", stop)
        with pytest.raises(Interrupted): go("mine", settings)
    assert fits == ["JEPA", *HEADS, *ORACLES] and read_status(begun.folder)["stage"] == "evaluate"
    go("mine", settings)
    assert fits == ["JEPA", *HEADS, *ORACLES] and weights_of(begun, "jepa") == before
    assert len(encoded) == 2, "every frame once by the trained encoder, and once by the untrained baseline"


def test_stages_can_be_run_one_after_another(tmp_path):
    for stage in STAGES: folder = run_in(tmp_path, {"run.stages": [stage]})
    assert set(status_of(folder)["stages"]) == set(STAGES)
    assert results(folder) == results(run_in(tmp_path, run="whole"))


# ---------------------------------------------------------------- the same again

def latent_errors(folder):
    return [row["value"] for row in results(folder)["jepa"] if row["metric"] == "latent"]


def test_the_same_settings_give_the_same_numbers_and_another_seed_others(undisturbed, tmp_path):
    torch.rand(5)
    np.random.rand(5)
    again = run_in(tmp_path, DROPPY, ["jepa", "encdec"], run="again")
    assert results(again) == results(undisturbed)
    a, b = (json.loads((folder / "provenance.json").read_text()) for folder in (again, undisturbed))
    assert a["dataset_hash"] == b["dataset_hash"]
    other = run_in(tmp_path, DROPPY | {"run.seed": 1}, run="other")
    assert latent_errors(other) != latent_errors(undisturbed)


def test_a_model_does_not_depend_on_its_company(undisturbed, tmp_path):
    alone = run_in(tmp_path, DROPPY, run="alone")
    assert results(alone)["jepa"] == results(undisturbed)["jepa"]


# ---------------------------------------------------------------- tracking

def inspect(log):
    "The records of an offline run, as wandb itself reads them."
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log]
    env = os.environ | {"WANDB_MODE": "offline"}
    read = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in read.stdout.splitlines()]


def check_tracked(session, rows):
    "Trainings, heads, oracles and evaluation are there, and each step once."
    keys = {key for row in rows for key in row}
    assert {"jepa/train/prediction", "jepa/decoder/train/pixels", "jepa/reward_mlp/train/reward",
            "jepa/larp/train/reward", "oracles/oracle/train/reward"} <= keys
    assert {"jepa/evaluation/rollout/position_ratio/1", "jepa/evaluation/probe/r2 position"} <= keys
    written = read_metrics(session.folder.part("jepa", "world") / "metrics.jsonl")
    steps = [row["jepa/step"] for row in rows if "jepa/train/total" in row]
    assert steps == [row["step"] for row in written]


def test_a_tracked_run_leaves_an_offline_run_with_metrics_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    offline = {"tracking.enabled": True, "tracking.mode": "offline", "tracking.project": "mine"}
    tracked = go("tracked", small(tmp_path, offline | {"train.picture_every": 3}))
    log, = (tracked.folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    records = inspect(log)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    check_tracked(tracked, rows)
    files = ("picture.path", "filmstrip.path")
    pictures = [row[key] for row in rows for key in row if key.endswith(files)]
    assert len(pictures) == 5
    assert all((log.parent / "files" / path).read_bytes().startswith(b"\x89PNG") for path in pictures)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert run["project"] == "mine" and re.fullmatch(r"exp-\d{8}-\d{6}", run["display_name"])
    plain = run_in(tmp_path, {"train.picture_every": 3}, run="plain")
    assert results(plain) == results(tracked.folder.path)


# ---------------------------------------------------------------- the seed project

SEED = {
    "collect.ppo.train_steps": 64, "collect.ppo.n_envs": 1, "collect.ppo.n_steps": 32,
    "collect.ppo.batch_size": 32, "collect.ppo.n_epochs": 1, "collect.ppo.subprocesses": False,
    "collect.episodes": 4, "collect.steps": 8, "data.validation_split": .5,
    "train.epochs": None, "train.steps": 2, "train.batch_size": 4, "train.validate_every": 2,
    "train.validation_batches": 1, "train.checkpoint_every": 2, "train.picture_every": 0,
    "train.state_decoder.epochs": None, "train.state_decoder.steps": 4, "train.state_decoder.batch_size": 8,
    "train.reward_mlp.epochs": None, "train.reward_mlp.steps": 4,
    "train.larp.epochs": None, "train.larp.steps": 4, "evaluation.probe.mlp_steps": 4,
    "tracking.enabled": False, "evaluation.horizons": [1, 2], "evaluation.n_windows": 4,
    "evaluation.bootstrap": 10,
}


@pytest.mark.filterwarnings("ignore:no reward heads")  # each step earns the same
def test_the_seed_projects_own_settings_run(tmp_path):
    pytest.importorskip("ale_py")
    pytest.importorskip("stable_baselines3")
    session = go("seed", inside(tmp_path, SEED, preset="seed"))
    dataset = dataset_of(session)
    assert dataset.spec.frame_shape == (1, 64, 64) and dataset.states.shape[1] == 128
    assert [path.name[:4] for path in (tmp_path / "datasets" / "agents").iterdir()] == ["ppo-"]
    for rows in results(session.folder.path).values():
        assert {row["protocol"] for row in rows} == {"probe", "rollout", "collapse", "cost"}
        assert not [row for row in rows if row["metric"].startswith("position")]
    assert "Assault" in write_report(session.folder.path).read_text()


# ---------------------------------------------------------------- a model and a term of one's own

TERM = """
from worldmodels_nb.nn.regularizer import loss_term

@loss_term("sphere", inputs="latents", default=.25)
def sphere(x, s): return (x.norm(dim=-1) - 1).square().mean()
"""
MODEL = """
from torch.nn import functional as F
from worldmodels_nb.models.base import WorldModel, register
from worldmodels_nb.nn.encoders import build_encoder
from worldmodels_nb.nn.layers import ActionEmbedding
from worldmodels_nb.nn.regularizer import Regularizer
from worldmodels_nb.training.fit import weighted

@register("toy", color="#123456")
class Toy(WorldModel):
    "Each action is a step in latent space, the same wherever it is taken."
    def __init__(self, settings, spec):
        super().__init__(settings, spec)
        self.encoder = build_encoder(settings, spec.frame_shape)
        self.latent_shape = self.encoder.latent_shape
        self.action = ActionEmbedding(spec.action, settings.model.latent_dim)
        self.regularizer = Regularizer(self.latent_shape, spec.action, settings, settings.loss.jepa)

    def rollout(self, z, past_actions, actions):
        return z[:, -1:] + self.action(actions).cumsum(1)[:, :, None]

    def loss(self, batch):
        z = self.encode(batch.frames)
        predicted = self.rollout(z[:, :1], None, batch.actions)
        terms = {"prediction": F.mse_loss(predicted, z[:, 1:])}
        terms |= self.regularizer(z, batch.actions, predicted)
        return weighted(terms, {"prediction": 1.0} | self.regularizer.weights)
"""
REGISTRIES = (MODELS, TERMS, settings_module.FURTHER_TERMS, viz.MODEL_COLORS)


@contextmanager
def own_modules(folder):
    "A term and a model, each in a module as a notebook of one's own would export it; forgotten afterwards."
    before = [dict(registry) for registry in REGISTRIES]
    sources = dict(my_term=TERM, my_model=MODEL)
    for name, source in sources.items(): (folder / f"{name}.py").write_text(source)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            for name in sources: importlib.import_module(name)
            yield
    finally:
        for name in sources: sys.modules.pop(name, None)
        for registry, entries in zip(REGISTRIES, before):
            registry.clear()
            registry.update(entries)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    "The folder of a run of such a model beside JEPA, both with such a term, and its report."
    folder = tmp_path_factory.mktemp("own")
    with own_modules(folder):
        run = run_in(folder, {"loss.sphere": .5}, ["jepa", "toy"])
        write_report(run)
    return run


def terms_of(folder, model):
    lines = read_metrics(folder / "models" / model / "world" / "metrics.jsonl")
    return {key for line in lines for key in line if key.startswith("train/")}


def test_a_term_and_a_model_of_ones_own_go_from_settings_to_the_report(own_run):
    for model in ("jepa", "toy"): assert "train/sphere" in terms_of(own_run, model)
    assert read_models(RunFolder(own_run))["toy"] == dict(color="#123456", stages=["world"])
    rows = [row for row in read_csv(own_run / "comparison.csv") if row["model"] == "toy"]
    assert {row["protocol"] for row in rows} == {"probe", "rollout", "reward", "collapse", "cost"}
    assert {row["kind"] for row in rows} == {"model", "baseline", "reference"}
    page = Page((own_run / "report.html").read_text(encoding="utf-8"))
    for word in ("toy for 6 steps", "LARP", "persistence", "sphere = 0.5"): assert word in page.text
    assert "training toy world" in {attributes.get("alt") for _, attributes in page.tags}


def test_a_term_of_ones_own_has_the_weight_it_was_declared_with(tmp_path):
    with own_modules(tmp_path):
        session = go("mine", small(tmp_path, models=["toy"]), ("data", "train"))
        assert session.settings.loss.weight("sphere") == .25 and viz.model_color("toy") == "#123456"
    assert "train/sphere" in terms_of(session.folder.path, "toy")
    with refused(SettingsError, "'toy'"): begin("next", small(tmp_path, models=["toy"]))
    with refused(SettingsError, "'loss.sphere'"): small(tmp_path, {"loss.sphere": .5})
    assert "sphere" not in TERMS and "toy" not in viz.MODEL_COLORS


def test_a_report_needs_neither_the_model_nor_the_term(own_run):
    "A fresh process knows nothing of them, and draws the same page in the same colours."
    before = bytes_of(own_run)
    code = ("import sys\nfrom worldmodels_nb.runs.report import write_report\n"
            "from worldmodels_nb.viz import model_color\n"
            "write_report(sys.argv[1])\nprint(model_color('toy'))")
    done = subprocess.run([sys.executable, "-c", code, own_run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["#123456"] and bytes_of(own_run) == before


def test_a_run_says_where_its_time_went_and_adds_up_its_sessions(tmp_path):
    first = RunFolder(run_in(tmp_path, models=("jepa", "vjepa2")))
    took, parts = stage_seconds(first), part_seconds(first)
    assert list(took) == list(STAGES) and min(took.values()) >= 0
    assert list(parts) == ["data", "jepa", "vjepa2/pretrain", "vjepa2/action", "heads", "evaluate"]
    assert parts["vjepa2/action"] >= stage_result(first.part("vjepa2", "action"))["encoding"] > 0
    before = read_status(first) | dict(status="begun", stages=[], seconds=dict(data=1000.0))
    (first.path / "status.json").write_text(json.dumps(before), encoding="utf-8")
    again = go("mine", small(tmp_path, models=("jepa", "vjepa2")))
    assert stage_seconds(again.folder)["data"] >= 1000


@pytest.mark.parametrize("damage", [3, [1.0], dict(data="long"), "soon"])
def test_seconds_that_are_none_are_said_to_be_damaged(tmp_path, damage):
    folder = RunFolder(tmp_path)
    told = dict(schema_version=1, status="begun", stages=[], seconds=damage)
    (tmp_path / "status.json").write_text(json.dumps(told), encoding="utf-8")
    with refused(ValueError, "status.json", "seconds"): stage_seconds(folder)
