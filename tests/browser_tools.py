"What the browser tests share: a JupyterLab of its own on a copy of the repository, and words to drive it."

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS = [
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="no playwright: pip install playwright (extra: dev)",
    ),
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: apt-get install --no-install-recommends chromium fonts-liberation",
    ),
]
PATIENCE = 300  # seconds; machines are busy
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url):
    with urllib.request.urlopen(url, timeout=30) as answer: return json.load(answer)


def wait_for(condition, what, server):
    "Poll the server until it says so; a server that has died is not waited for."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended with {server.returncode} while waiting for {what}"
        try:
            if found := condition(): return found
        except (urllib.error.URLError, ConnectionError, TimeoutError): pass
        time.sleep(0.2)
    pytest.fail(f"waited {PATIENCE} s for {what}")


def copy_repository(folder):
    "The notebooks, and what makes their folder a repository of ours, committed to git."
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", ".gitignore"): shutil.copy(ROOT / name, folder)
    for name in ("sample", "presets", "study"): shutil.copytree(ROOT / "data" / name, folder / "data" / name)
    shutil.copytree(ROOT / "figures", folder / "figures")
    git(folder, "init", "--quiet")
    git(folder, "add", "nbs")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
    return folder


def start_lab(repository, home):
    "A server on loopback that serves and saves as `make lab` does, without a token: its address and process."
    port, folders = free_port(), {name: home / name.lower() for name in FOLDERS}
    for folder in folders.values(): folder.mkdir(parents=True)
    shutil.copy(ROOT / "jupyter_server_config.py", folders["JUPYTER_CONFIG_DIR"])
    # cells out of sight are on the page, too
    shown = folders["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab" / "notebook-extension"
    shown.mkdir(parents=True)
    (shown / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    words = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token=",
             "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={repository}",
             "--LabApp.default_url=/lab/tree/nbs/8_explore/80_start.ipynb"]
    own = {name: str(folder) for name, folder in folders.items()}
    own |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home), "MPLBACKEND": "agg"}
    with (home / "lab.log").open("w") as log:
        return f"http://127.0.0.1:{port}", subprocess.Popen(
            words, cwd=repository, stdout=log, stderr=log, env=os.environ | own)


def open_notebook(page, lab, path):
    "Show a notebook alone, and wait until its kernel has said what it is."
    url, server = lab
    page.goto(f"{url}/lab/tree/{path}?reset")  # and no tab from before
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function("path => window.jupyterapp.shell.currentWidget?.context?.path === path", arg=path)
    return wait_for(lambda: idle_kernel(url, path), f"a kernel for {path}", server)


def idle_kernel(url, path):
    "The session of a notebook whose kernel waits for work."
    sessions = [s for s in ask(f"{url}/api/sessions") if s["path"].endswith(path)]
    return [s for s in sessions if s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"]


def command(page, name):
    return page.evaluate("name => window.jupyterapp.commands.execute(name)", name)


def last_count(page):
    "How many cells had been run when the notebook's last one was; 0 before."
    return page.evaluate("""() => {
        const cells = window.jupyterapp.shell.currentWidget.content.widgets;
        return cells.findLast(cell => cell.model.type === 'code').model.executionCount ?? 0; }""")


def run_all(page, lab, path):
    "Run all cells, and wait until the last one has been."
    before = last_count(page)
    command(page, "notebook:run-all-cells")
    wait_for(lambda: last_count(page) > before, f"the last cell of {path}", lab[1])
    wait_for(lambda: idle_kernel(lab[0], path), f"{path} to come to rest", lab[1])


def what_went_wrong(page):
    "Texts of the errors and of what was written to stderr, on the page."
    kinds = ("error", "stderr")
    found = [f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']" for kind in kinds]
    return page.locator(", ".join(found)).all_inner_texts()
