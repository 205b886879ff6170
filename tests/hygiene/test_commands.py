"Commands of the Makefile: names they take and refuse, what they do again, and how Lab is started and saves."
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
SAYS = '#!/bin/sh\nprintf "<%s>" "$(basename "$0")" "$@"\necho\n'


FROM_MAKE = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "RUN", "PRESET")  # tests may be run by make themselves


@pytest.fixture
def make(tmp_path):
    "The Makefile in a folder of its own; programs of the environment only say what they were asked."
    folder = tmp_path / "a folder's name"
    tools = folder / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("papermill", "python", "id"):
        (tools / name).write_text(SAYS, encoding="utf-8")
        (tools / name).chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    def run(*words, **env):
        command = ["make", "--old-file=.venv/core", *words]
        outside = {name: value for name, value in os.environ.items() if name not in FROM_MAKE}
        return subprocess.run(command, cwd=folder, env=outside | env, capture_output=True, text=True)
    run.folder = folder
    return run


def calls(process): return [line[1:-1].split("><") for line in process.stdout.splitlines() if line[:1] == "<"]


ODD = ["my run", "it's", 'a"b', "a$b", "$(shell touch gone)", "a;touch gone", "`touch gone`", "a/b", "..",
       "-p", "", "ü", "a\\b", "*", "~", "#", "a&b", "n" * 300]


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_none_is_refused_before_anything_runs(make, name):
    for process in (make("run", f"RUN={name}"), make("run", RUN=name)):
        assert process.returncode == 2 and len(process.stdout.splitlines()) == 1, process.stdout
        assert process.stdout.startswith("RUN") and " take " in process.stdout
    assert sorted(p.name for p in make.folder.iterdir()) == [".venv", "Makefile"]


@pytest.mark.parametrize("name", ["mine", "3", "1e5", "null", "a.b-c_D", "n" * 100])
def test_a_name_arrives_as_it_is_written(make, name):
    experiment, report = calls(make("run", f"RUN={name}", "PRESET=$(shell touch gone) a'b"))
    assert experiment[-6:] == ["-r", "run", name, "-r", "preset", "$(shell touch gone) a'b"]
    assert report[-3:] == ["-r", "run", name] and not (make.folder / "gone").exists()


@pytest.mark.parametrize("state", ["", "running", "failed", "finished"])
def test_a_run_goes_on_where_it_is(make, state):
    programs = ["70_run_experiment", "71_run_report"][state == "finished":]
    run = make.folder / "data" / "runs" / "demo"
    run.mkdir(parents=True)
    if state: (run / "status.json").write_text(f'{{"state": "{state}"}}', encoding="utf-8")
    assert [Path(words[1]).stem for words in calls(make("demo"))] == programs
    (run / "report.html").touch()
    assert calls(make("demo")) == [] and "finished" in make("demo").stdout


@pytest.mark.parametrize(("user", "allowed"), [("0", True), ("1000", False), ("10", False)])
def test_lab_is_started_for_root_too(make, user, allowed):
    (make.folder / ".venv" / "bin" / "id").write_text(f"#!/bin/sh\necho {user}\n", encoding="utf-8")
    path = f"{make.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    (words,) = calls(make("lab", PATH=path))
    assert ("--allow-root" in words) == allowed
    assert "--ip=127.0.0.1" in words and not [word for word in words if "token" in word or "password" in word]


def answers(url):
    "Whether a server answers within a minute; it says where it is a moment before it listens."
    for _ in range(120):
        try: return urllib.request.urlopen(url, timeout=60).status == 200
        except urllib.error.URLError: time.sleep(.5)
    return False


def test_lab_says_where_it_is_though_the_port_is_taken_and_no_browser_there(tmp_path):
    env = os.environ | {"HOME": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path), "BROWSER": "true"}
    command = ["make", "lab", "--old-file=.venv/core", f"BIN={Path(sys.executable).parent}"]
    kept = dict(cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with socket.socket() as taken:
        try: taken.bind(("127.0.0.1", 8888))
        except OSError: pass  # somebody else has it: as good
        taken.listen()
        lab = subprocess.Popen(command, **kept)
        try:
            page = "lab/tree/nbs/8_explore/80_start.ipynb"
            said = (re.search(rf"http://127\.0\.0\.1:(\d+)/{page}\?token=(\w+)", line) for line in lab.stderr)
            port, token = next(found for found in said if found).groups()
            assert port != "8888" and answers(f"http://127.0.0.1:{port}/api/status?token={token}")
        finally:
            os.killpg(lab.pid, signal.SIGKILL)
            lab.communicate()


pytestmark = pytest.mark.filterwarnings("ignore:Overriding existing pre_save_hook")  # it is set twice


@pytest.fixture(scope="module")
def save():
    "Save as JupyterLab does: the kernel's name and language are in the notebook."
    configuration = SimpleNamespace(ContentsManager=SimpleNamespace())
    runpy.run_path(str(ROOT / "jupyter_server_config.py"), {"c": configuration})
    hook = configuration.ContentsManager.pre_save_hook
    language = dict(name="python", version="3.99", mimetype="text/x-python", file_extension=".py",
                    codemirror_mode=dict(name="ipython", version=3), pygments_lexer="ipython3")
    kernel = dict(display_name="Python 3 (ipykernel)", language="python", name="python3")
    def run(folder, path):
        manager = LargeFileManager(root_dir=str(folder), pre_save_hook=hook)
        model = manager.get(path)
        if model["type"] == "notebook":
            model["content"]["metadata"] |= dict(kernelspec=kernel, language_info=language)
            for cell in model["content"]["cells"]: cell["metadata"]["trusted"] = True
        manager.save(model, path)
    return run


def copy_to(folder, path, project="pyproject.toml"):
    "A notebook in a folder that looks like the repository."
    target = folder / path.relative_to(ROOT)
    target.parent.mkdir(parents=True)
    shutil.copy(path, target)
    shutil.copy(ROOT / project, folder / "pyproject.toml")
    return target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_saved_without_an_edit_is_the_same_bytes(tmp_path, save, path):
    target = copy_to(tmp_path, path)
    save(tmp_path / "nbs", target.relative_to(tmp_path / "nbs").as_posix())
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("served", [".", "nbs/7_run", ".."])
def test_it_is_the_same_wherever_lab_is_started(tmp_path, save, served):
    path = ROOT / "nbs" / "7_run" / "70_run_experiment.ipynb"
    folder = tmp_path / "repository"
    target = copy_to(folder, path)
    save(folder / served, target.relative_to((folder / served).resolve()).as_posix())
    assert target.read_bytes() == path.read_bytes()


def test_notebooks_of_others_are_saved_as_they_are(tmp_path, save):
    target = copy_to(tmp_path, NOTEBOOKS[0])
    project = (tmp_path / "pyproject.toml").read_text(encoding="utf-8")
    theirs = project.replace('name = "worldmodels_nb"', 'name = "theirs"')
    others = {"other": theirs, "none": None, "old": None}
    for name, text in others.items():
        (tmp_path / name / "nbs").mkdir(parents=True)
        shutil.copy(target, tmp_path / name / "nbs" / "a.ipynb")
        if text: (tmp_path / name / "pyproject.toml").write_text(text, encoding="utf-8")
    (tmp_path / "old" / "settings.ini").write_text("[DEFAULT]\nlib_name = old\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").unlink()
    for name in others:
        save(tmp_path, f"{name}/nbs/a.ipynb")
        saved = nbformat.read(tmp_path / name / "nbs" / "a.ipynb", as_version=4)
        assert saved.metadata.language_info.version == "3.99", name


def test_a_run_and_a_text_file_are_saved_as_they_are(tmp_path, save):
    copy_to(tmp_path, NOTEBOOKS[0])
    run = tmp_path / "data" / "runs" / "mine" / "run.ipynb"
    run.parent.mkdir(parents=True)
    shutil.copy(NOTEBOOKS[0], run)
    (tmp_path / "nbs" / "a.txt").write_text("a", encoding="utf-8")
    save(tmp_path, "data/runs/mine/run.ipynb")
    save(tmp_path, "nbs/a.txt")
    assert "language_info" in nbformat.read(run, as_version=4).metadata
    assert (tmp_path / "nbs" / "a.txt").read_text(encoding="utf-8") == "a"
