"The notebooks that use the widgets run headless: the walk through V-JEPA 2."
from pathlib import Path

import papermill

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)


def test_the_walk_runs_headless(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                   # the kernel starts in the caller's folder
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = papermill.execute_notebook(
        ROOT / "nbs" / "8_explore" / "82_vjepa2.ipynb", tmp_path / "walk.ipynb",
        progress_bar=False, execution_timeout=300, start_timeout=300)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bad = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not bad
    assert notebook.cells[-1].outputs[0].text.strip() == "the walk is complete"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert (tmp_path / "walk.ipynb").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"walk.ipynb"}
