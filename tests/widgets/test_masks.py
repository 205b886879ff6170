"The mask explorer: pictures of a state alone, four controls, and sentences where there is no mask."
import pytest
import torch

from worldmodels_nb.widgets.masks import MaskExplorer


@pytest.fixture
def make(clip): return lambda: MaskExplorer(clip, grid=(2, 4, 4), share=0.35)


def test_a_picture_depends_on_its_state_alone(make, depends_on_its_state_alone):
    depends_on_its_state_alone(make)


def test_rendering_changes_no_widget(make):
    view = make()
    before = view.image.value, view.state
    view.render(view.state | dict(masking="tubes", seed=9))
    assert (view.image.value, view.state) == before


@pytest.mark.parametrize("name, value", [("masking", "random"), ("share", 0.75), ("blocks", 1), ("seed", 1)])
def test_a_control_redraws_the_picture_and_back(make, redraws_and_goes_back, name, value):
    redraws_and_goes_back(make(), name, value)


def test_every_control_and_part_can_be_found_by_its_class(make):
    view = make()
    assert {"wm-view", "wm-MaskExplorer"} <= set(view.box._dom_classes)
    assert "wm-image" in view.image._dom_classes and "wm-message" in view.message._dom_classes
    assert set(view.controls) == {"masking", "share", "blocks", "seed"}
    assert all(f"wm-{name}" in control._dom_classes for name, control in view.controls.items())


def test_what_cannot_be_drawn_is_said_and_the_picture_stays(make):
    view = make()
    before = view.image.value
    view.controls["share"].value = 0.95                          # a rectangle of nearly all of the frame
    message = view.message.value
    assert "lower vjepa2.pretrain.scales" in message and "\n" not in message and "Traceback" not in message
    assert view.image.value == before
    view.controls["share"].value = 0.5
    assert view.message.value == "" and view.image.value != before


def test_each_of_many_moves_is_a_picture(sample):
    clip = torch.from_numpy(sample.frames[36:40].copy())
    view = MaskExplorer(clip, grid=(2, 4, 4))
    view.controls["share"].value = 0.95
    before = view.image.value
    for name, value in dict(share=0.25, masking="tubes", seed=3).items():
        view.controls[name].value = value
        assert view.image.value != before and view.message.value == "", name
        before = view.image.value


def test_the_picture_shows_the_mask_of_its_state(make):
    view = make()
    seen, asked = view.mask(dict(masking="random", share=0.25, blocks=1, seed=0))
    assert sorted([*seen[0].tolist(), *asked[0].tolist()]) == list(range(2 * 4 * 4)) and len(asked[0]) == 8


def test_a_grid_that_does_not_fit_the_clip_is_no_traceback(clip):
    view = MaskExplorer(clip, grid=(3, 5, 5))
    assert "does not divide a clip of (4, 64, 64)" in view.message.value and view.image.value == b""
