"Widgets without a browser: pictures depend on the state alone, controls redraw them, what cannot be drawn is said in a sentence. And the walk through V-JEPA 2 runs headless."
import random
from pathlib import Path

import ipywidgets
import nbformat
import papermill
import pytest
import torch

from worldmodels_nb.data.datasets import sample_dataset
from worldmodels_nb.training.fit import LossTerms, Trainable
from worldmodels_nb.settings import TrainingSettings, repo_root
from worldmodels_nb.training.fit import fit
from worldmodels_nb.viz import png_bytes
from worldmodels_nb.widgets.training import LiveCurves
from worldmodels_nb.widgets.masks import MaskExplorer
from worldmodels_nb.widgets.rollouts import RolloutStepper
from worldmodels_nb.widgets.base import View

ROOT = repo_root(Path(__file__).parent)
CLIP = torch.from_numpy(sample_dataset().frames[:4].copy())


def masks(): return MaskExplorer(CLIP, grid=(2, 4, 4), share=0.35)


def stepper(): return RolloutStepper({"truth": CLIP, "prediction": CLIP.flip(0)})


def live():
    view = LiveCurves("term")
    for step in (1, 2, 3): view.tell(step, {"error": 1 / step})
    return view


@pytest.mark.parametrize("make", [masks, stepper, live])
def test_a_picture_depends_on_its_state_alone(make):
    view, other = make(), make()
    torch.manual_seed(5), random.seed(5)                         # nothing global is drawn from
    again = png_bytes(view.render(view.state))
    assert view.image.value == again == png_bytes(other.render(dict(view.state)))
    generator = torch.get_rng_state()
    view.render(view.state)
    assert torch.equal(generator, torch.get_rng_state())


def test_rendering_changes_no_widget():
    view = masks()
    before = view.image.value, view.state
    view.render(view.state | dict(masking="tubes", seed=9))
    assert (view.image.value, view.state) == before


@pytest.mark.parametrize("make, name, value", [(masks, "masking", "random"), (masks, "share", 0.75), (masks, "blocks", 1), (masks, "seed", 1), (stepper, "step", 2)])
def test_a_control_redraws_the_picture_and_back(make, name, value):
    view = make()
    before, old = view.image.value, view.controls[name].value
    view.controls[name].value = value
    assert view.image.value != before and view.image.value == png_bytes(view.render(view.state)) and view.said.value == ""
    view.controls[name].value = old
    assert view.image.value == before


def test_every_control_and_part_can_be_found_by_its_class():
    view = masks()
    assert {"wm-view", "wm-MaskExplorer"} <= set(view.box._dom_classes) and "wm-image" in view.image._dom_classes and "wm-said" in view.said._dom_classes
    assert all(f"wm-{name}" in control._dom_classes for name, control in view.controls.items())


def test_what_cannot_be_drawn_is_said_and_the_picture_stays():
    view = masks()
    before = view.image.value
    view.controls["share"].value = 0.95                          # a rectangle of nearly all of the frame
    assert "lower vjepa2.pretrain.scales" in view.said.value and "\n" not in view.said.value and "Traceback" not in view.said.value
    assert view.image.value == before
    view.controls["share"].value = 0.5
    assert view.said.value == "" and view.image.value != before


def test_a_grid_that_does_not_fit_the_clip_is_no_traceback():
    view = MaskExplorer(CLIP, grid=(3, 5, 5))
    assert "does not divide a clip of (4, 64, 64)" in view.said.value and view.image.value == b""


def test_errors_in_the_code_are_not_hidden():
    class Broken(View):
        def render(self, state): return {}["nothing"]
    with pytest.raises(KeyError): Broken()


def test_what_is_said_is_text_and_not_markup():
    class Loud(View):
        def render(self, state): raise ValueError("<script>alert(1)</script>\nsecond line")
    assert Loud().said.value == "&lt;script&gt;alert(1)&lt;/script&gt; second line"


def test_a_view_shows_its_box_and_says_what_it_is_where_there_are_no_widgets():
    view = stepper()
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.box.model_id
    assert bundle["text/plain"] == "RolloutStepper: run this notebook in JupyterLab to use it"
    assert isinstance(view.box, ipywidgets.VBox)


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="one length"): RolloutStepper({"truth": CLIP, "prediction": CLIP[:2]})


def test_live_curves_follow_a_training():
    class Parabola(Trainable):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.ones(1))
        def loss(self, batch): return LossTerms(self.x.square().sum(), dict(height=self.x.detach().square().sum(), other=self.x.detach().sum()))
    class Nothing:
        def to(self, device): return self
    view, pictures = LiveCurves("term", ["height"], every=2), []
    view.image.observe(lambda change: pictures.append(change["new"]), "value")
    fit(Parabola(), lambda step: Nothing(), TrainingSettings(steps=5), [view])
    assert [step for step, _ in view.rows] == [2, 4, 5] and all(list(values) == ["height"] for _, values in view.rows)
    assert len(set(pictures)) == 3 and view.rows[-1][1]["height"] < 1


def test_nothing_below_number_60_imports_a_widget():
    for path in sorted((ROOT / "nbs").glob("[0-5]*.ipynb")):
        code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        assert "ipywidgets" not in code and "worldmodels_nb.widgets" not in code, path.name


def test_the_walk_runs_headless(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                   # the kernel starts in the caller's folder
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = papermill.execute_notebook(ROOT / "nbs" / "82_vjepa2.ipynb", tmp_path / "walk.ipynb", progress_bar=False, execution_timeout=300, start_timeout=300)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert notebook.cells[-1].outputs[0].text.strip() == "the walk is complete"
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 12
    assert (tmp_path / "walk.ipynb").is_file() and {path.name for path in tmp_path.iterdir()} == {"walk.ipynb"}
