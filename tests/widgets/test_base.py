"A view without a browser: what cannot be drawn is said in a sentence, each part is found by its class."
from pathlib import Path

import ipywidgets
import nbformat
import pytest

from worldmodels_nb.settings import repo_root
from worldmodels_nb.viz import curves
from worldmodels_nb.widgets.base import View

ROOT = repo_root(Path(__file__).parent)


class Slope(View):
    def __init__(self): super().__init__(slope=ipywidgets.FloatSlider(1.0, min=-3, max=3))

    def render(self, state):
        if state["slope"] > 2: raise ValueError("too <steep>")
        return curves({"line": ([0, 1], [0, state["slope"]], None, None)}, "x", "y", zero=False)


def test_a_picture_depends_on_its_state_alone(depends_on_its_state_alone):
    depends_on_its_state_alone(Slope)


def test_a_control_redraws_the_picture_and_back(redraws_and_goes_back):
    redraws_and_goes_back(Slope(), "slope", -1.0)


def test_what_cannot_be_drawn_is_said_and_the_picture_stays():
    view = Slope()
    first = view.image.value
    view.controls["slope"].value = 2.5
    assert view.message.value == "too &lt;steep&gt;" and view.image.value == first
    view.controls["slope"].value = 1.5
    assert view.message.value == ""


def test_errors_in_the_code_are_not_hidden():
    class Broken(View):
        def render(self, state): return {}["nothing"]
    with pytest.raises(KeyError): Broken()
    with pytest.raises(NotImplementedError): View()


def test_what_is_said_is_text_and_not_markup():
    class Loud(View):
        def render(self, state): raise ValueError("<script>alert(1)</script>\nsecond line")
    assert Loud().message.value == "&lt;script&gt;alert(1)&lt;/script&gt; second line"


def test_every_control_and_part_can_be_found_by_its_class():
    view = Slope()
    assert {"wm-view", "wm-Slope"} <= set(view.box._dom_classes)
    assert "wm-image" in view.image._dom_classes and "wm-message" in view.message._dom_classes
    assert all(f"wm-{name}" in control._dom_classes for name, control in view.controls.items())


def test_a_view_shows_its_box_and_says_what_it_is_where_there_are_no_widgets():
    view = Slope()
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.box.model_id
    assert bundle["text/plain"] == "Slope: run this notebook in JupyterLab to use it"
    assert isinstance(view.box, ipywidgets.VBox)


def test_nothing_below_number_60_imports_a_widget():
    paths = sorted((ROOT / "nbs").glob("[0-5]_*/*.ipynb"))
    assert len(paths) > 30
    for path in paths:
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        code = "\n".join(cells)
        assert "ipywidgets" not in code and "worldmodels_nb.widgets" not in code, path.name
