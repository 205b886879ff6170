"The command `worldmodels`: it does what the chapters do; what it refuses is one sentence, and status 2."
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_tools import SMALL, inside
from typer.testing import CliRunner

from worldmodels_nb.data.datasets import open_dataset, sample_dataset
from worldmodels_nb.runs import cli, data_commands, doctor, terminal
from worldmodels_nb.runs.claim import hold_run, release_run
from worldmodels_nb.runs.cli import app, delete_run
from worldmodels_nb.runs.folder import RunError, RunFolder
from worldmodels_nb.runs.terminal import read_changes, read_value
from worldmodels_nb.settings import SettingsError, save_settings

GROUPS = ["", "run", "batch", "report", "compare", "doctor", "runs", "runs list", "runs show", "runs delete",
          "data", "data list", "data preview", "data verify", "data import", "data export", "data merge"]


def command(line, status=0, **more):
    "What a line prints; it ends with this status, and never with a traceback."
    words = shlex.split(line) if isinstance(line, str) else list(map(str, line))
    result = CliRunner().invoke(app, words, prog_name="worldmodels", **more)
    assert result.exit_code == status, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def refused(line, *words):
    "One sentence with these words in it, and status 2."
    said = command(line, 2).strip()
    assert all(word in said for word in words) and "Traceback" not in said, said
    return said


def plain(text): return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder to be in, where datasets are."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_commands, "_home", lambda: tmp_path / "datasets")
    return tmp_path


@pytest.fixture
def begun(tmp_path):
    "A run that has begun, and the folder of runs that it is in."
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    save_settings(inside(tmp_path, base=SMALL), folder / "settings.ini")
    (folder / "models.json").write_text('{"schema_version": 1, "models": {}, "terms": {}}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", GROUPS)
def test_help_teaches(name):
    said = plain(command(f"{name} --help"))
    assert "Usage: worldmodels" in said
    group = name in ("", "runs", "data")
    assert group or f"worldmodels {name} " in said.split("Examples")[1] or name == "doctor"


@pytest.mark.parametrize("line", ["rum", "run", "run mine --sett a=1", "batch g.yaml --engine cloud"])
def test_what_is_no_command_is_bad_input(line): assert "Traceback" not in command(line, 2)


def test_values_are_read_as_the_settings_file_has_them():
    words = {"100": 100, "1e-3": 1e-3, ".5": .5, "true": True, "null": None, "CartPole-v1": "CartPole-v1",
             '"a"': "a", "[a, b]": ["a", "b"], '["a"]': ["a"], "{a: 1}": {"a": 1}, "yes": "yes", "": ""}
    assert {word: read_value(word) for word in words} == words
    assert read_changes(["a.b=c=d", "env.id = X"]) == {"a.b": "c=d", "env.id": "X"}
    for bad in ("train.steps", "[a"):
        with pytest.raises(SettingsError): read_changes([bad] if "[" not in bad else [f"a.b={bad}"])


def test_an_error_that_is_none_of_ours_keeps_its_traceback():
    group = terminal.new_commands("One that breaks.")
    @group.command("break")
    def _break(): raise ValueError("a fault in the code")
    @group.command("stop")
    def _stop(): raise KeyboardInterrupt
    assert isinstance(CliRunner().invoke(group, ["break"]).exception, ValueError)
    assert CliRunner().invoke(group, ["stop"]).exit_code == 130


def test_markup_in_words_of_others_is_text(capsys):
    terminal.console().print(terminal.table(["a"], [["[red]x[/red] [/]"]]))
    terminal.say("[bold]y[/]")
    assert capsys.readouterr().out.split() == ["a", "[red]x[/red]", "[/]", "[bold]y[/]"]


# Runs

@pytest.mark.parametrize("change", ["train.stepz=5", "train.steps=-1", "train.steps", "run.models=[nobody]",
                                    "env.id=Nowhere-v0", "run.models=[jepa", "data.path=nowhere"])
def test_bad_settings_make_nothing(home, change):
    refused(["run", "mine", "-p", "smoke", "--runs", "runs", "--set", change])
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["../mine", "a/b", ".", "", ".hidden", "a" * 300])
def test_names_that_are_none(home, name):
    refused(["run", name, "-p", "smoke", "--runs", "r"])
    refused(["runs", "delete", name, "--yes", "--runs", "r"])
    assert list(home.iterdir()) == []


@pytest.fixture
def notebook(monkeypatch):
    "What stands in for papermill: notes its parameters, makes the run's folder, and fails if it is to."
    def execute(source, output, parameters, **more):
        folder = Path(output).with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "settings.ini").write_text("", encoding="utf-8")
        Path(output).write_text("{}", encoding="utf-8")
        execute.given = dict(parameters, source=source)
        if execute.error: raise execute.error
    execute.error = None
    monkeypatch.setattr("papermill.execute_notebook", execute)
    monkeypatch.setattr(cli, "_report_run", lambda folder: cli.say(f"The report of {folder.name}"))
    return execute


def test_a_run_is_the_notebook_with_these_parameters(home, notebook):
    said = command("run mine -p smoke --runs runs --set train.steps=7 --set run.models=[jepa]")
    overrides = {"train.steps": 7, "run.models": ["jepa"], "run.dir": str(home / "runs")}
    source = notebook.given.pop("source")
    assert notebook.given == dict(run="mine", preset="smoke", overrides=overrides)
    assert source.endswith("70_run_experiment.ipynb") and Path(source).is_file()
    assert "The report of mine" in said and (home / "runs" / "mine" / "run.ipynb").exists()


def test_a_run_that_fails_says_why_and_keeps_its_notebook(home, notebook):
    from papermill.exceptions import PapermillExecutionError
    notebook.error = PapermillExecutionError(3, 3, "", "OSError", "[Errno 28] full", [])
    said = command("run mine -p smoke --runs runs", 1)
    assert "mine failed: OSError: [Errno 28] full" in said and "Traceback" not in said
    assert (home / "runs" / "mine" / "run.ipynb").exists() and "The report" not in said


def test_a_run_that_is_stopped_goes_on_another_time(home, notebook):
    notebook.error = KeyboardInterrupt()
    assert "stopped" in command("run mine -p smoke --runs runs", 130)


def small_run(session):
    "What stands behind `run` for the settings of a run of one model."
    folder = session.folder.path
    changes = SMALL | {"run.models": ["jepa"], "data.dir": str(folder.parents[1] / "datasets")}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["run", folder.name, "-p", "smoke", "--runs", folder.parent, *words]


def test_a_finished_run_is_kept(trained, monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", None)
    folder, before = trained.folder.path, (trained.folder.path / "settings.ini").read_bytes()
    said = command(small_run(trained))
    assert "first is finished" in said and "report.html" in said
    refused([*small_run(trained), "--set", "train.steps=9"], "holds another run")
    assert (folder / "settings.ini").read_bytes() == before


def test_runs_are_listed_shown_and_compared(trained, home):
    runs = shutil.copytree(trained.folder.path.parent, home / "runs")
    shutil.copytree(runs / "first", runs / "second")
    assert {"first", "second", "sample", "finished"} <= set(command("runs list --runs runs").split())
    shown = command("runs show first --runs runs")
    assert "train.steps" in shown and "jepa" in shown and "finished" in shown
    assert "None" not in command("compare first second --runs runs --to both.html")
    assert (home / "both.html").stat().st_size > 1000
    assert "report.html" in command("report runs/first")
    refused("compare first secnd --runs runs", "no run", "'second'")
    refused("report nobody", "no run")
    refused("compare first second --runs runs --to both.txt", ".html")


# Deleting

def test_a_run_is_deleted_after_asking(begun):
    line = f"runs delete mine --runs {begun.parent}"
    command(line, input="n\n")
    assert begun.exists()
    assert "Deleted" in command(line, input="y\n") and list(begun.parent.iterdir()) == []
    refused(f"{line} --yes", "no run")


def test_nothing_else_is_deleted(begun):
    runs, outside = begun.parent, begun.parents[1] / "outside"
    begun.rename(outside)
    (runs / "link").symlink_to(outside)
    (runs / "mine").mkdir()
    (runs / "mine" / "settings.ini").touch()
    (runs / "file").touch()
    for name in ("link", "mine", "file", "sample", "../outside", str(outside), "..", "link/"):
        with pytest.raises(RunError): delete_run(name, runs)
    assert outside.exists() and {path.name for path in runs.iterdir()} == {"link", "mine", "file"}


def test_a_run_that_another_process_holds_is_not_deleted(begun):
    code = ("import sys; from pathlib import Path; from worldmodels_nb.runs.claim import hold_run\n"
            "from worldmodels_nb.runs.folder import RunFolder\n"
            "hold_run(RunFolder(Path(sys.argv[1]))); print('held', flush=True); sys.stdin.read()")
    words = [sys.executable, "-c", code, str(begun)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        refused(f"runs delete mine --yes --runs {begun.parent}", "is held by process")
        refused(["run", "mine", "-p", "smoke", "--runs", begun.parent], "held by process")
        other.communicate()
    assert begun.exists() and "Deleted" in command(f"runs delete mine --yes --runs {begun.parent}")
    assert hold_run(RunFolder(begun.parent)) and release_run(RunFolder(begun.parent)) is None


# Grids

def test_all_faults_of_a_grid_are_said_at_once(home):
    grid = home / "grid.yaml"
    text = "name: g\nfixed: {preset: smoke, train.stepz: 3}\naxes: {run.sed: [0, 1]}\n"
    grid.write_text(text, encoding="utf-8")
    said = refused(["batch", grid, "--runs", "runs"], "stepz", "sed")
    assert len(said.splitlines()) >= 2 and not (home / "runs").exists()
    refused("batch nowhere.yaml", "nowhere.yaml")
    refused("report nowhere.yaml", "nowhere.yaml")


def test_a_batch_says_what_it_would_do_and_how_it_went(home, monkeypatch):
    (home / "g.yaml").write_text("name: g\npreset: smoke\naxes: {run.seed: [0, 1]}\n", encoding="utf-8")
    said = command("batch g.yaml --dry-run --runs runs")
    assert "2 runs are to do" in said and not (home / "runs").exists()
    rows = [dict(run=name, status=status, error="", notebook="", seconds=60, values={}, estimate=60)
            for name, status in (("a", "finished"), ("b", "failed"))]
    given = []
    def run(grid, *words, **more):
        given.append((len(grid.cells), *words[:5], more))
        return rows
    monkeypatch.setattr("worldmodels_nb.runs.batch.run_batch", run)
    assert "1 failed" in command("batch g.yaml --runs runs --limit-minutes 3 --retries 0 --again", 1)
    assert given == [(2, home / "runs", "local", 2, 0, 3.0, dict(again=True))]
    rows[1]["status"] = "finished"
    command("batch g.yaml --runs runs")
    assert "report.html" in command("report g.yaml --runs runs")


# Data

def test_data_are_listed_verified_and_looked_at(home):
    assert "sample" in command("data list") and "alignment" in command("data preview sample --to look.png")
    assert (home / "look.png").read_bytes()[:4] == b"\x89PNG"
    assert "ok" in command("data verify sample")
    refused("data preview sample --to look.txt", ".gif or .mp4")
    refused("data verify sampel", "nearest known one is 'sample'")


def test_a_dataset_that_was_altered_makes_the_status_1(home, make_copy):
    path = make_copy / "rewards.npy"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    said = command("data verify mine sample", 1)
    assert "damaged" in said and "ok" in said and "Traceback" not in said


@pytest.fixture
def make_copy(home):
    "A copy of the sample in the folder of datasets."
    return Path(shutil.copytree(sample_dataset().folder, home / "datasets" / "mine"))


def test_there_and_back(home):
    pytest.importorskip("minari")
    assert "film" in command("data export sample rooms.gif --episode 0 --episode 3")
    command("data export sample theirs")
    assert "minari" in command("data import theirs back --dry-run") and not (home / "datasets").exists()
    command("data import theirs back")
    assert open_dataset(home / "datasets" / "back").hash == sample_dataset().hash
    refused("data import theirs back", "there already")
    refused("data import theirs ../back2/..", "there already")
    refused("data export sample rooms.gif", "there already")
    refused("data merge sample back --into both", "more than once")
    assert not (home / "datasets" / "both").exists()


def test_a_table_whose_actions_are_shifted_is_not_taken_in_unasked(home):
    h5py = pytest.importorskip("h5py")
    data = sample_dataset()
    with h5py.File(home / "late.h5", "w") as file:
        file["images"], file["action"] = np.moveaxis(data.frames, 1, -1), np.roll(data.actions, 1, 0)
        file["ep_len"], file["ep_offset"] = data.lengths + 1, data.starts
    line = "data import late.h5 late --column pixels=images"
    refused(line, "shifted by a step")
    assert not (home / "datasets").exists()
    command(f"{line} --actions arrive")
    made = open_dataset(home / "datasets" / "late")
    assert np.array_equal(made.episode(1).actions, data.episode(1).actions)
    refused("data import late.h5 late2", "no column 'pixels'", "images")


# What works here

def test_the_doctor_says_how_to_mend(monkeypatch):
    found = [*doctor.core_findings(), *doctor.machine_findings(), *doctor.extra_findings(),
             *doctor.program_findings()]
    assert all(f.state == "ok" for f in found if f.core) and all(f.mend for f in found if f.state != "ok")
    assert {"extra minari", "extra atari", "git", "device", "run.dir"} <= {f.name for f in found}
    families = {"two rooms": "worldmodels_nb/TwoRooms-v0", "nobody": "Nowhere-v0"}
    monkeypatch.setattr(doctor, "FAMILIES", families)
    fine, failed = doctor.env_findings()
    assert (fine.state, failed.state) == ("ok", "failed") and "(3, 64, 64)" in fine.says
    assert "not a known environment" in failed.says


def test_the_doctor_ends_with_1_where_the_core_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "CORE", ("worldmodels_nb", "a-package-that-is-not-there"))
    said = command("doctor --no-envs", 1)
    assert "pip install a-package-that-is-not-there" in said and "broken" in said


def test_the_program_itself(tmp_path):
    "The console script, in a folder of its own, without a terminal."
    program = Path(sys.executable).with_name("worldmodels")
    if not program.exists(): pytest.skip("the package is not installed")
    def say(*words):
        done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout, done.stderr
    status, out, _ = say("data", "verify", "sample")
    assert status == 0 and "tworooms" in out
    status, out, error = say("run", "mine", "--set", "train.stepz=1")
    assert (status, out) == (2, "") and "train.steps" in error and "Traceback" not in error
    assert len(error.splitlines()) == 1 and list(tmp_path.iterdir()) == []
