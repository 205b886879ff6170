"""Two processes train as one does: the same curve, the same files, written once.

They are started for real, by `torchrun` and by `notebook_launcher`, on processors and over loopback.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from worldmodels_nb.data.datasets import Windows, sample_dataset
from worldmodels_nb.models.base import fresh_model
from worldmodels_nb.nn import regularizer
from worldmodels_nb.runs.folder import resolve
from worldmodels_nb.training import parts
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.distributed import Distributed, make_accelerator, train_distributed
from worldmodels_nb.training.fit import Callback, History, Run, TrainingError, weights_hash
from worldmodels_nb.training.parts import read_result, train

STEPS = 6
COMMON = {"train.steps": STEPS, "train.batch_size": 4, "train.window_steps": 2, "train.validate_every": 3,
          "train.checkpoint_every": 2, "train.picture_every": 0, "train.validation_batches": 1}
NO_VARIANCE = {"loss.variance": 0.0, "loss.covariance": 0.0}
CASES = {
    "vicreg": ("jepa", {"loss.views": "two", "loss.invariance": 1.0}),
    "barlow": ("jepa", NO_VARIANCE | {"loss.views": "two", "loss.barlow.weight": 0.1}),
    "masked": ("vjepa2", {
        "vjepa2.pretrain.steps": STEPS, "vjepa2.pretrain.batch_size": 4, "vjepa2.pretrain.dim": 12,
        "vjepa2.pretrain.depth": 1, "vjepa2.pretrain.heads": 1, "vjepa2.pretrain.predictor_dim": 12,
        "vjepa2.pretrain.predictor_depth": 1}),
}


def prepared(case):
    "A fresh model, or the first part of it, its windows and its recipe."
    name, keys = CASES[case]
    settings, data = resolve("smoke", models=[name], overrides=COMMON | keys), sample_dataset()
    sides = data.split(0.3)
    frames = Windows(data, sides[0], 0).sample(64, 0, 0).frames[:, -1]
    stage = fresh_model(name, settings, data.spec, frames, 0).stages()[0]
    windows = [Windows(data, side, stage.window) for side in sides]
    return stage.part, *windows, settings.recipe(stage.section)


class Ends(Callback):
    "Raises, or asks for an end, after a step."
    def __init__(self, step, error=None): self.step, self.error = step, error
    def on_step(self, run):
        if run.step != self.step: return
        if self.error: raise self.error
        run.stop = "enough"


def together(case, folder, *callbacks):
    "One process's part in a training; it notes what it saw."
    torch.set_num_threads(1)
    folder, history = Path(folder), History()
    part, *rest = prepared(case)
    result = train_distributed(part, *rest, folder, callbacks=[history, *callbacks], progress="")
    seen = {"rows": history.rows, "weights": weights_hash(part), "result": result}
    (folder / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(seen))


def all_cases(folder):
    "What each process of `torchrun` does, one training after another."
    for case in CASES: together(case, folder / case)
    together("vicreg", folder / "stopped", Ends(3))
    regularizer.gather_batch = lambda own: own  # what would be, if every process judged its own share
    together("vicreg", folder / "apart")


def free_port():
    "One that nobody listens at now, as a word."
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return str(asked.getsockname()[1])


def interrupted(folder):
    "By `notebook_launcher`: a training that dies, and goes on; then the same in one process."
    from accelerate import notebook_launcher
    def launch(*args): notebook_launcher(together, args, num_processes=2, use_port=free_port())
    try: launch("vicreg", folder / "killed", Ends(5, RuntimeError("a power cut")))
    except Exception as error: (folder / "why").write_text(str(error))
    launch("vicreg", folder / "killed")
    launch("vicreg", folder / "killed", Ends(1))  # finished: read, not trained
    together("vicreg", folder / "alone")


def started(folder, *command):
    "Run this file in processes of their own."
    pytest.importorskip("accelerate")
    here = {"PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[1], Path.cwd()]))}
    known = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux": del known["GLOO_SOCKET_IFNAME"]
    done = subprocess.run([sys.executable, *command, __file__, folder], capture_output=True, text=True,
                          env=os.environ | here | known, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
              "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return started(tmp_path_factory.mktemp("shared"), *launch)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory): return started(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The curve of one process, by `train`, and its weights."
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for case in CASES:
        history, (part, *rest) = History(), prepared(case)
        train(part, *rest, folder / case, callbacks=[history], progress="")
        found[case] = SimpleNamespace(rows=history.rows, weights=weights_hash(part), folder=folder / case)
    return found


def seen(folder, rank=0): return json.loads((folder / f"rank{rank}.json").read_text())


def apart(a, b):
    "The largest difference of two curves, of any term, relative to values above 1."
    assert [list(row) for row in a] == [list(row) for row in b]
    return max(abs(x[key] - y[key]) / max(1, abs(y[key])) for x, y in zip(a, b) for key in y)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_curve_of_one(shared, alone, case):
    main, other = seen(shared / case), seen(shared / case, 1)
    assert len(main["rows"]) == STEPS and apart(main["rows"], alone[case].rows) < 1e-5
    assert main["weights"] == other["weights"] and main["result"] == other["result"] and other["rows"] == []


def test_without_gathering_it_is_another_training(shared, alone):
    assert apart(seen(shared / "apart")["rows"], alone["vicreg"].rows) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_one_process_and_written_once(shared, alone, case):
    own, theirs = ({path.name for path in folder.iterdir() if not path.name.startswith("rank")}
                   for folder in (shared / case, alone[case].folder))
    assert own == theirs
    rows = [[row["step"] for row in read_metrics(folder / "metrics.jsonl")]
            for folder in (shared / case, alone[case].folder)]
    assert rows[0] == rows[1]
    result = read_result(shared / case)
    assert result["recipe"] == read_result(alone[case].folder)["recipe"] and result["steps"] == STEPS


def test_one_process_goes_on_with_what_two_have_begun_and_finished(shared, monkeypatch):
    monkeypatch.setattr(parts, "fit_windows", lambda *args: pytest.fail("it is finished"))
    part, *rest = prepared("vicreg")
    train(part, *rest, shared / "vicreg", progress="")
    assert weights_hash(part) == seen(shared / "vicreg")["weights"]


def test_where_one_wants_to_stop_all_do(shared):
    assert len(seen(shared / "stopped")["rows"]) == 3
    assert seen(shared / "stopped", 1)["result"]["reason"] == "enough"


def test_a_training_that_was_killed_goes_on_to_the_last_bit(shared, resumed):
    assert "a power cut" in (resumed / "why").read_text()
    whole, late = seen(shared / "vicreg"), seen(resumed / "killed")
    assert read_result(resumed / "killed")["weights"] == whole["result"]["weights"]
    assert late["weights"] == seen(resumed / "killed", 1)["weights"] == whole["weights"]
    assert [row["step"] for row in read_metrics(resumed / "killed" / "metrics.jsonl")] == [3, 6]


def test_in_one_process_it_is_train_to_the_last_bit(resumed, alone):
    found = seen(resumed / "alone")
    assert found["weights"] == alone["vicreg"].weights and found["rows"] == alone["vicreg"].rows


def test_a_batch_without_equal_shares_is_refused():
    three = Distributed(SimpleNamespace(num_processes=3, process_index=0))
    part, _, _, recipe = prepared("vicreg")
    with pytest.raises(TrainingError) as caught: three.on_start(Run(part, None, recipe))
    assert str(caught.value) == ("train.batch_size = 4 has no equal shares for 3 processes; "
                                 "make it a multiple of 3")


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError) as caught: make_accelerator()
    assert str(caught.value).endswith('needs an extra: pip install "worldmodels_nb[cluster]"')


if __name__ == "__main__": (all_cases if "RANK" in os.environ else interrupted)(Path(sys.argv[1]))
