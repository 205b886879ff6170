"The picture of rollouts as pixels: what it shows at a step, and what stands at a place of it."
import numpy as np
import pytest

from worldmodels_nb.data.tworooms import ActionSpec
from worldmodels_nb.runs.counterfactuals import ROWS, Rolled
from worldmodels_nb.widgets.sheets import Sheet

PLANE = ActionSpec("continuous", 2, [-1, -1], [1, 1])


def film(n, size=24, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, 3, size, size), dtype=np.uint8)


def rolled(n, rows=ROWS, seed=1, metric="pixel"):
    line = np.linspace(.1, 1, n - 1)
    return Rolled({row: film(n, seed=seed) for row in rows}, {metric: dict(model=line, persistence=2 * line)})


def make(n=6, models=None, spec=PLANE, actions=None):
    if models is None: models = dict(one=rolled(n), two=rolled(n, ROWS[:2], 2))
    if actions is None: actions = spec.zeros(n - 1)
    return Sheet(film(n), "truth", models, actions, spec)


@pytest.mark.parametrize("n", [2, 6, 11, 33])
@pytest.mark.parametrize("models", [1, 2, 4, 7])
def test_it_fits_a_screen_whatever_it_shows(n, models):
    sheet = make(n, {f"model {i}": rolled(n, seed=i) for i in range(models)})
    height, width, _ = sheet.at(n - 1).shape
    assert width <= 1000 and height <= 650
    left, top, wide, high = sheet.pad
    assert left + wide <= width and top + high <= height and sheet.x_of(n - 1) < sheet.right


def test_each_step_is_a_picture_and_a_step_too_far_is_the_last():
    sheet = make()
    pictures = [sheet.at(step) for step in range(6)]
    assert len({picture.tobytes() for picture in pictures}) == 6
    assert np.array_equal(sheet.at(40), pictures[-1]) and np.array_equal(sheet.at(2), pictures[2])
    assert pictures[0].dtype == np.uint8


@pytest.mark.parametrize("n", [2, 6, 25])
def test_a_step_is_found_where_it_stands(n):
    sheet = make(n)
    assert [sheet.step_at(sheet.x_of(step)) for step in range(n)] == list(range(n))


def test_frames_are_shown_as_they_are():
    sheet = make(3, dict(one=rolled(3, ROWS[:1])))
    side, x = sheet.large, sheet.right
    large = sheet.at(2)[15:15 + side, x:x + side]
    pick = (np.arange(24) * side / 24 + side / 48).astype(int)   # the middle of each pixel
    off = np.abs(large[np.ix_(pick, pick)].astype(int) - np.moveaxis(film(3)[2], 0, -1))
    assert side >= 72 and off.max() <= 5                         # three bits are left out


def test_errors_are_said_with_their_unit():
    assert make().error_at(0, "one") == "" and make().error_at(5, "one") == "1"
    sheet = make(3, dict(one=rolled(3, metric="position")))
    assert sheet.error_at(2, "one") == "1 px" and sheet.error_at(2, "one", "persistence") == "2 px"


def test_the_error_is_one_that_all_models_have():
    own = {metric: rolled(4, metric=metric).errors[metric] for metric in ("position", "latent")}
    both = dict(one=Rolled({}, own), two=rolled(4, metric="latent"))
    assert make(4, both).metric == "latent" and make(4, dict(one=both["one"])).metric == "position"


@pytest.mark.parametrize("spec, actions", [
    (ActionSpec("discrete", 4), np.array([0, 3, 1, 2, 0])),
    (ActionSpec("continuous", 1, [-2], [2]), np.linspace(-2, 2, 5, dtype=np.float32)[:, None]),
    (ActionSpec("continuous", 3, [-1, 0, 5], [1, 1, 5]), np.tile(np.float32([0, 1, 5]), (5, 1)))])
def test_any_actions_have_a_place_on_the_pad(spec, actions):
    sheet = make(6, spec=spec, actions=actions)
    other = make(6, spec=spec, actions=actions[::-1] if spec.n != 3 else -actions + 1)
    assert not np.array_equal(sheet.at(5), other.at(5))
    left, top, width, height = sheet.pad
    spots = np.array([sheet._spots(step) for step in range(5)])
    assert spots.shape == (5, 1 if spec.kind == "discrete" else spec.n, 2)
    assert (spots >= [left, top]).all() and (spots <= [left + width, top + height]).all()
