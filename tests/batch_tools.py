"Batches of runs that cost nothing: a notebook that only counts, and grids that only name cells."
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import nbformat
import psutil
from run_tools import bytes_of

from worldmodels_nb.runs.batch import run_batch
from worldmodels_nb.runs.grid import RunGrid, read_grid

PARAMETERS = """run: str = ""
preset: str = None
overrides: dict = None"""

COUNTING = """import hashlib, json, os, time
from pathlib import Path
from filelock import FileLock

def write(path, content):
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    os.replace(new, path)

folder, seed = Path(overrides["run.dir"], run), overrides["run.seed"]
folder.mkdir(exist_ok=True)
(folder / "settings.ini").touch()
lock = FileLock(folder / "run.lock")
lock.acquire(timeout=0)
path = folder / "state.json"
step, digest = json.loads(path.read_text()) if path.exists() else (0, "")
"""

STEPS = """while step < {steps}:
    digest = hashlib.sha256(f"{{digest}} {{seed}} {{step}}".encode()).hexdigest()
    step += 1
    write(path, [step, digest])
    time.sleep({pause})
"""

FINISH = """write(folder / "result.json", digest)
with open(folder / "completed.txt", "a") as file: file.write("once ")
stages = ["data", "train", "heads", "evaluate"]
write(folder / "status.json", dict(schema_version=1, status="finished", stages=stages))
lock.release()"""

NOTHING_SHARED = {"data.path": "data/sample/tworooms"}  # no dataset is to be made, and none waited for


def write_notebook(path, *cells) -> Path:
    "A notebook that papermill takes: parameters, and further cells."
    first = nbformat.v4.new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"]))
    book = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    book.metadata.kernelspec = dict(display_name="python3", language="python", name="python3")
    nbformat.write(book, path)
    return path


def counting_notebook(path, steps=20, pause=.02, before="", after="") -> Path:
    "A run that counts, goes on where it stopped, and says each time that it has come to its end."
    return write_notebook(path, COUNTING + before, STEPS.format(steps=steps, pause=pause) + after + FINISH)


def counted(seed, steps=20) -> str:
    "What such a run finds, undisturbed."
    digest = ""
    for step in range(steps): digest = hashlib.sha256(f"{digest} {seed} {step}".encode()).hexdigest()
    return digest


def counting_grid(n, name="count") -> RunGrid:
    "A grid of so many seeds."
    given = dict(name=name, preset="sample", fixed=NOTHING_SHARED, axes={"run.seed": list(range(n))})
    return read_grid(given)


def check_counted(grid, runs, steps=20) -> None:
    "Every run has its result, once, and nothing half-written lies about."
    for cell in grid.cells:
        folder = Path(runs, cell.run)
        assert json.loads((folder / "result.json").read_text()) == counted(cell.values["run.seed"], steps)
        assert (folder / "completed.txt").read_text() == "once "
        assert not list(folder.rglob("*.new"))


def weights_of(folder) -> dict[str, str]:
    "Hashes of all weights below a folder, by file."
    return {path: value for path, value in bytes_of(folder).items() if path.endswith("weights.safetensors")}


def until(true, seconds=60):
    "Wait for something; what never comes is a failure."
    for _ in range(int(seconds / .05)):
        if (found := true()) not in (None, False, [], ""): return found
        time.sleep(.05)
    raise AssertionError("it did not come")


def workers(runs) -> list[psutil.Process]:
    "The workers of batches in this folder, whoever has started them."
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("run_worker" in word for word in words) and any(str(runs) in word for word in words):
            found.append(process)
    return found


@contextlib.contextmanager
def driver(*args, **how):
    "A driver in a process of its own, killed at the end if it has not ended."
    process = multiprocessing.get_context("fork").Process(target=run_batch, args=args, kwargs=how)
    process.start()
    try: yield process
    finally:
        with contextlib.suppress(ProcessLookupError, TypeError): os.kill(process.pid, signal.SIGKILL)
        process.join()
