"The latent explorer: a picture of its state alone, a pointer that finds frames, models encoded once."
from dataclasses import replace

import numpy as np
import pytest

from worldmodels_nb.widgets import latents
from worldmodels_nb.widgets.base import picture_bytes
from worldmodels_nb.widgets.canvas import to_pixels
from worldmodels_nb.widgets.latents import LatentExplorer

LEFT, TOP, SIDE, PITCH = 8, 42, 300, 316  # px, of a map


@pytest.fixture
def explorer(rooms): return LatentExplorer(rooms)


@pytest.fixture
def encoded(monkeypatch):
    "The models that encode from here on, and how many frames."
    calls, real = [], latents.encode_rows
    def call(model, data, rows):
        calls.append((model.registered, len(rows)))
        return real(model, data, rows)
    monkeypatch.setattr(latents, "encode_rows", call)
    return calls


def spot(view, frame, panel=0):
    "Where the dot of a frame is on the picture."
    panels, _ = view._panels(view.state)
    points = next(iter(panels[panel].values()))
    return to_pixels(points[frame], SIDE) + (LEFT + panel * PITCH, TOP)


def test_a_picture_depends_on_its_state_alone(rooms, depends_on_its_state_alone):
    depends_on_its_state_alone(lambda: LatentExplorer(rooms))


@pytest.mark.parametrize("name, value", [
    ("model", "jepa"), ("second", "none"), ("second", "jepa"), ("color", "time"), ("color", "reward"),
    ("color", "episode"), ("color", "model"), ("points", 5), ("frame", 7), ("start", 4)])
def test_a_control_redraws_the_picture_and_back(explorer, redraws_and_goes_back, name, value):
    redraws_and_goes_back(explorer, name, value)


def test_the_pointer_finds_the_frame_of_a_dot_on_either_map(explorer):
    for frame, panel in ((3, 0), (9, 1), (12, 1)):
        explorer.pointed("hover", *spot(explorer, frame, panel))
        found = explorer.state["frame"]
        assert np.array_equal(spot(explorer, found, panel), spot(explorer, frame, panel))
    assert explorer.state["start"] == 0


def test_a_click_plays_from_the_frame(explorer):
    before = explorer.image.number
    explorer.pointed("click", *spot(explorer, 6))
    assert explorer.state["start"] == explorer.state["frame"] and explorer.image.number == before + 1
    assert explorer.image.value == picture_bytes(explorer.render(explorer.state))


@pytest.mark.parametrize("x, y", [(2, 100), (100, 10), (LEFT + SIDE + 4, 100), (700, 100), (100, 500)])
def test_beside_the_maps_the_pointer_finds_nothing(explorer, x, y):
    before = explorer.image.number
    for what in ("hover", "click"): explorer.pointed(what, x, y)
    assert explorer.image.number == before


def test_of_few_dots_only_those_that_are_drawn_are_found(explorer):
    explorer.change(points=2)
    for x in range(LEFT, LEFT + SIDE, 50): explorer.pointed("hover", x, 150)
    assert explorer.state["frame"] in (0, len(explorer.rows) - 1)


def test_keys_go_along_the_frames_and_play(explorer):
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"): explorer.key_pressed(key)
    explorer.key_pressed("ArrowRight", down=False)
    assert (explorer.state["frame"], explorer.state["start"]) == (1, 1)
    explorer.change(frame=0)
    explorer.key_pressed("ArrowLeft")
    assert explorer.state["frame"] == 0


def test_two_models_show_the_same_frames_encoded_once(rooms, encoded):
    view = LatentExplorer(rooms)
    n = len(view.rows)
    assert encoded[:2] == [("encdec", n), ("vjepa2", n)]
    view.change(color="time", frame=3)
    view.change(second="none")
    view.change(second="vjepa2", start=0)
    assert [names for names, count in encoded if count == n] == ["encdec", "vjepa2"]
    panels, _ = view._panels(view.state)
    assert [list(panel) for panel in panels] == [["encdec"], ["vjepa2"]]
    view.change(color="model")
    assert [list(panel) for panel in view._panels(view.state)[0]] == [["encdec", "vjepa2"]]


def test_a_film_is_the_episode_and_the_models_rollout(explorer, rooms):
    model, data = rooms.models["jepa"], rooms.data.dataset
    true, imagined = explorer.film("jepa", 0)
    assert true.shape == imagined.shape and len(true) == 1 + min(8, data.lengths[1])
    assert np.array_equal(true[0], imagined[0]) and not np.allclose(true[1], imagined[1])
    first = rooms.data.dataset.starts[1]
    assert np.allclose(true, latents.encode_rows(model, data, first + np.arange(len(true))), atol=1e-5)


def test_a_film_ends_with_its_episode(explorer, rooms):
    last = int(rooms.data.dataset.lengths[1])
    assert [len(explorer.film("jepa", start)[0]) for start in (last - 1, last)] == [2, 1]
    explorer.change(start=last)
    assert explorer.message.value == ""


def test_an_episodes_last_frame_has_no_reward(explorer, rooms):
    values, data = explorer.color_values("reward"), rooms.data.dataset
    ends = np.isnan(values)
    assert ends.sum() == len(rooms.data.validation)
    assert np.array_equal(values[~ends], data.rewards[explorer.rows[~ends]])
    assert explorer.color_values("time").max() == data.lengths.max()
    assert np.unique(explorer.color_values("episode")).tolist() == rooms.data.validation.tolist()


def test_the_picture_in_words_names_what_it_shows(explorer):
    explorer.change(frame=2, color="time")
    assert all(word in explorer.image.alt for word in ("PCA", "encdec and vjepa2", "time", "step 2"))


def test_another_environment_without_positions_or_a_plane(cart, redraws_and_goes_back):
    view = LatentExplorer(cart)
    assert view.message.value == "" and view.image.value
    changes = dict(color="reward", frame=4, start=3)
    for name, value in changes.items(): redraws_and_goes_back(view, name, value)


def test_without_states_decoders_or_a_second_model(rooms, monkeypatch):
    bare = replace(rooms, decoders={}, models={"jepa": rooms.models["jepa"]})
    view = LatentExplorer(bare)
    assert view.message.value == "" and view.state["second"] == "none"
    monkeypatch.setattr(rooms.data.dataset, "states", None)
    assert LatentExplorer(bare).controls["color"].options == ("time", "reward", "episode", "model")


def test_a_state_that_never_changes_colours_nothing(explorer, rooms, monkeypatch):
    states = rooms.data.dataset.states.copy()
    states[:, 1] = 5
    monkeypatch.setattr(rooms.data.dataset, "states", states)
    names, offered = rooms.data.dataset.spec.state_names, LatentExplorer(rooms).controls["color"].options
    assert names[0] in offered and names[1] not in offered


def test_an_unfinished_run_says_what_is_missing(rooms):
    view = LatentExplorer(replace(rooms, models={}))
    assert "no model" in view.message.value and view.image.value == b""
    view.pointed("hover", 100, 100)
    view.key_pressed("ArrowRight")
    view.opened = rooms
    with view.hold(): view.use(rooms)
    assert view.message.value == "" and view.image.value
    assert "gone" in LatentExplorer(replace(rooms, data=None, notes=["The data are gone."])).message.value


def test_only_one_kind_of_map_is_no_choice(explorer, monkeypatch):
    monkeypatch.setattr(latents, "projections", lambda: ["PCA"])
    explorer.show()
    assert explorer.controls["projection"].disabled
    monkeypatch.setattr(latents, "projections", lambda: ["PCA", "UMAP"])
    explorer.show()
    assert not explorer.controls["projection"].disabled


def test_thousands_of_points_are_drawn_from_the_same_map(explorer):
    view, n = explorer, 4000
    rng = np.random.default_rng(0)
    view.rows = np.sort(rng.choice(view.rows, n))
    view._cache.clear()
    for name, model in view.opened.models.items():
        view._cache["latents", name] = rng.normal(size=(n, *model.latent_shape)).astype("f")
    view.controls["frame"].max = n - 1
    view.controls["points"].options = [n]
    view.change(points=n, frame=n - 1)
    view.pointed("hover", *spot(view, 1234, 1))
    assert view.message.value == ""
    assert np.array_equal(spot(view, view.state["frame"], 1), spot(view, 1234, 1))
