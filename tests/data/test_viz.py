"What a figure promises: one fixed scale, one colour per model, zero where a bar begins, and no global state."

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib.figure import Figure

from worldmodels_nb.viz import *
from worldmodels_nb.viz import line_styles

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (5, 3, 16, 16), np.uint8)


def image_of(figure): return np.asarray(figure.axes[0].images[0].get_array())


def labels(figure, which="y"): return [t.get_text() for t in getattr(figure.axes[0], f"get_{which}ticklabels")()]


# --- figures

def every_figure():
    x, y = [1, 2, 3], [3., 2., 1.]
    return dict(filmstrip=filmstrip({"a": FRAMES}), side_by_side=side_by_side(FRAMES, FRAMES[::-1]), curves=curves({"jepa": (x, y, None, None)}, "step", "px"),
                bars=bars({"jepa": (1., .5, 2.)}, "px"), latent_map=latent_map(RNG.normal(size=(9, 2)), np.arange(9), "x, px"))


@pytest.mark.parametrize("name, figure", every_figure().items(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_figure_is_a_picture_with_labelled_axes(name, figure, tmp_path):
    assert isinstance(figure, Figure) and figure._repr_png_()[:4] == b"\x89PNG"
    assert figure.get_size_inches()[0] <= 9 and figure.axes[0].get_xlabel()
    path = save_figure(figure, tmp_path / f"{name}.png")
    assert path.read_bytes() == figure._repr_png_() and [p.name for p in tmp_path.iterdir()] == [f"{name}.png"]


def test_no_figure_is_kept_by_pyplot():
    import matplotlib.pyplot as plt
    every_figure()
    assert plt.get_fignums() == []


def test_the_same_data_gives_the_same_bytes():
    assert filmstrip({"a": FRAMES})._repr_png_() == filmstrip({"a": FRAMES})._repr_png_()


def test_only_png_is_written(tmp_path):
    with pytest.raises(ValueError, match="figure.svg"): save_figure(filmstrip({"a": FRAMES}), tmp_path / "figure.svg")
    assert list(tmp_path.iterdir()) == []


# --- colours

def test_one_colour_per_model_and_grey_dashes_for_floors():
    assert len(set(MODEL_COLORS.values()) | set(FURTHER_COLORS) | {FLOOR_COLOR}) == len(MODEL_COLORS) + len(FURTHER_COLORS) + 1
    assert set(MODEL_COLORS) == {"encdec", "encdec_jepa", "jepa", "vjepa2"}
    figure = curves({"floor:persistence": ([1, 2], [1, 1], None, None), "vjepa2": ([1, 2], [1, 2], None, None)}, "step", "px")
    floor, model = figure.axes[0].lines
    assert floor.get_color() == FLOOR_COLOR and floor.is_dashed() and model.get_color() == MODEL_COLORS["vjepa2"] and not model.is_dashed()
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["persistence", "vjepa2"]


@given(st.lists(st.text(min_size=1), unique=True, max_size=12))
def test_unknown_names_get_a_stable_further_colour(names):
    styles = line_styles(["jepa", *names])
    assert styles == line_styles(["jepa", *names]) and styles["jepa"]["color"] == MODEL_COLORS["jepa"]
    for name in names:
        if name not in MODEL_COLORS and not name.startswith("floor:"): assert model_color(name) in FURTHER_COLORS
    assert len({(s["color"], str(s["linestyle"])) for s in styles.values()}) == len(styles)


def test_lone_lines_keep_the_colour_of_their_name():
    for name in ("mine", "prediction", "reward"): assert line_styles([name])[name] == dict(color=model_color(name), linestyle="-")


# --- frames

@pytest.mark.parametrize("frames", [FRAMES, torch.from_numpy(FRAMES), FRAMES / 255, torch.from_numpy(FRAMES / 255).requires_grad_()],
                         ids=["bytes", "byte tensor", "floats", "float tensor with gradient"])
def test_bytes_and_floats_arrays_and_tensors_look_the_same(frames):
    assert np.allclose(as_pixels(frames), np.moveaxis(FRAMES, 1, -1) / 255, atol=1e-6)


@pytest.mark.parametrize("bad", [FRAMES / 255 - .5, FRAMES / 200, FRAMES.astype(np.float32), np.full((1, 1, 4, 4), np.nan), np.full((1, 1, 4, 4), np.inf), FRAMES[0], FRAMES[:, :2]],
                         ids=["centred", "too bright", "0 to 255", "nan", "inf", "no time", "two channels"])
def test_frames_on_an_unknown_scale_or_of_another_shape_are_refused(bad):
    with pytest.raises(ValueError, match="frames (lie|have)"): as_pixels(bad)


def test_a_filmstrip_holds_the_frames_unstretched_and_in_place():
    weak = np.full((2, 1, 16, 16), .5)
    sheet = image_of(filmstrip({"a": FRAMES, "b": weak}))
    assert np.allclose(sheet[:16, :16], np.moveaxis(FRAMES[0], 0, -1) / 255, atol=1e-6)
    assert np.allclose(sheet[:16, 17:33], np.moveaxis(FRAMES[1], 0, -1) / 255, atol=1e-6)
    assert np.allclose(sheet[17:33, :16], .5)                       # neither brightened nor darkened
    assert (sheet[17:33, 34:] == 1).all()                           # a shorter row ends in paper


def test_ticks_name_the_steps_and_the_rows():
    figure = filmstrip({"truth": FRAMES, "floor:persistence": FRAMES, "jepa": FRAMES}, every=2, first=3)
    assert labels(figure, "x") == ["3", "5", "7"] and labels(figure) == ["truth", "persistence", "jepa"]
    assert figure.axes[0].get_yticklabels()[2].get_color() == MODEL_COLORS["jepa"]
    assert "steps" in figure.axes[0].get_xlabel()


def test_truth_stands_above_prediction_and_the_difference_below():
    figure = side_by_side(FRAMES, FRAMES[::-1], "jepa")
    assert labels(figure) == ["truth", "jepa", "|difference|"]
    expected = np.abs(FRAMES[0].astype(float) - FRAMES[4]).mean(0) / 255
    assert np.allclose(image_of(figure)[34:50, :16, 0], expected, atol=1e-5)
    assert labels(side_by_side(FRAMES, FRAMES, difference=False)) == ["truth", "prediction"]
    with pytest.raises(ValueError, match="same frames"): side_by_side(FRAMES, FRAMES[1:])


# --- numbers

def test_curves_begin_at_zero_unless_something_is_below_or_the_axis_is_logarithmic():
    line = lambda y, **how: curves({"jepa": ([1, 2], y, None, None)}, "step", "px", **how).axes[0]
    assert line([5, 6]).get_ylim()[0] == 0 and line([5, 6], zero=False).get_ylim()[0] > 4
    assert line([-1, 6]).get_ylim()[0] < -1 and line([5, 6], log=True).get_yscale() == "log"
    assert line([np.nan, 6]).get_ylim()[0] == 0


def test_intervals_are_drawn_and_n_is_stated():
    ax = curves({"jepa": ([1, 2], [5, 6], [4, 5], [6, 9]), "encdec": (np.array([1, 2]), torch.tensor([1., 2.]), None, None)}, "step", "error, px", n=32).axes[0]
    assert ax.get_ylabel() == "error, px (n = 32)" and len(ax.collections) == 1
    assert {5., 9.} <= set(ax.collections[0].get_paths()[0].vertices[:, 1])


def test_bars_begin_at_zero_with_their_intervals():
    ax = bars({"jepa": (5, 4, 7), "floor:random": (2, None, None)}, "success, %", n=50).axes[0]
    assert [p.get_x() for p in ax.patches] == [0, 0] and [p.get_width() for p in ax.patches] == [5, 2]
    assert ax.get_xlabel() == "success, % (n = 50)" and ax.get_xlim()[0] <= 0
    assert {4., 7.} <= {v for c in ax.collections for path in c.get_paths() for v in path.vertices[:, 0]}
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["jepa", "random"]


# --- maps

@pytest.mark.parametrize("shape", [(50, 6), (50, 3, 4), (4, 7)])
def test_pca_equals_the_singular_value_decomposition(shape):
    z = RNG.normal(size=shape) * 1e3 + 5
    flat = z.reshape(len(z), -1)
    u, s, vt = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert np.allclose(np.abs(pca2(z)), np.abs(u[:, :2] * s[:2])) and np.allclose(pca_share(z), (s**2 / (s**2).sum())[:2])
    assert np.allclose(pca2(torch.from_numpy(z)), pca2(z))


def test_pca_does_not_flip_and_survives_a_collapse():
    z = RNG.normal(size=(80, 5)) * [5, 3, 1, 1, 1]
    assert np.allclose(pca2(z), pca2(z[::-1])[::-1])
    assert np.allclose(pca2(np.ones((6, 3))), 0) and pca_share(np.ones((6, 3))).tolist() == [0, 0]


def test_maps_in_one_figure_share_their_scale():
    points = RNG.normal(size=(30, 2))
    figure = latent_map({"jepa": points, "collapsed": points / 1000}, points[:, 0], "agent x, px")
    first, second, bar = figure.axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim() and bar.get_ylabel() == "agent x, px"
    assert first.title.get_color() == MODEL_COLORS["jepa"]
    assert np.allclose(latent_map(torch.from_numpy(points), torch.arange(30), "t").axes[0].collections[0].get_offsets(), points)
