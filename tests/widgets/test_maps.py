"Latents on a plane: encoded once a frame, placed alike, turned towards one another."
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rollout_tools import untrained_run
from run_tools import refused

from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.viz import pca2, pca_share
from worldmodels_nb.widgets import maps
from worldmodels_nb.widgets.maps import (
    encode_rows,
    map_latents,
    nearest_frames,
    projections,
    turn_towards,
    validation_rows,
)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("stacked"), {"model.frame_stack": 3}, ["jepa"])


@pytest.fixture
def points(): return np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 7)


def test_a_latent_is_what_the_model_encodes_of_the_frame_and_those_before(stacked):
    data, model = stacked.data.dataset, stacked.models["jepa"]
    window = Windows(data, np.array([1]), 3, 3).batch(np.array([0]))
    together = model.encode(window.frames)[0]
    z = encode_rows(model, data, data.starts[1] + np.arange(4), batch=3)
    assert z.shape == (4, *model.latent_shape) and torch.allclose(z, together, atol=1e-5)


def test_a_model_that_has_diverged_is_named(stacked):
    class Broken:
        registered, frame_stack = "jepa", 1
        def encode(self, frames): return torch.full((len(frames), 1, 1, 4), torch.nan)
    with refused(ValueError, "jepa", "not finite", "train.learning_rate"):
        encode_rows(Broken(), stacked.data.dataset, np.arange(3))


def test_held_out_frames_are_evenly_taken(stacked):
    rows = validation_rows(stacked, 1000)
    assert set(rows) == set(range(stacked.data.dataset.starts[1], len(stacked.data.dataset.frames)))
    assert len(validation_rows(stacked, 5)) <= 5


def test_without_data_or_models_there_is_one_sentence(stacked):
    with refused(ValueError, "no model", "finish"): validation_rows(replace(stacked, models={}), 10)
    with refused(ValueError, "not here"):
        validation_rows(replace(stacked, data=None, notes=["The data are not here."]), 10)


def test_a_map_is_pca_at_a_scale_of_one_and_places_other_latents(points):
    found, plane = map_latents(points), pca2(points)
    scale = np.sqrt(np.square(plane).sum(1).mean())
    assert np.allclose(found.points, plane / scale) and np.allclose(found.share, pca_share(points))
    assert np.isclose(np.square(found.points).sum(1).mean(), 1)
    assert np.allclose(found.place(points), found.points)
    assert np.allclose(found.place(points[:1] * .3 + points[1:2] * .7),
                       found.points[0] * .3 + found.points[1] * .7)


@pytest.mark.parametrize("z", [np.zeros((5, 1, 3)), np.ones((2, 1, 8)), np.arange(4.).reshape(4, 1, 1)])
def test_a_map_of_next_to_nothing_is_still_a_map(z):
    found = map_latents(z)
    assert found.points.shape == (len(z), 2) and np.isfinite(found.points).all()
    assert np.isfinite(found.place(z)).all()


def test_a_turned_map_is_turned_back_and_places_latents_so(points):
    found, mirror = map_latents(points), np.array([[.6, .8], [.8, -.6]])
    away = replace(found, points=found.points @ mirror, axes=found.axes @ mirror)
    back = turn_towards(away, found)
    assert np.allclose(back.points, found.points) and np.allclose(back.place(points), found.points)
    flat = replace(away, axes=None, origin=None, share=None)
    assert np.allclose(turn_towards(flat, found).points, found.points)
    assert turn_towards(flat, found).place(points) is None


def test_neighbours_are_of_other_episodes_where_there_are_any():
    z, episode = np.array([0., .1, .2, 5, 1, 9])[:, None, None], np.array([0, 0, 0, 1, 1, 2])
    assert nearest_frames(z, 0, episode, 2).tolist() == [4, 3]
    assert nearest_frames(z, 5, episode, 9).tolist() == [3, 4, 2, 1, 0]
    assert nearest_frames(z, 1, np.zeros(6), 2).tolist() == [0, 2]


def test_umap_is_offered_where_it_is_installed(points, monkeypatch):
    class UMAP:
        def __init__(self, **options): self.options = options
        def fit_transform(self, z): return z[:, :2].astype(np.float32) + 7
    monkeypatch.setattr(maps, "find_spec", lambda name: None)
    assert projections() == ["PCA"]
    monkeypatch.setattr(maps, "find_spec", lambda name: name == "umap")
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    assert projections() == ["PCA", "UMAP"]
    found = map_latents(points, "UMAP")
    assert np.allclose(found.points.mean(0), 0, atol=1e-6) and found.share is None
    assert found.place(points) is None
