"The rollout stepper: one picture a step, of its state alone."
import pytest

from worldmodels_nb.viz import png_bytes
from worldmodels_nb.widgets.rollouts import RolloutStepper


@pytest.fixture
def make(clip): return lambda: RolloutStepper({"truth": clip, "prediction": clip.flip(0)})


def test_a_picture_depends_on_its_state_alone(make, depends_on_its_state_alone):
    depends_on_its_state_alone(make)


def test_a_control_redraws_the_picture_and_back(make, redraws_and_goes_back):
    redraws_and_goes_back(make(), "step", 2)


def test_each_step_is_a_picture_of_its_own(make):
    view, pictures = make(), []
    for step in (1, 2, 4):
        view.controls["step"].value = step
        pictures.append(view.image.value)
    assert len(set(pictures)) == 3 and pictures[-1] == png_bytes(view.render(dict(step=4)))


def test_one_row_alone_can_be_stepped_through(clip):
    view = RolloutStepper({"alone": clip})
    assert view.image.value and view.controls["step"].max == len(clip)


def test_a_view_shows_its_box_and_says_what_it_is_where_there_are_no_widgets(make):
    view = make()
    bundle = view._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == view.box.model_id
    assert bundle["text/plain"] == "RolloutStepper: run this notebook in JupyterLab to use it"


def test_rows_of_unequal_length_are_refused(clip):
    with pytest.raises(ValueError, match="one length"):
        RolloutStepper({"truth": clip, "prediction": clip[:2]})
