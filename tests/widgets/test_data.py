"The data explorer without a browser: what it shows, how it is moved, and what it says of what is broken."
import shutil
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest

from worldmodels_nb.data.datasets import make_sample, open_dataset
from worldmodels_nb.data.episodes import DataSpec, Episode, EpisodeWriter
from worldmodels_nb.data.tworooms import ActionSpec
from worldmodels_nb.runs.reopen import open_run
from worldmodels_nb.settings import shipped
from worldmodels_nb.viz import curves
from worldmodels_nb.widgets.data import Backdrop, EpisodeExplorer, draw_states, draw_timeline, fit_frames

RED = [204, 0, 0]


@pytest.fixture(scope="module")
def opened(): return open_run("sample")


@pytest.fixture
def explorer(opened): return EpisodeExplorer(opened)


def test_a_picture_depends_on_its_state_alone(depends_on_its_state_alone, opened):
    depends_on_its_state_alone(lambda: EpisodeExplorer(opened))


@pytest.mark.parametrize(("name", "value"), [("step", 3), ("episode", 2)])
def test_a_control_redraws_the_picture_and_back(explorer, redraws_and_goes_back, name, value):
    redraws_and_goes_back(explorer, name, value)


def test_the_large_frame_is_the_frame(explorer, sample):
    explorer.change(episode=2, step=4)
    picture = explorer.render(explorer.state)
    truth = np.moveaxis(sample.episode(2).frames[4], 0, -1)
    assert picture.shape == (718, 896, 3) and np.array_equal(picture[3:384:6, 3:384:6], truth)


def test_the_strip_has_the_present_frame_with_a_red_border(explorer, sample):
    for step, place in ((0, 0), (5, 3), (11, 6)):
        explorer.change(step=step)
        strip = explorer.render(explorer.state)[392:520]
        assert strip[0, place * 128 + 64].tolist() == RED
        assert [(strip[0, k * 128 + 64] == RED).all() for k in range(7)].count(True) == 1
        truth = np.moveaxis(sample.episode(0).frames[step], 0, -1)
        assert np.array_equal(strip[5:-4:2, place * 128 + 5:place * 128 + 124:2], truth[2:-2, 2:-2])


def test_steps_end_where_the_episode_ends(explorer, sample):
    assert explorer.controls["step"].max == explorer.play.max == sample.lengths[0]
    with pytest.raises(ValueError, match="has no step 12"): explorer.render(explorer.state | {"step": 12})
    with pytest.raises(ValueError, match="no episode 8"): explorer.render(explorer.state | {"episode": 8})


def test_keys_and_clicks_move_the_slider(explorer):
    explorer.change(step=5)
    explorer.key_pressed("ArrowRight")
    explorer.key_pressed("ArrowRight", down=False)
    assert explorer.state["step"] == 6
    explorer.pointed("click", 10, 450)                            # the first frame of the strip: 3 before
    assert explorer.state["step"] == 3
    for _ in range(5): explorer.key_pressed("ArrowLeft")
    assert explorer.state["step"] == 0
    column, _ = draw_timeline(explorer.data, 0).at(9)
    explorer.pointed("click", column, 600)
    assert explorer.state["step"] == 9
    explorer.pointed("click", 100, 100)                           # on the large frame
    explorer.pointed("hover", 10, 450)
    assert explorer.state["step"] == 9


def test_a_backdrop_knows_where_its_values_are():
    backdrop = Backdrop(curves({"line": ([0, 1], [0, 1], None, None)}, "x", "y", zero=False))
    (left, low), (right, high) = backdrop.at(0, 0), backdrop.at(1, 1)
    assert left < right and low > high
    assert [backdrop.value(left), backdrop.value(right)] == pytest.approx([0, 1], abs=.01)
    assert backdrop.at(99, 99) == (backdrop.pixels.shape[1] - 1, 0)


def test_what_stays_is_drawn_once(explorer):
    explorer.change(step=1)
    assert draw_timeline(explorer.data, 0) is draw_timeline(explorer.data, 0)
    assert draw_states(explorer.data) is draw_states(explorer.data)


@pytest.mark.parametrize("size", [8, 64, 96, 200, 500])
def test_frames_of_any_size_fit(size):
    frames = np.zeros((2, 1, size, size), np.uint8)
    pixels = fit_frames(frames, 128)
    black = (pixels == 0).all(-1).any((0, 1)).sum()
    assert pixels.shape == (2, 128, 128, 3) and 64 <= black <= 128


def made(folder, action, states, discrete):
    "A dataset of two short episodes of grey frames."
    names = ["speed", "angle"][:states]
    spec = DataSpec((1, 16, 16), action, names, [])
    rng = np.random.default_rng(0)
    with EpisodeWriter(folder, spec, {}) as writer:
        for k in range(2):
            steps = 3 + k
            actions = rng.integers(0, 3, steps) if discrete else rng.random((steps, 2), np.float32)
            state = rng.random((steps + 1, states)).astype(np.float32) if states else None
            frames = rng.integers(0, 255, (steps + 1, 1, 16, 16)).astype(np.uint8)
            writer.add(Episode(frames, actions, np.ones(steps, np.float32), k == 1, state, k))
    return folder


@pytest.mark.parametrize("states", [0, 2])
@pytest.mark.parametrize("discrete", [True, False])
def test_other_datasets_are_shown_too(opened, tmp_path, states, discrete):
    action = ActionSpec("discrete", 3) if discrete else ActionSpec("continuous", 2, [0.0, 0.0], [1.0, 1.0])
    folder = made(tmp_path / "data", action, states, discrete)
    explorer = EpisodeExplorer(opened, str(folder))
    assert explorer.message.value == "" and explorer.controls["dataset"].value == str(folder)
    explorer.change(episode=1, step=4)
    assert explorer.render(explorer.state).shape == (718, 896, 3) and "data" in explorer.image.alt


def break_it(folder, how):
    if how == "record": (folder / "dataset.json").write_text("{}")
    if how == "gone": (folder / "frames.npy").unlink()
    if how == "short": (folder / "rewards.npy").write_bytes(b"nothing")
    if how == "no dataset": shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize("how", ["record", "gone", "short", "no dataset"])
def test_a_broken_dataset_is_one_sentence_and_the_one_before_stays(explorer, tmp_path, how):
    folder = break_it(make_sample(tmp_path / "broken").folder, how)
    before, pick = explorer.image.value, explorer.controls["dataset"]
    pick.options = [*pick.options, str(folder)]
    pick.value = str(folder)
    assert str(folder) in explorer.message.value and "Traceback" not in explorer.message.value
    assert pick.value == "the run's" and explorer.image.value == before
    explorer.controls["step"].value = 1
    assert explorer.message.value == ""


def test_every_byte_is_checked_on_demand(opened, tmp_path):
    folder = make_sample(tmp_path / "mine").folder
    explorer = EpisodeExplorer(opened, str(folder))
    explorer.check.click()
    assert "every byte" in explorer.message.value
    frames = np.lib.format.open_memmap(folder / "frames.npy", mode="r+")
    frames[3, 0, 5, 5] ^= 1
    frames.flush()
    explorer.check.click()
    assert "frames.npy was altered" in explorer.message.value


def test_a_run_without_data_begins_with_the_sample_and_says_what_is_wrong(opened, sample):
    bare = replace(opened, data=None, notes=["There is no dataset here <b>."])
    explorer = EpisodeExplorer(bare)
    assert explorer.state["dataset"] == "sample" and explorer.data.hash == sample.hash
    explorer.controls["dataset"].value = "the run's"
    assert explorer.message.value == "There is no dataset here &lt;b&gt;."
    assert explorer.state["dataset"] == "sample"


def test_the_player_moves_the_slider_in_the_page(explorer):
    assert isinstance(explorer.play, ipywidgets.Play)
    assert explorer.link.source == (explorer.play, "value")
    assert explorer.link.target == (explorer.controls["step"], "value")
    assert open_dataset(shipped("data/sample/tworooms")).hash == explorer.data.hash
