"A batch loses nothing: its drivers and workers may be killed, its runs may fail, two may share one grid."
import dataclasses
import io
import json
import random
import time
from pathlib import Path

import batch_tools
import psutil
import pytest
from batch_tools import check_counted, counting_grid, counting_notebook, driver, until, weights_of, workers
from papermill import execute_notebook
from rich.console import Console
from run_tools import SMALL, TWO, Page

from worldmodels_nb.runs.batch import BatchRun, batch_folder, plan_batch, report_batch, run_batch, seed_means
from worldmodels_nb.runs.facts import read_rows
from worldmodels_nb.runs.grid import read_grid
from worldmodels_nb.runs.rows import BatchFolder, BatchView, batch_html


@pytest.fixture(scope="module")
def twelve(): return counting_grid(12)


@pytest.fixture(scope="module")
def three(): return counting_grid(3, "three")


@pytest.fixture
def book(tmp_path): return counting_notebook(tmp_path / "count.ipynb")


def statuses(rows): return [row["status"] for row in rows]


def kill(processes):
    for process in processes:
        try: process.kill()
        except psutil.NoSuchProcess: pass


def test_all_runs_finish_and_a_second_batch_finds_nothing_to_do(three, book, tmp_path):
    changes = []
    rows = run_batch(three, tmp_path, notebook=book, on_change=lambda rows: changes.append(statuses(rows)))
    assert statuses(rows) == ["finished"] * 3 and changes[0] == ["new"] * 3
    assert max(states.count("running") for states in changes) == 2
    check_counted(three, tmp_path)
    assert all(Path(row["notebook"]) == tmp_path / row["run"] / "run.ipynb" for row in rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert statuses(run_batch(three, tmp_path, notebook=book)) == ["finished"] * 3
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert all(row["estimate"] > 0 for row in plan_batch(three, tmp_path))


def test_drivers_and_workers_are_killed_and_nothing_is_lost(twelve, tmp_path):
    chance, book = random.Random(0), counting_notebook(tmp_path / "count.ipynb")
    for _ in range(5):
        with driver(twelve, tmp_path, notebook=book):
            until(lambda: workers(tmp_path))
            time.sleep(chance.uniform(0, 2))
            for worker in workers(tmp_path)[:1]:  # it, or the kernel it has started
                kill(worker.children() if chance.random() < .5 else [worker])
            time.sleep(chance.uniform(0, 1))
    rows = run_batch(twelve, tmp_path, notebook=book, retries=5)
    assert statuses(rows) == ["finished"] * 12
    check_counted(twelve, tmp_path)
    assert not workers(tmp_path)


def test_workers_of_a_dead_driver_are_waited_for(three, tmp_path):
    book = counting_notebook(tmp_path / "count.ipynb", pause=.2)
    with driver(three, tmp_path, notebook=book):
        alive = until(lambda: len(found := workers(tmp_path)) == 2 and found)
    until(lambda: "running" in statuses(plan_batch(three, tmp_path)))
    assert all(worker.is_running() for worker in alive)
    assert statuses(run_batch(three, tmp_path, notebook=book)) == ["finished"] * 3
    check_counted(three, tmp_path)


def test_two_batches_on_one_grid(three, book, tmp_path):
    with driver(three, tmp_path, notebook=book) as other:
        rows = run_batch(three, tmp_path, notebook=book)
        other.join()
        assert other.exitcode == 0
    assert statuses(rows) == ["finished"] * 3
    check_counted(three, tmp_path)


def test_ctrl_c_ends_the_workers(three, tmp_path):
    book = counting_notebook(tmp_path / "count.ipynb", pause=1)
    def press(rows):
        if statuses(rows).count("running") == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_batch(three, tmp_path, notebook=book, on_change=press)
    assert not workers(tmp_path) and "running" not in statuses(plan_batch(three, tmp_path))
    rows = run_batch(three, tmp_path, notebook=counting_notebook(book))
    assert statuses(rows) == ["finished"] * 3
    check_counted(three, tmp_path)


FAULTS = """
if seed == 1: raise ValueError("no such\\nluck <b>")
if seed == 2: os.system("sleep 1000")  # its kernel answers nobody
if seed == 3: __import__("shutil").rmtree(folder)
if seed == 4: raise OSError(28, "No space left on device")
if seed == 5: raise KeyboardInterrupt
if seed == 6: os.kill(os.getpid(), 9)
"""
SAID = ["", "ValueError: no such luck <b>", "0.25 minutes", "FileNotFoundError", "No space left",
        "KeyboardInterrupt", "process died"]


def test_those_that_fail_are_rows(tmp_path):
    grid, book = counting_grid(7, "faults"), counting_notebook(tmp_path / "count.ipynb", before=FAULTS)
    rows = run_batch(grid, tmp_path, notebook=book, retries=0, limit_minutes=.25, processes=3)
    assert statuses(rows) == ["finished"] + ["failed"] * 6
    for row, said in zip(rows, SAID): assert said in row["error"] and "\n" not in row["error"]
    assert "no such" in Path(rows[1]["notebook"]).read_text() and not workers(tmp_path)
    planned = plan_batch(grid, tmp_path)
    assert statuses(planned) == ["finished"] + ["failed"] * 4 + ["interrupted", "failed"]
    assert planned[2]["error"] == rows[2]["error"]


def test_failed_ones_are_kept_until_they_are_asked_for(tmp_path):
    grid, book = counting_grid(1, "again"), batch_tools.write_notebook(tmp_path / "none.ipynb", "1 / 0")
    failed = run_batch(grid, tmp_path, notebook=book, retries=0)
    assert statuses(failed) == ["failed"] and failed[0]["error"] == "ZeroDivisionError: division by zero"
    assert run_batch(grid, tmp_path, notebook=counting_notebook(book)) == failed
    assert statuses(run_batch(grid, tmp_path, notebook=book, again=True)) == ["finished"]
    check_counted(grid, tmp_path)


# ---------------------------------------------------------------- stages that runs share

@pytest.fixture
def widths(tmp_path):
    "Three runs with one first stage, and what trains them."
    fixed = SMALL | TWO | {"run.models": ["vjepa2"], "run.stages": ["data", "train"],
                           "data.dir": str(tmp_path / "datasets")}
    axes = {"vjepa2.action.mlp_ratio": [2., 3., 4.]}
    return read_grid(dict(name="widths", preset="smoke", fixed=fixed, axes=axes))


def test_a_first_stage_is_trained_once_and_weights_are_those_of_runs_that_train_it(widths, tmp_path):
    rows, place = run_batch(widths, tmp_path / "together"), BatchFolder(tmp_path / "together", "widths")
    assert statuses(rows) == ["finished"] * 3
    first, *_, last = [cell.run for cell in widths.cells]
    loaded = [place.taken(row["run"], "vjepa2", "pretrain") for row in rows]
    assert loaded == [None] + [str(place.folder(first).path)] * 2
    alone = dataclasses.replace(widths, cells=widths.cells[2:])
    assert statuses(run_batch(alone, tmp_path / "alone")) == ["finished"]
    assert BatchFolder(tmp_path / "alone", "widths").has_trained(last, "vjepa2", "pretrain")
    assert len(found := weights_of(tmp_path / "together" / last)) == 2
    assert found == weights_of(tmp_path / "alone" / last)


class Nobody:
    "An engine that has no time."
    slots = 9
    def submit(self, task, log): return self
    def poll(self): return None


def test_who_waits_for_a_stage(widths, tmp_path, monkeypatch):
    trained, begun = set(), set()
    monkeypatch.setattr(BatchFolder, "has_trained", lambda self, run, model, stage: run in trained)
    monkeypatch.setattr(BatchFolder, "has_begun", lambda self, run: run in begun)
    place, quiet = batch_folder(widths, tmp_path), lambda rows: None
    batch = BatchRun(widths, place, Nobody(), Path("no.ipynb"), 0, None, quiet)
    monkeypatch.setattr(batch, "needs", dict.fromkeys(batch.cells, []))
    a, b, c = batch.cells
    batch.step()
    assert batch.runs("running") == [a] and batch.loads(a) == {}
    begun.add(b)  # in an earlier batch, with a stage of its own
    assert not batch.waits(b) and batch.loads(b) == {} and batch.waits(c)
    trained.add(a)
    assert not batch.waits(c) and batch.loads(c) == {"vjepa2.pretrain.load": str(tmp_path / a)}
    trained.clear()
    batch.change(a, dict(status="failed"))
    assert not batch.waits(c) and batch.loads(c) == {}  # then it is c's to train


def evaluated(folder, model, seed, value, error=None):
    "Write a run's folder by hand: one figure of one model."
    row = dict(run=folder.name, env="e", model=model, head="", kind="model", protocol="probe", metric="r2",
               unit="", horizon=0, seed=seed, value=value, low=value - 1, high=value + 1, n=9)
    about = dict(schema_version=1, models={model: dict(color="#123456", stages=["world"])}, terms={})
    status = dict(status="failed", error=error) if error else dict(status="finished")
    stages = [] if error else ["data", "train", "heads", "evaluate"]
    part = folder / "models" / model
    part.mkdir(parents=True)
    (folder / "settings.ini").touch()
    (folder / "models.json").write_text(json.dumps(about))
    (part / "evaluation.json").write_text(json.dumps(dict(schema_version=2, rows=[row], notes=[])))
    (folder / "status.json").write_text(json.dumps(dict(schema_version=1, stages=stages) | status))


def test_a_report_joins_seeds_and_shows_what_failed(tmp_path):
    given = dict(name="report", preset="sample", fixed=batch_tools.NOTHING_SHARED | {"run.models": ["jepa"]},
                 axes={"train.steps": [10, 20], "run.seed": [0, 1, 2]})
    grid = read_grid(given)
    for k, cell in enumerate(grid.cells[:4]):
        evaluated(tmp_path / cell.run, "jepa", cell.settings.run.seed, float(k))
    evaluated(tmp_path / grid.cells[4].run, "jepa", 1, 99., error="ValueError: <script>")
    page = Page(report_batch(grid, tmp_path).read_text())
    assert "ValueError: <script>" in page.text and "script" not in [tag for tag, _ in page.tags]
    words = " ".join(page.text.split())
    assert "3 seeds" in words and "train.steps = 10" in words
    assert "99" not in words.partition("read off a latent?")[2]
    assert "4 finished, 1 failed, 1 new" in words
    means = {row["column"]: row for row in seed_means([
        (cell.values, read_rows(tmp_path / cell.run)) for cell in grid.cells[:4]])}
    ten, twenty = means["train.steps = 10"], means["train.steps = 20"]
    assert (ten["value"], ten["n"]) == (1, 3) and ten["low"] + ten["high"] == pytest.approx(2)
    assert ten["high"] == pytest.approx(1 + 4.303 / 3**.5)
    assert (twenty["value"], twenty["low"], twenty["n"]) == (3, None, 1)


def test_rows_are_shown_to_a_log_a_terminal_and_a_page(three, tmp_path):
    rows = plan_batch(three, tmp_path)
    rows[1] |= dict(status="failed", error="no [bold]luck[/bold] <b>", notebook=str(tmp_path / "a b.ipynb"))
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, force_jupyter=False, width=200)
        with BatchView(console) as view:
            for _ in range(2): view(rows)
        said = console.file.getvalue()
        assert "[bold]luck[/bold] <b>" in said and (terminal or said.count("luck") == 1)
    page = Page(batch_html(rows, tmp_path))
    assert "no [bold]luck[/bold] <b>" in page.text
    assert [about["href"] for tag, about in page.tags if tag == "a"] == ["a%20b.ipynb"]


def test_a_sweep_that_nobody_looks_on_to_leaves_a_line_for_each_change(three, book, tmp_path):
    asked = json.dumps([str(tmp_path), str(book), dict(name="three", preset="sample",
                        fixed=batch_tools.NOTHING_SHARED, axes={"run.seed": [0, 1, 2]})])
    code = ("import json\nfrom worldmodels_nb.runs.batch import run_batch\n"
            "from worldmodels_nb.runs.rows import BatchView\n"
            f"runs, book, grid = json.loads({asked!r})\n"
            "with BatchView() as view: run_batch(grid, runs, notebook=book, on_change=view)")
    sweep = batch_tools.write_notebook(tmp_path / "sweep.ipynb", code)
    execute_notebook(sweep, tmp_path / "done.ipynb", progress_bar=False)
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    said = "".join("".join(output["text"]) for cell in cells for output in cell["outputs"])
    assert "\x1b" not in said and len(said.splitlines()) == 6  # running, finished
    assert all(said.count(cell.run) == 2 for cell in three.cells)
