"JupyterLab in a real browser: a walk through V-JEPA 2, a mask drawn by keyboard, saving without an edit."

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

import nbformat
import pytest

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("playwright") is None,
        reason="no playwright: pip install playwright (extra: dev)",
    ),
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="no Chromium: apt-get install --no-install-recommends chromium fonts-liberation",
    ),
]
WALK = "8_explore/82_vjepa2.ipynb"
PATIENCE = 300  # seconds; machines are busy
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def wait_for(condition, what, server):
    "Poll the server until it says so; a server that has died is not waited for."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert server.poll() is None, f"JupyterLab ended with {server.returncode} while waiting for {what}"
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.2)
    pytest.fail(f"waited {PATIENCE} s for {what}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    "A copy of the notebooks and of what makes their folder a repository of ours, committed to git."
    folder = tmp_path_factory.mktemp("a copy")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").symlink_to(ROOT / "data")  # the sample
    git(folder, "init", "--quiet")
    git(folder, "add", "nbs")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all")
    return folder


@pytest.fixture(scope="module")
def lab(repository, tmp_path_factory):
    "A JupyterLab of its own on the copy, on loopback and saving as make lab does; always stopped."
    notebooks, home, port = repository / "nbs", tmp_path_factory.mktemp("home"), free_port()
    folders = {
        name: home / name.lower()
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "IPYTHONDIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    (folders["JUPYTER_CONFIG_DIR"] / "labconfig").mkdir()
    (folders["JUPYTER_CONFIG_DIR"] / "labconfig" / "page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    shutil.copy(ROOT / "jupyter_server_config.py", folders["JUPYTER_CONFIG_DIR"])
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--allow-root",
            "--IdentityProvider.token=",
            "--LabApp.expose_app_in_browser=True",
            f"--ServerApp.root_dir={notebooks}",
        ],
        cwd=notebooks,
        stdout=log,
        stderr=log,
        env=os.environ
        | {name: str(folder) for name, folder in folders.items()}
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home)},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: ask(f"{url}/api/status"), "the server", server)
        yield url, server
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


@pytest.fixture
def page():
    "A page of a headless Chromium with a fresh profile; always closed."
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        try:
            page = browser.new_page(viewport=dict(width=1300, height=20_000))  # tall: every cell is rendered
            page.set_default_timeout(PATIENCE * 1000)
            yield page
        finally:
            browser.close()


def open_notebook(page, lab, path):
    "Show a notebook, and wait until its kernel has said what it is."
    url, server = lab
    page.goto(f"{url}/lab/tree/{path}?reset")  # and no tab from before
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    return wait_for(lambda: idle_kernel(url, path), f"a kernel for {path}", server)


def idle_kernel(url, path):
    "The session of a notebook whose kernel waits for work."
    sessions = [s for s in ask(f"{url}/api/sessions") if s["path"].endswith(path)]
    return [s for s in sessions if s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"]


def command(page, name):
    return page.evaluate("name => window.jupyterapp.commands.execute(name)", name)


def metadata(page):
    "What the page holds as the open notebook's metadata."
    return page.evaluate("() => window.jupyterapp.shell.currentWidget.model.sharedModel.getMetadata()")


# Prose and pictures, a page of tables, parameters that are tagged, widgets, a chapter that is exported
UNTOUCHED = [
    "index.ipynb",
    "9_reference/91_settings_reference.ipynb",
    "7_run/70_run_experiment.ipynb",
    "6_widgets/61_masks.ipynb",
    "0_data/02_tworooms.ipynb",
]


@pytest.mark.parametrize("path", UNTOUCHED)
def test_saving_without_an_edit_changes_nothing(lab, repository, page, path):
    open_notebook(page, lab, path)
    wait_for(lambda: "language_info" in metadata(page), "the kernel's language", lab[1])
    before = (repository / "nbs" / path).stat().st_mtime_ns
    command(page, "docmanager:save")
    wait_for(lambda: (repository / "nbs" / path).stat().st_mtime_ns > before, "the save", lab[1])
    assert git(repository, "status", "--porcelain", "nbs") == ""


def test_the_walk_in_jupyterlab(lab, repository, page):
    from playwright.sync_api import expect

    walk = nbformat.read(repository / "nbs" / WALK, as_version=4)
    for cell in walk.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # what will be on the page has been computed there
    nbformat.write(walk, repository / "nbs" / WALK)
    open_notebook(page, lab, WALK)
    command(page, "notebook:run-all-cells")
    expect(page.locator(".jp-OutputArea-output", has_text="the walk is complete")).to_be_visible()
    wait_for(lambda: idle_kernel(lab[0], WALK), "the last cell", lab[1])
    for kind in ("error", "stderr"):
        said = page.locator(f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']")
        assert said.count() == 0

    masks = page.locator(".wm-MaskExplorer")
    image, handle = masks.locator("img.wm-image"), masks.locator(".wm-seed .noUi-handle")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth > 100")
    before = image.get_attribute("src")
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(image).not_to_have_attribute("src", before)
    expect(masks.locator(".wm-seed .widget-readout")).to_have_text("1")
