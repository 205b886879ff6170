"Frames, points, words and colours as pixels."
import numpy as np
import pytest

from worldmodels_nb.widgets.canvas import Canvas, color_dots, fit_frame, scatter, to_pixels


def test_a_canvas_is_white_until_something_is_put_on_it():
    canvas = Canvas(30, 20)
    assert canvas.pixels().shape == (20, 30, 3) and (canvas.pixels() == 255).all()
    canvas.put(np.zeros((4, 5, 3), np.uint8), 10, 3)
    assert (canvas.pixels()[3:7, 10:15] == 0).all() and (canvas.pixels() == 0).all(-1).sum() == 20


def test_a_canvas_begins_with_what_is_below_and_leaves_it_as_it_was():
    below = np.full((20, 30, 3), 7, np.uint8)
    canvas = Canvas(30, 20, below)
    canvas.write("words", 0, 0)
    assert (canvas.pixels() != below).any() and (below == 7).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 210, 160), (3, 6, 12), (3, 100, 1)])
def test_a_frame_of_any_shape_fits_into_a_square(shape):
    frame = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    assert fit_frame(frame, 64).shape == (64, 64, 3)


def test_an_enlarged_frame_has_its_own_colours_only():
    frame = np.random.default_rng(0).integers(255, size=(3, 8, 8)).astype(np.uint8)
    assert np.array_equal(fit_frame(frame, 64)[4::8, 4::8], np.moveaxis(frame, 0, -1))
    assert np.array_equal(fit_frame(frame / np.float32(255), 64), fit_frame(frame, 64))
    assert (fit_frame(np.full((3, 2, 2), 1.5, np.float32), 4) == 255).all()


def test_each_dot_is_where_its_point_is():
    points, colors = np.array([[-1., 1], [0, 0], [1, -1], [2, 0]]), np.eye(4, 3, dtype=np.uint8) * 9
    picture, at = scatter(points, colors, 101), to_pixels(points[:3], 101)
    assert at.tolist() == [[0, 0], [50, 50], [100, 100]]
    assert all(np.array_equal(picture[y, x], color) for (x, y), color in zip(at, colors))
    dots = (picture < 244).all(-1)
    assert dots[48:53, 48:53].sum() == 21 and dots.sum() < 21 * 3


def test_later_dots_hide_earlier_ones():
    picture = scatter(np.zeros((2, 2)), np.array([[1, 1, 1], [2, 2, 2]], np.uint8), 11)
    assert picture[5, 5].tolist() == [2, 2, 2]


def test_colours_go_from_the_least_to_the_most_and_what_is_unknown_is_grey():
    colors, low, high = color_dots(np.array([3., np.nan, 5, 3]))
    assert (low, high) == (3, 5) and colors[1].tolist() == [190] * 3
    assert colors[0].tolist() == colors[3].tolist() != colors[2].tolist()
    assert color_dots(np.full(3, np.nan))[1:] == (0, 0) and color_dots(np.ones(3))[1:] == (1, 1)


def test_a_bar_of_one_number_has_one_colour():
    canvas, other = Canvas(60, 100), Canvas(60, 100)
    canvas.color_bar(0, 20, 80, "", 1, 1)
    other.color_bar(0, 20, 80, "", 0, 1)
    assert len(np.unique(canvas.pixels()[20:, 5], axis=0)) == 1
    assert len(np.unique(other.pixels()[20:, 5], axis=0)) > 50
