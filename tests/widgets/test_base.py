"A view without a browser: what cannot be drawn is said in a sentence, each part is found by its class."
import io
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pytest
from PIL import Image
from run_tools import run_in

from worldmodels_nb.runs import reopen
from worldmodels_nb.settings import repo_root
from worldmodels_nb.viz import curves, png_bytes
from worldmodels_nb.widgets import base
from worldmodels_nb.widgets.base import RunView, View, enlarge, picture_bytes

ROOT = repo_root(Path(__file__).parent)


class Slope(View):
    def __init__(self):
        super().__init__(slope=ipywidgets.FloatSlider(1.0, min=-3, max=3, description="slope"))

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
    assert "wm-message" in view.message._dom_classes and 'className = "wm-image"' in view.image._esm
    assert all(f"wm-{name}" in control._dom_classes for name, control in view.controls.items())


def test_a_view_shows_its_box_and_says_what_it_is_where_there_are_no_widgets():
    view = Slope()
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.box.model_id
    assert bundle["text/plain"] == "Slope: run this cell in JupyterLab to use it"
    assert isinstance(view.box, ipywidgets.VBox)


class Clicked(View):
    "Two controls, one of which does nothing when the other is off; it remembers what was pointed at."
    def __init__(self):
        super().__init__(ipywidgets.Button(description="go"),
                         marked=ipywidgets.Checkbox(True, description="marked"),
                         column=ipywidgets.IntSlider(1, min=0, max=3, description="column"))
        self.heard, self.drawn = [], 0

    def render(self, state):
        self.drawn = getattr(self, "drawn", 0) + 1
        picture = np.zeros((2, 4, 3), np.uint8)
        if state["marked"]: picture[:, state["column"]] = 255
        return picture

    def idle(self, state): return () if state["marked"] else ("column",)
    def describe(self, state): return f"column {state['column']} is white"
    def pointed(self, what, x, y): self.heard.append((what, x, y))
    def key_pressed(self, key, down=True): self.heard.append((key, down))


def test_pixels_are_a_picture():
    view = Clicked()
    image = np.asarray(Image.open(io.BytesIO(view.image.value)).convert("RGB"))
    assert image.shape == (2, 4, 3) and image[:, 1].min() > 250 and image[:, 0].max() < 5
    assert view.image.value == picture_bytes(view.render(view.state)) != picture_bytes(image[:, ::-1].copy())


def test_a_figure_is_a_picture():
    figure = curves({"a": ([0, 1], [0, 1], None, None)}, "x", "y")
    assert picture_bytes(figure) == figure._repr_png_() != png_bytes(figure)


def test_each_picture_has_a_number_and_a_text():
    view = Clicked()
    number = view.image.number
    view.controls["column"].value = 2
    assert view.image.number == number + 1 and view.image.alt == "column 2 is white"
    assert Slope().image.alt == "Slope: slope 1.0"


def test_what_does_nothing_is_off():
    view = Clicked()
    assert not view.controls["column"].disabled
    view.change(marked=False)
    assert view.controls["column"].disabled and not view.controls["marked"].disabled
    view.change(marked=True)
    assert not view.controls["column"].disabled


def test_several_changes_are_one_drawing():
    view = Clicked()
    view.drawn = 0
    view.change(marked=False, column=3)
    assert view.drawn == 1
    with view.hold():
        view.change(marked=True)
        view.change(column=0)
    assert view.drawn == 2


@pytest.mark.parametrize("content, heard", [
    (dict(type="click", x=1.5, y=.5), ("click", 1.5, .5)), (dict(type="hover", x=0, y=1), ("hover", 0, 1)),
    (dict(type="drag", x=3, y=1), ("drag", 3, 1)), (dict(type="release", x=3, y=1), ("release", 3, 1)),
    (dict(type="key", key="ArrowLeft"), ("ArrowLeft", True)), (dict(type="keyup", key="a"), ("a", False))])
def test_a_view_hears_what_the_page_says(content, heard):
    view = Clicked()
    view.image._handle_custom_msg(content, [])
    assert view.heard == [heard]


def test_the_page_says_which_picture_it_shows():
    view = Clicked()
    view.image._handle_custom_msg(dict(type="shown", number=7), [])
    assert view.image.shown == 7 and view.heard == []


def test_controls_wrap_are_labelled_and_keep_their_room():
    view = Clicked()
    go, marked, column = view.bar.children
    assert "wrap" in view.bar.layout.flex_flow
    assert column.layout.min_width == "230px" and column.layout.flex == "1 1 240px"
    assert go.layout.flex == marked.layout.flex == "0 0 auto"
    assert [control.tooltip for control in view.bar.children] == ["go", "marked", "column"]


@pytest.mark.parametrize("channels", [1, 3])
def test_enlarged_pixels_are_squares(channels):
    frames = np.random.default_rng(0).integers(0, 256, (2, channels, 3, 5), dtype=np.uint8)
    large = enlarge(frames, 4)
    assert large.shape == (2, 12, 20, 3) and large.dtype == np.uint8
    for corner in (0, 3): assert (large[:, corner::4, corner::4] == np.moveaxis(frames, 1, -1)).all()


class Named(RunView):
    "A run's first frame."
    def __init__(self, run):
        super().__init__(run, size=ipywidgets.IntSlider(1, min=1, max=9, description="size"))

    def use(self, opened): self.controls["size"].max = len(opened.models)
    def render(self, state): return enlarge(self.opened.data.dataset.frames[0], state["size"])


@pytest.fixture
def named(tmp_path, monkeypatch):
    "A view of a small run in a folder with another one that is damaged, and one that breaks on opening."
    folder = run_in(tmp_path)
    there = reopen.available_runs(folder.parent)
    broken = there[0] | dict(name="broken")
    listed = [*there, broken, broken | dict(name="x", status="damaged")]
    monkeypatch.setattr(base, "available_runs", lambda: listed)
    monkeypatch.setattr(base, "open_run", lambda name: reopen.open_run(name, folder.parent))
    return Named(folder.name)


def test_a_view_of_a_run_begins_with_it_and_lists_the_others(named):
    assert named.state["run"] == named.name and named.message.value == ""
    assert "broken" in named.controls["run"].options and "x" not in named.controls["run"].options
    assert named.controls["size"].max == len(named.opened.models)


def test_a_run_that_cannot_be_opened_is_a_sentence_and_the_one_before_stays(named):
    before, name = named.image.value, named.name
    named.controls["run"].value = "broken"
    assert "there is no run" in named.message.value and named.state["run"] == named.name == name
    assert named.image.value == before


def test_nothing_below_number_60_imports_a_widget():
    paths = sorted((ROOT / "nbs").glob("[0-5]_*/*.ipynb"))
    assert len(paths) > 30
    for path in paths:
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        code = "\n".join(cells)
        assert "ipywidgets" not in code and "worldmodels_nb.widgets" not in code, path.name
