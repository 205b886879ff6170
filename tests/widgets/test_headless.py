"Notebooks to play with, run by papermill: small, whole, and with a still picture for each widget."
from pathlib import Path

import papermill
import pytest

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = sorted((ROOT / "nbs" / "8_explore").glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
SHORT = {"82_vjepa2": dict(share=0.02)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_headless_run_is_small_and_shows_what_the_widgets_would(tmp_path, monkeypatch, path):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)                                      # the kernel starts in the caller's folder
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = papermill.execute_notebook(path, here / path.name, parameters=SHORT.get(path.stem, {}),
                                          progress_bar=False, execution_timeout=300, start_timeout=300)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bad = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not bad
    data = [output.get("data", {}) for output in outputs]
    shown = ["image" if "image/png" in each else "widget" if WIDGET in each else "" for each in data]
    before = [shown[:k] for k, kind in enumerate(shown) if kind == "widget"]
    assert all("image" in earlier for earlier in before) and "image" in shown
    assert (here / path.name).stat().st_size <= 300_000
    assert [file.name for file in here.iterdir()] == [path.name]  # and nothing else is left behind
