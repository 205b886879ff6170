"The notebooks that use the widgets run headless: the walk through V-JEPA 2."
import copy
from pathlib import Path

import nbformat
import papermill

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)


def walk_twice():
    "The walk, and once more in the same kernel, there with the trained sample's weights."
    walk = nbformat.read(ROOT / "nbs" / "8_explore" / "82_vjepa2.ipynb", as_version=4)
    again = copy.deepcopy(walk.cells)
    for cell in again:
        cell.id, cell.metadata = f"again-{cell.id}", {}
        cell.source = cell.source.replace("use_sample: bool = False", "use_sample: bool = True")
    return nbformat.v4.new_notebook(cells=walk.cells + again, metadata=walk.metadata)


def test_the_walk_runs_headless_and_again_with_the_samples_weights(tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)                                       # the kernel starts in the caller's folder
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbformat.write(walk_twice(), tmp_path / "twice.ipynb")
    notebook = papermill.execute_notebook(
        tmp_path / "twice.ipynb", here / "walk.ipynb", parameters=dict(share=0.02), progress_bar=False,
        execution_timeout=300, start_timeout=300)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    bad = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not bad
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    ends = [cell for cell in code if "the walk is complete" in cell.source]
    assert [cell.outputs[0].text.strip() for cell in ends] == ["the walk is complete"] * 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 40
    assert {path.name for path in here.iterdir()} == {"walk.ipynb"}
