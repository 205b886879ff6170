"The wheel, installed alone and used from another folder: its own defaults, runs in the folder one is in."
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from run_tools import SMALL

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)
BUILDS_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "settings.ini", "data",
               "nbs", "worldmodels_nb", "tests")
BEGIN = "from pathlib import Path\nimport worldmodels_nb\nhome = Path(worldmodels_nb.__file__).parents[1]\n"


def python(*words, **more):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **more)


def done(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A wheel, made offline by way of a source archive, in a copy that an earlier version was built in."
    source, out = (tmp_path_factory.mktemp(name) for name in ("source code", "out"))
    for name in BUILDS_FROM:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, source / name, dirs_exist_ok=True)
        else: shutil.copy(ROOT / name, source)
    before = sorted(source.rglob("*"))
    stale = source / "build" / "lib" / "worldmodels_nb" / "retired.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("raise ImportError\n", encoding="utf-8")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done(python("-c", code, out, cwd=source))
    done(python("-m", "pip", "wheel", source, *offline, out))
    done(python("-m", "pip", "wheel", next(out.glob("*.tar.gz")), *offline, out / "again"))
    made = [path for path in source.rglob("*") if path not in before and "egg-info" not in str(path)]
    assert {path.relative_to(source).parts[0] for path in made} <= {"build"}, "left in the source"
    return next(out.glob("*.whl"))


def names(wheel): return sorted(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The folder that the wheel is in; what it depends on is in the environment of the tests."
    folder = tmp_path_factory.mktemp("installed")
    done(python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", folder, built))
    return folder


@pytest.fixture
def elsewhere(installed, tmp_path):
    "Run code in a folder, with a home of its own, by the installed package."
    (tmp_path / "home").mkdir()
    def run(code, folder):
        code = BEGIN + f"assert home == Path({str(installed)!r}), home\n" + code
        own = {"PYTHONPATH": str(installed), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        return done(python("-c", code, cwd=folder, env=os.environ | own)).splitlines()
    return run


def test_the_wheel_is_the_package_and_its_defaults(built):
    package = [p for p in (ROOT / "worldmodels_nb").rglob("*.py")]
    data = [p for name in ("presets", "sample") for p in (ROOT / "data" / name).rglob("*") if p.is_file()]
    defaults = [ROOT / "settings.ini", *data, ROOT / "nbs" / "7_run" / "70_run_experiment.ipynb"]
    kept = [p.relative_to(ROOT).as_posix() for p in package]
    kept += [f"worldmodels_nb/defaults/{p.relative_to(ROOT).as_posix()}" for p in defaults]
    assert [name for name in names(built) if ".dist-info/" not in name] == sorted(kept)
    with zipfile.ZipFile(built) as wheel:
        for path in defaults:
            name = f"worldmodels_nb/defaults/{path.relative_to(ROOT).as_posix()}"
            assert wheel.read(name) == path.read_bytes(), name


def test_a_wheel_made_from_the_source_archive_is_the_same(built):
    assert names(next((built.parent / "again").glob("*.whl"))) == names(built)


def test_what_every_import_needs_is_asked_for():
    "What modules import at their top is a dependency, comes with one, or with Python."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {re.match(r"[\w-]+", asked)[0].lower() for asked in project["dependencies"]}
    known |= {"worldmodels_nb", "pil", "ipython", "traitlets", "psutil", "yaml", "nbformat"}  # come along
    known |= {*sys.stdlib_module_names}
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "worldmodels_nb").rglob("*.py"))
    found = re.findall(r"^(?:from (\w+)[\w.]* import|import ([\w., ]+))", text, re.M)
    tops = {name.split()[0].split(".")[0] for one, many in found for name in (one or many).split(",")}
    assert {name for name in tops if name.lower() not in known} == set()


def another_project(folder):
    "Somebody else's nbdev project, of the old kind and the new."
    (folder / "nbs").mkdir()
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_name = theirs\n", encoding="utf-8")
    (folder / "pyproject.toml").write_text("[project]\nname = 'theirs'\n[tool.nbdev]\n", encoding="utf-8")


def another_repository(folder):
    "Somebody else's git repository, with a commit that is no commit of ours."
    name = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init"], [*name, "commit", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def own_data(folder):
    "A folder whose data and presets mean something else."
    (folder / "data" / "presets").mkdir(parents=True)
    (folder / "data" / "presets" / "smoke.ini").write_text("[train]\nsteps = -1\n", encoding="utf-8")
    (folder / "settings.ini").write_text("nothing = that = we know", encoding="utf-8")


def nothing(folder): "An empty folder."


def tour(of="A ten-line tour"):
    "The code of a section of the README."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {of}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.S))


ALL = [nothing, another_project, another_repository, own_data]
RUN = f"""
from worldmodels_nb.runs.experiment import run_experiment
from worldmodels_nb.runs.folder import resolve
from worldmodels_nb.runs.report import write_report
settings = resolve("smoke", models=["jepa"], overrides={SMALL!r})
print(write_report(run_experiment("mine", settings, progress=False).folder.path))
"""


def test_the_tour_and_a_run_in_a_folder_full_of_other_things(elsewhere, tmp_path):
    folder = tmp_path / "a folder of mine"
    folder.mkdir()
    for furnish in ALL: furnish(folder)
    report = elsewhere(tour() + RUN, folder)[-1]
    assert Path(report) == folder / "data" / "runs" / "mine" / "report.html" and Path(report).is_file()
    assert {p.name for p in (folder / "data").iterdir()} - {"presets"} == {"datasets", "runs"}


def test_no_folder_is_taken_for_ours(elsewhere, tmp_path):
    code = """
import os, sys
from worldmodels_nb.runs.folder import provenance
from worldmodels_nb.settings import Settings, load_settings, read_presets, repo_root, shipped
for folder in sorted(Path.cwd().iterdir()):
    os.chdir(folder)
    settings = load_settings(preset="seed") and load_settings()
    print(repo_root() == folder, settings == Settings(), shipped("settings.ini").is_relative_to(home),
          provenance(settings)["commit"])
"""
    place = tmp_path / "place"
    for furnish in ALL:
        (place / furnish.__name__).mkdir(parents=True)
        furnish(place / furnish.__name__)
    assert elsewhere(code, place) == ["True True True None"] * len(ALL)


def test_what_the_readme_says_of_the_package_alone(elsewhere, tmp_path):
    elsewhere(tour("Without the repository"), tmp_path)
    assert (tmp_path / "data" / "runs" / "mine" / "report.html").is_file()


MAZE = """
import gymnasium
from worldmodels_nb.data.tworooms import TwoRoomsEnv
class Maze(TwoRoomsEnv): pass
gymnasium.register("Maze-v0", "mine:Maze")
"""


def test_an_environment_of_ones_own_in_processes_of_their_own(elsewhere, tmp_path):
    (tmp_path / "mine.py").write_text(MAZE, encoding="utf-8")
    changes = SMALL | {"env.id": "mine:Maze-v0", "collect.workers": 2}
    code = f"""
from worldmodels_nb.data.datasets import make_dataset
from worldmodels_nb.settings import load_settings
print(len(make_dataset(load_settings(preset="smoke", overrides={changes!r}), progress=False)))
"""
    assert elsewhere(code, tmp_path)[-1] == str(SMALL["collect.episodes"])


def test_runs_are_where_one_says(elsewhere, tmp_path):
    wanted = {"data/runs": tmp_path / "data" / "runs", "~/runs": tmp_path / "home" / "runs",
              "/a/b": Path("/a/b"), "mine, all": tmp_path / "mine, all", "../up": tmp_path / ".." / "up"}
    code = f"""
from worldmodels_nb.runs.folder import resolve, run_path
for where in {list(wanted)!r}:
    settings = resolve("smoke", overrides={{"run.dir": where}})
    print(run_path("mine", settings.run.dir))
"""
    found = [Path(line).resolve() for line in elsewhere(code, tmp_path)]
    assert found == [(path / "mine").resolve() for path in wanted.values()]


@pytest.mark.skipif(os.getuid() == 0, reason="no folder is read-only for root")
def test_a_folder_that_cannot_be_written_is_one_sentence(elsewhere, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    lines = RUN.splitlines()[:-1]
    lines += ["try: run_experiment('mine', settings, progress=False)",
              "except (OSError, ValueError) as error: print(type(error).__name__, error)"]
    (said,) = elsewhere("\n".join(lines), folder)
    assert str(folder) in said and said.split()[0] not in ("PermissionError", "OSError")


def test_the_readme_tour_has_code(): assert "open_run(" in tour() and len(tour().splitlines()) > 8


def test_the_command_of_the_installed_package(installed, tmp_path):
    "A run by the program that the wheel brings, with its notebook; the repository is not there."
    home = {"PYTHONPATH": str(installed), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    program = installed / "bin" / "worldmodels"
    changes = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    def command(*words): return python(program, *words, cwd=tmp_path, env=os.environ | home)
    changes += ["--set", "run.models=[jepa]"]
    assert "report.html" in done(command("run", "mine", "-p", "smoke", *changes))
    run = tmp_path / "data" / "runs" / "mine"
    assert (run / "run.ipynb").is_file() and (run / "report.html").is_file()
    assert "mine" in done(command("runs", "list"))
    wrong = command("report", "another")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
