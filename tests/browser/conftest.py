"One JupyterLab for all browser tests, always stopped; a fresh page for each."

import subprocess

import pytest
from browser_tools import CHROMIUM, PATIENCE, QUIET, ask, copy_repository, start_lab, wait_for

FAILED = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    "Fixtures are told that a test has failed while they can still look at it."
    report = yield
    if report.failed: item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def repository(tmp_path_factory): return copy_repository(tmp_path_factory.mktemp("a copy"))


@pytest.fixture(scope="session")
def lab(repository, tmp_path_factory):
    "Its address, and its process."
    url, server = start_lab(repository, tmp_path_factory.mktemp("home"))
    try:
        wait_for(lambda: ask(f"{url}/api/status"), "the server", server)
        yield url, server
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def chromium():
    "For the tests of one file: while it is there, its event loop runs in this thread, and no other may."
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request, tmp_path):
    "A page with a fresh profile that notes what it complains of and whom it asks; a picture if a test fails."
    page = chromium.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(PATIENCE * 1000)
    page.complaints, page.asked = [], set()
    page.on("console", lambda said: said.type == "error" and page.complaints.append(said.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.asked.add(request.url))
    yield page
    if FAILED in request.node.stash: page.screenshot(path=tmp_path / "failed.png")
    page.close()
