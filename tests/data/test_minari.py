"There and back changes nothing; a stranger's dataset starts nothing."

import json
import sys

import gymnasium as gym
import numpy as np
import pytest

from worldmodels_nb.data.datasets import sample_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DatasetError, DataSpec
from worldmodels_nb.data.minari import from_minari, to_minari

minari = pytest.importorskip("minari")
h5py = pytest.importorskip("h5py")


def test_minari_and_back_changes_nothing(tmp_path, either, make_episodes, written, left_in):
    spec = DataSpec((either.frame_shape[0], 40, 40), either.action, either.state_names, either.position)
    env = dict(id="CartPole-v1", kwargs={})
    data = written(tmp_path / "set", spec, make_episodes(spec, [3, 1, 5]), env=env)
    color = "grey" if spec.frame_shape[0] == 1 else "rgb"
    back = from_minari(to_minari(data, tmp_path / "export"), tmp_path / "back", color=color)
    assert back.hash == data.hash and back.spec == spec and back.info["settings"] == data.info["settings"]
    for name in ("frames", "actions", "rewards", "terminated"):
        assert np.array_equal(getattr(back, name), getattr(data, name))
    assert left_in(tmp_path) == ["back", "export", "set"]


def test_minari_reads_the_export_by_itself(tmp_path):
    data = sample_dataset()
    theirs = minari.MinariDataset(to_minari(data, tmp_path / "export"))
    assert theirs.total_episodes == 8 and theirs.total_steps == 88
    assert theirs.env_spec.id == "worldmodels_nb/TwoRooms-v0"
    episode, ours = next(theirs.iterate_episodes([2])), data.episode(2)
    assert np.array_equal(episode.observations, np.moveaxis(ours.frames, 1, -1))
    assert np.array_equal(episode.actions, ours.actions)
    assert episode.truncations.tolist() == [False] * 10 + [True] and not episode.terminations.any()


def foreign(folder, images, action_space, actions, **metadata):
    "A Minari dataset as others make them, one episode."
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    space, n = gym.spaces.Box(0, 255, images.shape[1:], np.uint8), len(actions)
    storage = MinariStorage.new(folder, space, action_space, data_format="hdf5", jpeg_encoding=False)
    about = dict(dataset_id="theirs/images-v3", minari_version=minari.__version__)
    storage.update_metadata(about | metadata)
    ends = [False] * (n - 1) + [True]
    buffer = EpisodeBuffer(
        observations=images,
        actions=actions,
        rewards=[0.5] * n,
        terminations=ends,
        truncations=[False] * n,
    )
    storage.update_episodes([buffer])
    return folder


def test_a_strangers_image_dataset_is_imported(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 36), np.uint8)  # grey, not square
    source = foreign(tmp_path / "source", images, gym.spaces.Discrete(3, start=1), np.array([1, 3, 2, 1]))
    data = from_minari(source, tmp_path / "set", size=12, color="grey")
    assert data.spec == DataSpec((1, 12, 12), ActionSpec("discrete", 3), [], [])
    assert data.episode(0).actions.tolist() == [0, 2, 1, 0] and data.episode(0).terminated
    assert data.rewards[:4].tolist() == [0.5] * 4
    by_hand = images.reshape(5, 12, 4, 12, 3).mean((2, 4))  # 4 × 3 pixels become one
    assert np.abs(data.frames[:, 0] - by_hand).max() <= 0.51
    assert data.info["settings"]["minari"] == dict(dataset_id="theirs/images-v3")
    assert from_minari(source, tmp_path / "colour", size=12).spec.frame_shape == (3, 12, 12)


@pytest.mark.parametrize("size", [None, 40])
def test_a_strangers_dataset_without_images_is_refused(tmp_path, left_in, size):
    source = foreign(
        tmp_path / "source", np.zeros((3, 4), np.uint8), gym.spaces.Discrete(2), np.array([0, 1])
    )
    with pytest.raises(DatasetError, match="not uint8 images"):
        from_minari(source, tmp_path / "set", size)
    assert left_in(tmp_path) == ["source"]


def test_an_altered_export_is_refused_and_nothing_is_left(tmp_path, left_in):
    export = to_minari(sample_dataset(), tmp_path / "export")
    with h5py.File(export / "main_data.hdf5", "r+") as file:
        file["episode_3/observations"][2, 5, 5, 0] ^= 1
    with pytest.raises(DatasetError, match="content hash"):
        from_minari(export, tmp_path / "set")
    assert left_in(tmp_path) == ["export"]


def test_what_is_no_minari_dataset_says_so(tmp_path):
    with pytest.raises(DatasetError, match="not a Minari dataset"):
        from_minari(sample_dataset().folder, tmp_path / "nothing")


def test_an_export_never_replaces_anything(tmp_path, left_in):
    export = to_minari(sample_dataset(), tmp_path / "export")
    before = (export / "metadata.json").read_bytes()
    with pytest.raises(FileExistsError, match="there already"):
        to_minari(sample_dataset(), export)
    assert (export / "metadata.json").read_bytes() == before and left_in(tmp_path) == ["export"]


def test_an_export_on_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, left_in, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.File, "__init__", full)
    with pytest.raises(DatasetError, match="dataset export was not written: No space left on device"):
        to_minari(sample_dataset(), tmp_path / "export")
    assert left_in(tmp_path) == []


def test_an_import_may_change_size_and_colour(tmp_path):
    export = to_minari(sample_dataset(), tmp_path / "export")
    half = from_minari(export, tmp_path / "half", size=32, color="grey")
    assert half.spec.frame_shape == (1, 32, 32) and half.spec.state_names == []
    assert half.info["settings"]["env"]["id"] == "worldmodels_nb/TwoRooms-v0"


def test_a_minari_dataset_without_spaces_does_not_start_its_environment(tmp_path, monkeypatch):
    images = np.zeros((3, 40, 40, 3), np.uint8)
    source = foreign(tmp_path / "source", images, gym.spaces.Discrete(2), np.array([0, 1]))
    metadata = json.loads((source / "metadata.json").read_text())
    del metadata["action_space"]
    metadata |= dict(env_spec=gym.spec("CartPole-v1").to_json())
    (source / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.setattr(gym, "make", lambda *a, **k: pytest.fail("an environment was made"))
    with pytest.raises(DatasetError, match="declares no observation and action space"):
        from_minari(source, tmp_path / "set")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (
        lambda: to_minari(sample_dataset(), tmp_path / "a"),
        lambda: from_minari(tmp_path, tmp_path / "b"),
    ):
        with pytest.raises(DatasetError, match=r'pip install "worldmodels_nb\[minari\]"'):
            call()
