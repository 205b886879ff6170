"What the tests of whole runs share: small settings, a way through the stages, ways to look at what is left."
import csv
import hashlib
import json
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from worldmodels_nb.data.datasets import Dataset
from worldmodels_nb.runs.experiment import finish_run, run_stage
from worldmodels_nb.runs.folder import STAGES, resolve
from worldmodels_nb.runs.training import Session, ensure_data, start_session
from worldmodels_nb.settings import Settings, repo_root
from worldmodels_nb.training import parts

ROOT = repo_root(Path(__file__).parent)

SMALL = {
    "collect.episodes": 8, "collect.steps": 6, "data.validation_split": .4, "env.size": 32,
    "train.steps": 6, "train.batch_size": 4, "train.window_steps": 2,
    "train.validate_every": 2, "train.checkpoint_every": 2, "train.picture_every": 0,
    "train.state_decoder.steps": 4, "train.state_decoder.batch_size": 4,
    "train.reward_mlp.steps": 4, "train.reward_mlp.batch_size": 4, "train.reward_mlp.hidden": [8],
    "train.larp.steps": 4, "train.larp.batch_size": 4, "train.larp.hidden": [8],
    "train.oracle.steps": 4, "train.oracle.batch_size": 4,
    "evaluation.probe.mlp_steps": 4, "evaluation.horizons": [1, 2], "evaluation.n_windows": 6,
    "evaluation.bootstrap": 10,
}
TWO = {  # a model in two stages, as small
    "vjepa2.pretrain.steps": 4, "vjepa2.pretrain.batch_size": 4, "vjepa2.pretrain.patch_size": 16,
    "vjepa2.pretrain.dim": 12, "vjepa2.pretrain.depth": 1, "vjepa2.pretrain.heads": 1,
    "vjepa2.pretrain.predictor_dim": 12, "vjepa2.pretrain.predictor_depth": 1, "vjepa2.pretrain.frames": 2,
    "vjepa2.action.window_steps": 2, "vjepa2.action.context_length": 2, "vjepa2.action.rollout_steps": 1,
    "vjepa2.action.dim": 12, "vjepa2.action.depth": 1, "vjepa2.action.heads": 1,
    "vjepa2.action.steps": 4, "vjepa2.action.batch_size": 4,
}
DROPPY = {  # dropout: random numbers matter
    "model.encoder": "cnn", "encoder.cnn.base_filters": 4, "encoder.cnn.dropout": .3,
    "train.checkpoint_every": 3,
}
HEADS = ["StateDecoder", "RewardMLP", "RewardMLP", "LookAheadRewardPredictor"]  # as they are trained
ORACLES = HEADS[2:]


@contextmanager
def one_thread():
    "Compute with one thread, and as before afterwards."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def places(folder) -> dict:
    "Settings that keep runs and datasets in one folder."
    return {"run.dir": str(folder / "runs"), "data.dir": str(folder / "datasets")}


def inside(folder, changes=(), preset="smoke", base=(), models=None) -> Settings:
    "Settings of a run in this folder."
    return resolve(preset, models=models, overrides=dict(base) | places(folder) | dict(changes))


def small(folder, changes=(), models=("jepa",)) -> Settings:
    "Settings of a run of a second or two."
    return inside(folder, changes, base=SMALL, models=list(models))


def begin(run, settings) -> Session:
    "A session, without a bar."
    return start_session(run, settings, progress=False)


def go(run, settings, stages=STAGES) -> Session:
    "A run through these stages; through all of them, it is finished."
    session = begin(run, settings)
    for stage in stages: run_stage(session, stage)
    if stages == STAGES: finish_run(session)
    return session


def run_in(folder, changes=(), models=("jepa",), run="mine") -> Path:
    "The folder of a small run, finished."
    return go(run, small(folder, changes, models)).folder.path


def weights_of(session, model, part="world") -> bytes:
    "The weights that a part of a model was left with, as bytes."
    return (session.folder.part(model, part) / "weights.safetensors").read_bytes()


def dataset_of(session) -> Dataset:
    "The dataset of a run."
    return ensure_data(session).dataset


def evaluation_of(folder, model) -> dict:
    "What stands in the evaluation of a model."
    return json.loads((folder / "models" / model / "evaluation.json").read_text())


def results(folder) -> dict[str, list[dict]]:
    "What a run found, by model, but for how long it took and what the run is called."
    found = {}
    for model in sorted(path.name for path in (folder / "models").iterdir()):
        rows = [row for row in evaluation_of(folder, model)["rows"] if row["metric"] != "seconds"]
        assert {row.pop("run") for row in rows} == {folder.name}
        found[model] = rows
    return found


def read_csv(path) -> list[dict[str, str]]:
    "A table as it was written."
    with open(path, newline="", encoding="utf-8") as file: return list(csv.DictReader(file))


def bytes_of(folder) -> dict[str, str]:
    "Every file below a folder, and a hash of what is in it."
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def cut_short(path) -> None:
    "Half of a file remains; of settings it ends within a line, since whole lines are a whole file."
    content = path.read_bytes()
    half = len(content) // 2
    if path.suffix == ".ini": half = content.rindex(b"=", 0, half) + 1
    path.write_bytes(content[:half])


@contextmanager
def refused(kind, *words):
    "One sentence with these words in it."
    with pytest.raises(kind) as caught: yield caught
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said, said


def counted(monkeypatch, module, name, of) -> list:
    "Note each call of a module's function, by what `of` makes of its first argument."
    calls, real = [], getattr(module, name)
    def call(first, *rest, **more):
        calls.append(of(first))
        return real(first, *rest, **more)
    monkeypatch.setattr(module, name, call)
    return calls


def counted_fits(monkeypatch) -> list[str]:
    "Note each training from here on, by the class of what is trained."
    return counted(monkeypatch, parts, "fit_windows", lambda model: type(model).__name__)


class Interrupted(KeyboardInterrupt): "Somebody pressed the stop button."


class Page(HTMLParser):
    "Tags with their attributes, and all text."
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.tags.append((tag, dict(attributes)))
    def handle_data(self, data): self.text += data
