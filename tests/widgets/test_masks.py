"The mask explorers: pictures of a state alone, clicks that are part of it, and sentences for the rest."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from masked_tools import awake, clips, stage

from worldmodels_nb.models.masked import gather_tokens
from worldmodels_nb.settings import PretrainSettings, Settings
from worldmodels_nb.widgets.masks import (
    GREY,
    MaskExplorer,
    MaskRunExplorer,
    flip_tokens,
    judge_mask,
    mask_generators,
    masked_stage,
    token_colors,
)


@pytest.fixture
def make(clip): return lambda: MaskExplorer(clip, grid=(2, 4, 4), share=0.35)


@pytest.fixture(scope="module")
def model(): return awake(stage(blocks=[1, 2], scales=[.2, .5])).eval()


@pytest.fixture
def answered(model): return lambda: MaskExplorer(clips()[0], grid=(2, 4, 4), share=0.35, model=model)


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
    assert "wm-message" in view.message._dom_classes and view.image.hears == ["click"]
    assert set(view.controls) == {"generator", "masking", "share", "blocks", "seed", "flipped"}
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


# generators, and what does nothing

def test_each_generator_of_a_setting_is_one_mask_of_a_step(model):
    found = mask_generators(model.settings)
    assert list(found) == ["1 rectangles of 20%", "2 rectangles of 50%"]
    assert [(s.blocks, s.scales, s.least) for s in found.values()] == [([1], [.2], .1), ([2], [.5], .1)]
    assert list(mask_generators(PretrainSettings(masking="tubes", ratio=.5))) == ["tubes, 50%"]


def test_controls_that_do_nothing_are_off(answered):
    view = answered()
    off = lambda: {name for name, control in view.controls.items() if control.disabled}  # noqa: E731
    assert off() == set()
    view.controls["masking"].value = "tubes"
    assert off() == {"blocks"}
    view.controls["generator"].value = "2 rectangles of 50%"
    assert off() == {"masking", "share", "blocks"}
    before = view.image.value
    for name, value in dict(masking="random", share=.8, blocks=5).items(): view.controls[name].value = value
    assert view.image.value == before


# clicks

def middle(view, t, row, column):
    height, width, _ = view.cell(view.clip)
    left = 84 + t * (width + 3)
    return left + (column + .5) * width / 4, (row + .5) * height / 4


@pytest.mark.parametrize("with_model", [False, True])
def test_a_click_changes_the_side_of_its_token_and_a_second_changes_it_back(make, answered, with_model):
    view = answered() if with_model else make()
    before, seen = view.image.value, set(view.mask(view.state)[0][0].tolist())
    x, y = middle(view, 3, 2, 1)                                 # the fourth frame is in the second tubelet
    assert view.token_at(view.state, x, y) == 16 + 2 * 4 + 1
    view.pointed("click", x, y)
    assert view.state["flipped"] == "25" and view.image.value != before
    assert set(view.mask(view.state)[0][0].tolist()) == seen ^ {25}
    view.pointed("click", *middle(view, 0, 0, 0))
    assert view.state["flipped"] == "0 25"
    for at in ((3, 2, 1), (0, 0, 0)): view.pointed("click", *middle(view, *at))
    assert view.state["flipped"] == "" and view.image.value == before


def test_the_same_token_is_under_every_row_and_on_both_halves(answered):
    view = answered()
    (x, y), (height, _, half) = middle(view, 1, 3, 2), view.cell(view.clip)
    places = [(x + dx, y + i * (height + 3)) for i in range(3) for dx in (0, half)]
    assert {view.token_at(view.state, *place) for place in places} == {3 * 4 + 2}


@pytest.mark.parametrize("x, y", [(5, 5), (-1, 5), (100, 10**4), (100, -3), (84 + 128 + 1, 5), (10**5, 5)])
def test_clicks_beside_the_frames_do_nothing(make, x, y):
    view = make()
    number = view.image.number
    for what in ("click", "hover", "drag"): view.pointed(what, x, y)
    view.pointed("hover", *middle(view, 0, 0, 0))
    assert view.image.number == number


@pytest.mark.parametrize("words", ["32", "-1", "x", "1.5", "<b>", "٣", "9" * 5000])
def test_what_is_no_token_is_said(make, words):
    view = make()
    before = view.image.value
    view.controls["flipped"].value = words
    assert "is no token" in view.message.value and view.image.value == before
    assert "<b>" not in view.message.value and len(view.message.value) < 200


def test_nothing_to_see_or_to_ask_is_said():
    mask = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    with pytest.raises(ValueError, match="nothing is left to see"): flip_tokens(mask, "0 1")
    with pytest.raises(ValueError, match="nothing is left to ask for"): flip_tokens(mask, "2, 3")
    assert [part.tolist() for part in flip_tokens(mask, "0 2 2")] == [[[1]], [[0, 2, 3]]]


def test_buttons_redraw_and_undo(make):
    view = make()
    redraw, undo = view.bar.children[:2]
    before = view.image.value
    view.pointed("click", *middle(view, 0, 0, 0))
    undo.click()
    assert view.image.value == before
    view.change(seed=99, flipped="3")
    redraw.click()
    assert (view.state["seed"], view.state["flipped"]) == (0, "") and view.image.value == before


# what a first stage answers

def test_a_model_is_asked_for_the_hidden_tokens(answered, model):
    view = answered()
    state = view.state | dict(generator="2 rectangles of 50%", seed=2)
    mask = view.mask(state)
    rows, grid = model.target.patch_embed.patchify(model.preprocess(view.clip[None]))
    y = model.target_tokens(rows, grid)
    with torch.no_grad(): wanted = model.predict(rows, grid, *mask, 1)
    tokens, predicted, errors = judge_mask(model, view.clip, mask, 1)
    assert torch.equal(tokens, y[0]) and torch.equal(predicted, wanted[0])
    torch.testing.assert_close(errors, (wanted - gather_tokens(y, mask[1]))[0].abs().mean(-1))
    answers, error = view.answers(view.clip, state)
    assert error == pytest.approx(errors.mean().item()) and f"{error:.2f}" != "0.00"
    seen = mask[0][0].numpy()
    for label in ("error", "predicted"): assert (answers[label].reshape(-1, 3)[seen] == GREY).all()


def test_pictures_of_a_model_depend_on_their_state_alone(answered, depends_on_its_state_alone):
    depends_on_its_state_alone(answered)


@pytest.mark.parametrize("name, value", [("generator", "1 rectangles of 20%"), ("seed", 7), ("flipped", "5")])
def test_controls_redraw_the_answers(answered, redraws_and_goes_back, name, value):
    redraws_and_goes_back(answered(), name, value)


def test_equal_tokens_have_equal_colours():
    tokens = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    one, two = token_colors(tokens, tokens[5:9])
    assert one.dtype == np.uint8 and np.array_equal(one[5:9], two) and len(np.unique(one, axis=0)) > 20
    flat, other = token_colors(torch.ones(5, 12), torch.zeros(2, 12))
    assert (flat == flat[0]).all() and other.shape == (2, 3)


def test_a_stage_without_a_predictor_is_said(model):
    silent = stage()
    silent.predictor = None
    view = MaskExplorer(clips()[0], grid=(2, 4, 4), model=silent)
    assert "no masked predictor" in view.message.value and view.image.value == b""


def test_frames_that_are_not_square_and_grey_ones_are_drawn():
    view = MaskExplorer(torch.zeros(6, 1, 24, 40, dtype=torch.uint8), grid=(3, 3, 5))
    assert view.message.value == "" and view.token_at(view.state, 85, 1) == 0


# a run

@pytest.fixture(scope="module")
def opened(sample, model):
    "A run whose second model has a first stage."
    part = SimpleNamespace(part=stage(side=64, patch_size=16, tubelet_size=1).eval())
    models = {"a": SimpleNamespace(stages=lambda: [SimpleNamespace(part=torch.nn.Identity())]),
              "b": SimpleNamespace(stages=lambda: [SimpleNamespace(part=torch.nn.Identity()), part])}
    data = SimpleNamespace(dataset=sample, validation=np.array([2, 1]))
    return SimpleNamespace(models=models, data=data, settings=Settings(), notes=["there is no data here"],
                           name="small", folder=SimpleNamespace(name="small"))


@pytest.fixture(scope="module")
def trained(): return MaskRunExplorer("sample")


def test_the_sample_run_has_a_first_stage(trained):
    assert trained.message.value == "" and trained.model is masked_stage(trained.opened)
    assert trained.grid == trained.model.grid()
    assert trained.state["generator"] in trained.controls["generator"].options
    assert {"wm-MaskExplorer", "wm-MaskRunExplorer"} <= set(trained.box._dom_classes)
    assert "tokens are seen" in trained.image.alt


@pytest.mark.parametrize("name, value", [("episode", 1), ("start", 5), ("generator", "by hand"), ("seed", 3)])
def test_controls_of_a_run_redraw(trained, redraws_and_goes_back, name, value):
    redraws_and_goes_back(trained, name, value)


def test_another_run_brings_its_own_stage_and_episodes(trained, opened, sample):
    other = MaskRunExplorer("sample")
    other.opened = opened
    with other.hold(): other.use(opened)
    assert other.message.value == "" and other.model is opened.models["b"].stages()[1].part
    assert other.controls["episode"].max == 1
    clip = other.scene(other.state | dict(episode=1, start=0))
    assert np.array_equal(clip.numpy(), sample.episode(1).frames[:4])
    last = other.scene(other.state | dict(episode=0, start=10**6))
    assert np.array_equal(last.numpy(), sample.episode(2).frames[-4:])


def test_a_run_without_a_first_stage_shows_masks_and_one_without_data_says_so(opened):
    view = MaskRunExplorer("sample")
    with view.hold(): view.use(SimpleNamespace(**vars(opened) | dict(models={})))
    assert view.model is None and view.message.value == "" and view.grid == (4, 4, 4)
    view.opened = SimpleNamespace(**vars(opened) | dict(data=None))
    with view.hold(): view.use(view.opened)
    assert view.message.value == "there is no data here"
