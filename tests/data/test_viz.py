"What a figure promises: one fixed scale, one colour per model, zero where a bar begins, no global state."
import importlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from worldmodels_nb.viz import (
    BASELINE_COLOR,
    FURTHER_COLORS,
    MODEL_COLORS,
    as_pixels,
    bars,
    curves,
    filmstrip,
    flow_picture,
    latent_map,
    line_styles,
    model_color,
    new_picture,
    pca2,
    pca_share,
    png_bytes,
    save_figure,
    set_model_color,
    side_by_side,
)

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (5, 3, 16, 16), np.uint8)
PALETTE = {"encdec": "#0072B2", "encdec_jepa": "#56B4E9", "jepa": "#D55E00", "vjepa2": "#7B1E5B"}


@pytest.fixture(scope="module", autouse=True)
def palette():
    "Only the four models of the book have colours here, whatever other tests have registered."
    before = dict(MODEL_COLORS)
    MODEL_COLORS.clear()
    for name, color in PALETTE.items(): set_model_color(name, color)
    yield
    MODEL_COLORS.clear()
    MODEL_COLORS.update(before)


def image_of(figure): return np.asarray(figure.axes[0].images[0].get_array())


def labels(figure, which="y"):
    return [t.get_text() for t in getattr(figure.axes[0], f"get_{which}ticklabels")()]


# --- figures

def every_figure():
    x, y = [1, 2, 3], [3., 2., 1.]
    return dict(
        filmstrip=filmstrip({"a": FRAMES}),
        side_by_side=side_by_side(FRAMES, FRAMES[::-1]),
        curves=curves({"jepa": (x, y, None, None)}, "step", "px"),
        bars=bars({"jepa": (1., .5, 2.)}, "px"),
        latent_map=latent_map(RNG.normal(size=(9, 2)), np.arange(9), "x, px"))


@pytest.mark.parametrize("name, figure", every_figure().items(),
                         ids=lambda v: v if isinstance(v, str) else "")
def test_every_figure_is_a_picture_with_labelled_axes(name, figure, tmp_path):
    assert isinstance(figure, Figure) and figure._repr_png_()[:4] == b"\x89PNG"
    assert figure.get_size_inches()[0] <= 9 and figure.axes[0].get_xlabel()
    path = save_figure(figure, tmp_path / f"{name}.png")
    assert path.read_bytes() == png_bytes(figure)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.png"]


def test_no_figure_is_kept_by_pyplot():
    every_figure()
    assert plt.get_fignums() == []


def test_the_same_data_gives_the_same_bytes():
    assert filmstrip({"a": FRAMES})._repr_png_() == filmstrip({"a": FRAMES})._repr_png_()
    figure, ax = new_picture(3, 1.6)
    ax.plot(np.arange(9), np.sqrt(np.arange(9)))
    assert figure._repr_png_()[:4] == b"\x89PNG" and png_bytes(figure) == png_bytes(figure)


@pytest.mark.parametrize("name", ["figure.svg", "figure.jpg"])
def test_only_png_is_written(tmp_path, name):
    figure = filmstrip({"a": FRAMES})
    with pytest.raises(ValueError, match=rf"\.png.*{name}"): save_figure(figure, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# --- colours

def test_the_registered_models_bring_these_colours():
    for chapter in PALETTE: importlib.import_module(f"worldmodels_nb.models.{chapter}")
    registered = importlib.import_module("worldmodels_nb.models.base").MODELS
    assert {name: registered[name].color for name in PALETTE} == PALETTE


def test_a_new_model_brings_its_colour_and_a_word_that_is_none_is_refused(monkeypatch):
    monkeypatch.setitem(MODEL_COLORS, "toy", None)
    assert model_color("toy") in FURTHER_COLORS
    set_model_color("toy", "teal")
    assert model_color("toy") == "teal" and line_styles(["toy"])["toy"] == dict(color="teal", linestyle="-")
    for wrong in ("greenish", None):
        with pytest.raises(ValueError, match="toy.*#0072B2"): set_model_color("toy", wrong)
    assert model_color("toy") == "teal"


def test_one_colour_per_model_and_grey_dashes_for_baselines():
    every = {*MODEL_COLORS.values(), *FURTHER_COLORS, BASELINE_COLOR}
    assert len(every) == len(MODEL_COLORS) + len(FURTHER_COLORS) + 1
    assert set(MODEL_COLORS) - {"vjepa2_untrained"} == {"encdec", "encdec_jepa", "jepa", "vjepa2"}
    series = {"persistence": ([1, 2], [1, 1], None, None), "vjepa2": ([1, 2], [1, 2], None, None)}
    figure = curves(series, "step", "px", baselines=["persistence"])
    baseline, model = figure.axes[0].lines
    assert baseline.get_color() == BASELINE_COLOR and baseline.is_dashed()
    assert model.get_color() == MODEL_COLORS["vjepa2"] and not model.is_dashed()
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["persistence", "vjepa2"]


def test_a_model_keeps_its_colour_and_a_stranger_always_gets_the_same():
    assert model_color("jepa") == MODEL_COLORS["jepa"]
    assert model_color("my_model") == model_color("my_model")


def test_no_name_is_taken_apart():
    styles = line_styles(["floor:persistence", "jepa larp", "jepa"])
    assert styles["floor:persistence"]["color"] in FURTHER_COLORS
    assert styles["jepa larp"]["color"] in FURTHER_COLORS
    assert styles["jepa"] == dict(color=MODEL_COLORS["jepa"], linestyle="-")


def test_lines_of_one_owner_share_its_colour_and_differ_in_their_dashes():
    owners = {"jepa, untrained": "jepa", "reward by look-ahead": "vjepa2"}
    styles = line_styles(["jepa", *owners, "raw pixels"], owners, {"raw pixels", "not drawn"})
    assert [s["color"] for s in styles.values()] == [
        MODEL_COLORS["jepa"], MODEL_COLORS["jepa"], MODEL_COLORS["vjepa2"], BASELINE_COLOR]
    assert styles["jepa"]["linestyle"] != styles["jepa, untrained"]["linestyle"]


def test_a_baseline_is_grey_even_where_it_belongs_to_a_model():
    values = {"jepa": (2, None, None), "untrained": (1, None, None), "mlp": (3, None, None)}
    owners = {"untrained": "jepa", "mlp": "vjepa2"}
    first, second, third = bars(values, "px", owners=owners, baselines=["untrained"]).axes[0].patches
    assert first.get_facecolor() == to_rgba(MODEL_COLORS["jepa"]) and not first.get_hatch()
    assert second.get_facecolor() == to_rgba(BASELINE_COLOR) and second.get_hatch()
    assert third.get_facecolor() == to_rgba(MODEL_COLORS["vjepa2"])
    series = {name: ([1, 2], [1, 2], None, None) for name in values}
    lines = curves(series, "x", "y", owners=owners, baselines=["untrained"]).axes[0].lines
    assert [line.get_color() for line in lines] == [
        MODEL_COLORS["jepa"], BASELINE_COLOR, MODEL_COLORS["vjepa2"]]


@given(st.lists(st.text(min_size=1), unique=True, max_size=12))
def test_unknown_names_get_a_stable_further_colour(names):
    styles = line_styles(["jepa", *names])
    assert styles == line_styles(["jepa", *names]) and styles["jepa"]["color"] == MODEL_COLORS["jepa"]
    for name in names:
        if name not in MODEL_COLORS: assert model_color(name) in FURTHER_COLORS
    assert len({(s["color"], str(s["linestyle"])) for s in styles.values()}) == len(styles)


def test_lone_lines_keep_the_colour_of_their_name():
    for name in ("mine", "prediction", "reward"):
        assert line_styles([name])[name] == dict(color=model_color(name), linestyle="-")


def test_eight_terms_look_eight_ways():
    many = line_styles([f"term {i}" for i in range(8)])
    assert len({(s["color"], str(s["linestyle"])) for s in many.values()}) == 8


# --- frames

@pytest.mark.parametrize(
    "frames", [FRAMES, torch.from_numpy(FRAMES), FRAMES / 255,
               torch.from_numpy(FRAMES / 255).requires_grad_()],
    ids=["bytes", "byte tensor", "floats", "float tensor with gradient"])
def test_bytes_and_floats_arrays_and_tensors_look_the_same(frames):
    assert np.allclose(as_pixels(frames), np.moveaxis(FRAMES, 1, -1) / 255, atol=1e-6)


def test_white_is_white_in_every_format_and_one_channel_becomes_three():
    white = as_pixels(np.full((1, 3, 4, 4), 255, np.uint8))
    assert np.allclose(white, as_pixels(torch.ones(1, 3, 4, 4, requires_grad=True)))
    assert np.allclose(as_pixels(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)), np.ones((1, 4, 4, 3)))
    assert as_pixels(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "bad", [FRAMES / 255 - .5, FRAMES / 200, FRAMES.astype(np.float32), np.full((1, 1, 4, 4), np.nan),
            np.full((1, 1, 4, 4), np.inf), FRAMES[0], FRAMES[:, :2]],
    ids=["centred", "too bright", "0 to 255", "nan", "inf", "no time", "two channels"])
def test_frames_on_an_unknown_scale_or_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="frames (lie|have)"): as_pixels(bad)


def test_a_refusal_says_what_is_wrong():
    with pytest.raises(ValueError, match="frames lie between"): as_pixels(np.full((1, 1, 4, 4), np.nan))
    with pytest.raises(ValueError, match=r"\(4, 4\)"): as_pixels(np.zeros((4, 4)))


def test_a_filmstrip_holds_the_frames_unstretched_and_in_place():
    weak = np.full((2, 1, 16, 16), .5)
    sheet = image_of(filmstrip({"a": FRAMES, "b": weak}))
    assert np.allclose(sheet[:16, :16], np.moveaxis(FRAMES[0], 0, -1) / 255, atol=1e-6)
    assert np.allclose(sheet[:16, 17:33], np.moveaxis(FRAMES[1], 0, -1) / 255, atol=1e-6)
    assert np.allclose(sheet[17:33, :16], .5)                       # neither brightened nor darkened
    assert (sheet[17:33, 34:] == 1).all()                           # a shorter row ends in paper


def test_ticks_name_the_steps_and_the_rows():
    rows = {"truth": FRAMES, "persistence": FRAMES, "jepa": FRAMES}
    figure = filmstrip(rows, every=2, first=3)
    assert labels(figure, "x") == ["3", "5", "7"] and labels(figure) == ["truth", "persistence", "jepa"]
    assert figure.axes[0].get_yticklabels()[2].get_color() == MODEL_COLORS["jepa"]
    assert figure.axes[0].get_yticklabels()[1].get_color() == "black"
    assert "steps" in figure.axes[0].get_xlabel()
    assert labels(filmstrip({"a": np.zeros((12, 1, 8, 8))}, every=4, first=2), "x") == ["2", "6", "10"]


def test_columns_that_are_no_steps_have_titles():
    figure = filmstrip({"a": FRAMES[:2]}, titles=["64 px", "8 px"])
    assert labels(figure, "x") == ["64 px", "8 px"] and figure.axes[0].get_xlabel() == ""


def test_truth_stands_above_prediction_and_the_difference_below():
    figure = side_by_side(FRAMES, FRAMES[::-1], "jepa")
    assert labels(figure) == ["truth", "jepa", "|difference|"]
    expected = np.abs(FRAMES[0].astype(float) - FRAMES[4]).mean(0) / 255
    assert np.allclose(image_of(figure)[34:50, :16, 0], expected, atol=1e-5)
    assert labels(side_by_side(FRAMES, FRAMES, difference=False)) == ["truth", "prediction"]
    for short in (FRAMES[1:], FRAMES[:2]):
        with pytest.raises(ValueError, match="same frames"): side_by_side(FRAMES, short)


# --- numbers

def test_curves_begin_at_zero_unless_something_is_below_or_the_axis_is_logarithmic():
    def axis(y, **how): return curves({"jepa": ([1, 2], y, None, None)}, "step", "px", **how).axes[0]
    assert axis([5, 6]).get_ylim()[0] == 0 and axis([5, 6], zero=False).get_ylim()[0] > 4
    assert axis([-1, 6]).get_ylim()[0] < -1 and axis([5, 6], log=True).get_yscale() == "log"
    assert axis([np.nan, 6]).get_ylim()[0] == 0


def test_intervals_are_drawn_and_n_is_stated():
    plain = (np.array([1, 2]), torch.tensor([1., 2.]), None, None)
    series = {"jepa": ([1, 2], [5, 6], [4, 5], [6, 9]), "encdec": plain}
    ax = curves(series, "step", "error, px", n=32).axes[0]
    assert ax.get_ylabel() == "error, px (n = 32)" and len(ax.collections) == 1
    assert {5., 9.} <= set(ax.collections[0].get_paths()[0].vertices[:, 1])


def test_a_band_around_a_baseline_beside_a_model():
    series = {"persistence": ([1, 2], [3, 4], [2, 3], [4, 5]), "jepa": ([1, 2], [1, 2], None, None)}
    ax = curves(series, "steps", "px", n=7, baselines=["persistence"]).axes[0]
    assert ax.get_ylabel() == "px (n = 7)" and ax.get_ylim()[0] == 0
    assert ax.lines[1].get_color() == MODEL_COLORS["jepa"] and ax.lines[0].get_linestyle() != "-"


def test_bars_begin_at_zero_with_their_intervals():
    values = {"jepa": (5, 4, 7), "random": (2, None, None)}
    ax = bars(values, "success, %", n=50, baselines=["random"]).axes[0]
    assert [p.get_x() for p in ax.patches] == [0, 0] and [p.get_width() for p in ax.patches] == [5, 2]
    assert ax.get_xlabel() == "success, % (n = 50)" and ax.get_xlim()[0] <= 0
    assert {4., 7.} <= {v for c in ax.collections for path in c.get_paths() for v in path.vertices[:, 0]}
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["jepa", "random"]


def test_bars_below_zero_still_begin_there():
    values = {"jepa": (.5, .4, .6), "random": (-.1, None, None)}
    ax = bars(values, "success, share", n=50, baselines=["random"]).axes[0]
    assert ax.get_xlabel() == "success, share (n = 50)" and ax.get_xlim()[0] < 0 < ax.get_xlim()[1]


# --- maps

@pytest.mark.parametrize("shape", [(50, 6), (50, 3, 4), (4, 7), (20, 50), (200, 6)])
def test_pca_equals_the_singular_value_decomposition(shape):
    z = RNG.normal(size=shape) * 1e3 + 5
    flat = z.reshape(len(z), -1)
    u, s, vt = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert np.allclose(np.abs(pca2(z)), np.abs(u[:, :2] * s[:2]))
    assert np.allclose(pca_share(z), (s**2 / (s**2).sum())[:2])
    assert np.allclose(pca2(torch.from_numpy(z)), pca2(z))


@pytest.mark.parametrize("shape, spread", [
    ((20, 50), np.linspace(2, .1, 50)), ((200, 6), [5, 3, 1, 1, 1, 1])])
def test_pca_to_eight_digits(shape, spread):
    z = np.random.default_rng(0).normal(size=shape) * spread
    u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    assert np.abs(np.abs(pca2(z)) - np.abs(u[:, :2] * s[:2])).max() <= 1e-8
    assert np.abs(pca_share(z) - (s ** 2 / (s ** 2).sum())[:2]).max() <= 1e-8
    assert np.abs(pca2(z) - pca2(torch.tensor(z)[:, :, None])).max() <= 1e-8


def test_pca_does_not_flip_and_survives_a_collapse():
    z = RNG.normal(size=(80, 5)) * [5, 3, 1, 1, 1]
    assert np.allclose(pca2(z), pca2(z[::-1])[::-1])
    assert np.allclose(pca2(np.ones((6, 3))), 0) and pca_share(np.ones((6, 3))).tolist() == [0, 0]


def test_maps_in_one_figure_share_their_scale():
    points = RNG.normal(size=(30, 2))
    figure = latent_map({"jepa": points, "collapsed": points / 1000}, points[:, 0], "agent x, px")
    first, second, bar = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    assert bar.get_ylabel() == "agent x, px" and first.title.get_color() == MODEL_COLORS["jepa"]
    drawn = latent_map(torch.from_numpy(points), torch.arange(30), "t").axes[0].collections[0]
    assert np.allclose(drawn.get_offsets(), points)


def test_a_row_of_a_flow_is_its_words_with_a_box_around_what_learns():
    figure = flow_picture({"jepa": "frame → [encoder] → z ≈ z of the next", "other": "z → [decoder] → frame"})
    texts = {text.get_text(): text for text in figure.axes[0].texts if text.get_text()}
    assert set(texts) == {"jepa", "frame", "encoder", "z", "≈ z of the next", "other", "decoder"}
    assert [word for word, text in texts.items() if text.get_bbox_patch()] == ["encoder", "decoder"]
    arrows = [child for child in figure.axes[0].texts if not child.get_text()]
    assert len(arrows) == 4 and texts["jepa"].get_color() == model_color("jepa")
