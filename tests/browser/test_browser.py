"JupyterLab in a real browser: saving without an edit, and the walk through V-JEPA 2."

import nbformat
import pytest
from browser_tools import NEEDS, command, git, open_notebook, run_all, wait_for, what_went_wrong

pytestmark = NEEDS
WALK = "nbs/8_explore/82_vjepa2.ipynb"


def metadata(page):
    "What the page holds as the open notebook's metadata."
    return page.evaluate("() => window.jupyterapp.shell.currentWidget.model.sharedModel.getMetadata()")


# Prose and pictures, a page of tables, parameters that are tagged, widgets, a chapter that is exported
UNTOUCHED = [
    "nbs/index.ipynb",
    "nbs/9_reference/91_settings_reference.ipynb",
    "nbs/7_run/70_run_experiment.ipynb",
    "nbs/6_widgets/61_masks.ipynb",
    "nbs/0_data/02_tworooms.ipynb",
]


@pytest.mark.parametrize("path", UNTOUCHED)
def test_saving_without_an_edit_changes_nothing(lab, repository, page, path):
    open_notebook(page, lab, path)
    wait_for(lambda: "language_info" in metadata(page), "the kernel's language", lab[1])
    before = (repository / path).stat().st_mtime_ns
    command(page, "docmanager:save")
    wait_for(lambda: (repository / path).stat().st_mtime_ns > before, "the save", lab[1])
    assert git(repository, "status", "--porcelain", "nbs") == ""


def test_the_walk_in_jupyterlab(lab, repository, page):
    from playwright.sync_api import expect

    walk = nbformat.read(repository / WALK, as_version=4)
    for cell in walk.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None  # what will be on the page has been computed there
            cell.source = cell.source.replace("share: float = 1.0", "share: float = 0.02")  # short trainings
    nbformat.write(walk, repository / WALK)
    open_notebook(page, lab, WALK)
    for _ in range(2):
        run_all(page, lab, WALK)
        assert what_went_wrong(page) == []
        expect(page.locator(".jp-OutputArea-output", has_text="the walk is complete")).to_be_visible()

    masks = page.locator(".wm-MaskExplorer")
    image, handle = masks.locator("img.wm-image"), masks.locator(".wm-seed .noUi-handle")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth > 100")
    before = image.get_attribute("src")
    handle.focus()
    page.keyboard.press("ArrowRight")
    expect(image).not_to_have_attribute("src", before)
    expect(masks.locator(".wm-seed .widget-readout")).to_have_text("1")
