"There and back changes nothing; a stranger's dataset starts nothing."

import functools
import json
import os
import sys

import gymnasium as gym
import numpy as np
import pytest

from worldmodels_nb.data.datasets import make_dataset, open_dataset, sample_dataset
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DatasetError, DataSpec, EpisodeWriter
from worldmodels_nb.data.minari import from_minari, to_minari
from worldmodels_nb.settings import make_settings

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


def foreign(folder, images, action_space, actions, space=None, **metadata):
    "A Minari dataset as others make them, one episode."
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    space, n = space or gym.spaces.Box(0, 255, images.shape[1:], np.uint8), len(actions)
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


# ---------------------------------------------------------------- actions that begin elsewhere


class Counter(gym.Env):
    "The picture's brightness is the sum of the actions, which begin anywhere."

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Box(0, 1, (1,))

    def __init__(self, n=3, start=1, render_mode=None):
        self.action_space, self.render_mode = gym.spaces.Discrete(n, start=start), render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sum = 100
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.sum += int(action)
        return np.zeros(1, np.float32), float(action), False, False, {}

    def render(self):
        return np.full((8, 8, 3), self.sum, np.uint8)


gym.register("Counter-v0", Counter)
gym.register("CounterByName-v0", f"{__name__}:Counter")


def counted(tmp_path, id, **kwargs):
    collect = {"episodes": 3, "steps": 4, "policy": "random"}
    values = {"env": {"id": id, "kwargs": kwargs, "size": 8}, "collect": collect}
    values |= {"model": {"patch_size": 8}, "decoder": {"patch_size": 8}}
    values["data"] = {"dir": str(tmp_path / "sets")}
    return make_dataset(make_settings(values), progress=False)


@pytest.mark.parametrize("n, start", [(3, 1), (2, -5), (4, 7), (3, 0)])
def test_discrete_actions_keep_their_beginning(tmp_path, n, start):
    data = counted(tmp_path, "Counter-v0", n=n, start=start)
    assert data.spec.action == ActionSpec("discrete", n) and data.info["first_action"] == start
    theirs = minari.MinariDataset(to_minari(data, tmp_path / "export"))
    assert theirs.action_space == gym.spaces.Discrete(n, start=start)
    for i, episode in enumerate(theirs.iterate_episodes()):
        assert np.array_equal(episode.actions, data.episode(i).actions + start)
        assert np.array_equal(episode.actions, episode.rewards)  # what the environment itself was given
    back = from_minari(tmp_path / "export", tmp_path / "back")
    assert back.hash == data.hash and back.info["first_action"] == start
    again = minari.MinariDataset(to_minari(back, tmp_path / "again"))
    assert again.action_space == theirs.action_space
    grey = from_minari(tmp_path / "export", tmp_path / "grey", color="grey")
    assert np.array_equal(grey.actions, data.actions) and grey.info["first_action"] == start


# ---------------------------------------------------------------- naming the environment


def test_an_environment_registered_by_its_class_is_named(tmp_path, recwarn):
    for id in ("Counter-v0", "CounterByName-v0", f"{__name__}:Counter-v0"):
        data = sample_dataset()
        data.info["settings"]["env"] = dict(id=id, kwargs={"start": 4})
        theirs = minari.MinariDataset(to_minari(data, tmp_path / id.replace(":", "-")))
        assert theirs.env_spec.entry_point == f"{__name__}:Counter" and theirs.env_spec.kwargs == {"start": 4}
    assert not [one for one in recwarn if "does not say how" in str(one.message)]


NOWHERE = "no module it could be imported from"


def hidden_away():
    class Local(Counter):
        pass

    return Local


@pytest.mark.parametrize(
    "maker, kwargs, why",
    [
        (hidden_away(), {}, NOWHERE),
        (lambda render_mode=None: Counter(), {}, NOWHERE),
        (functools.partial(Counter, 5), {}, NOWHERE),
        (type("Typed", (Counter,), {"__module__": "__main__"}), {}, NOWHERE),
        (type("Typed", (Counter,), {"__module__": "not_imported"}), {}, NOWHERE),
        (Counter, {"n": object()}, "object"),
        (None, {}, "not registered here"),
    ],
)
def test_an_environment_that_cannot_be_named_is_left_out_with_a_word(tmp_path, maker, kwargs, why):
    if maker is not None:
        gym.register("Odd-v0", maker, kwargs=kwargs)
    data = sample_dataset()
    data.info["settings"]["env"] = dict(id="module_nobody_has:Odd-v0", kwargs={})
    says = f"does not say how to make 'module_nobody_has:Odd-v0': .*{why}"
    with pytest.warns(UserWarning, match=says) as said:
        theirs = minari.MinariDataset(to_minari(data, tmp_path / "export"))
    gym.registry.pop("Odd-v0", None)
    assert len([one for one in said if "does not say" in str(one.message)]) == 1
    assert theirs.env_spec is None and theirs.total_steps == 88
    assert from_minari(tmp_path / "export", tmp_path / "back").hash == data.hash


def test_an_export_imports_nothing_that_a_record_names(tmp_path, monkeypatch):
    (tmp_path / "trap_of_a_stranger.py").write_text("raise SystemExit('sprung')")
    monkeypatch.syspath_prepend(tmp_path)
    data = sample_dataset()
    data.info["settings"]["env"] = dict(id="trap_of_a_stranger:Trap-v0", kwargs={})
    with pytest.warns(UserWarning, match="not registered here"):
        to_minari(data, tmp_path / "export")
    assert "trap_of_a_stranger" not in sys.modules


# ---------------------------------------------------------------- other people's data

TWO = gym.spaces.Discrete(2), np.array([0, 1])


@pytest.mark.parametrize(
    "images, space",
    [
        (np.arange(3 * 3 * 40 * 40).reshape(3, 3, 40, 40).astype(np.uint8), None),
        (np.linspace(0, 1, 14400, dtype="f").reshape(3, 40, 40, 3), gym.spaces.Box(0, 1, (40, 40, 3))),
        (np.full((3, 40, 40, 4), 255, np.uint8), None),
        (np.linspace(0, 1, 4800, dtype="f").reshape(3, 40, 40), gym.spaces.Box(0, 1, (40, 40))),
    ],
    ids=["channels first", "floats", "alpha", "grey floats"],
)
def test_pictures_of_other_layouts_are_imported(tmp_path, images, space):
    data = from_minari(foreign(tmp_path / "source", images, *TWO, space=space), tmp_path / "set")
    assert data.spec.frame_shape == (3, 40, 40) and len(data.frames) == 3
    if images.shape[1] == 3:
        assert np.array_equal(data.frames, images)
    elif images.dtype == np.float32:
        last = images if images.ndim == 4 else images[..., None]
        assert np.abs(data.frames / 255 - np.moveaxis(last, -1, 1)).max() < 0.003


def declared(name, value):
    "Metadata in which one space is another."
    def change(folder):
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata[name] = value if isinstance(value, str) else minari.serialization.serialize_space(value)
        (folder / "metadata.json").write_text(json.dumps(metadata))

    return change


def in_file(change):
    def changed(folder):
        with h5py.File(folder / "main_data.hdf5", "r+") as file:
            change(file["episode_0"])

    return changed


def put(name, value):
    def change(group):
        del group[name]
        group[name] = value

    return change


def replaced(folder, name, content):
    (folder / name).unlink()
    (folder / name).write_bytes(content)


image = gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        declared("observation_space", gym.spaces.Dict(pixels=image, position=gym.spaces.Box(0, 1, (2,)))),
        declared("observation_space", gym.spaces.Tuple([image, image])),
        declared("observation_space", gym.spaces.Text(5)),
        declared("observation_space", gym.spaces.Box(-1, 1, (40, 40, 3))),
        declared("observation_space", gym.spaces.Box(0, 255, (40, 40, 5), np.uint8)),
        declared("observation_space", gym.spaces.Box(0, 255, (20, 20, 3), np.uint8)),
        declared("observation_space", "null"),
        declared("observation_space", '{"type": "Graph"}'),
        declared("observation_space", "[" * 5000),
        declared("action_space", gym.spaces.MultiDiscrete([2, 2])),
        declared("action_space", gym.spaces.MultiBinary(3)),
        declared("action_space", gym.spaces.Box(-np.inf, np.inf, (2,))),
        declared("action_space", gym.spaces.Discrete(1)),
        declared("action_space", gym.spaces.Discrete(2, start=1)),
        declared("data_format", "pickle"),
        declared("env_spec", "{" * 100),
        declared("env_spec", "{1: 2}"),
        declared("env_spec", "9" * 5000),
        lambda folder: replaced(folder, "metadata.json", b"[]"),
        lambda folder: replaced(folder, "metadata.json", b"\xff\xfe"),
        lambda folder: replaced(folder, "main_data.hdf5", b"no HDF5"),
        lambda folder: (folder / "main_data.hdf5").unlink(),
        lambda folder: os.mkfifo(folder / "pipe"),
        in_file(put("rewards", np.array([0.5, np.nan]))),
        in_file(put("rewards", np.array([0.5, 1e300]))),
        in_file(put("rewards", np.array([0.5]))),
        in_file(put("rewards", np.array([b"a", b"b"]))),
        in_file(put("actions", np.array([0, 7]))),
        in_file(put("actions", np.array([[0, 1], [1, 0]]))),
        in_file(put("observations", np.zeros((3, 40, 40, 3), np.float64) + 3000)),
        in_file(put("observations", np.zeros((2, 40, 40, 3), np.uint8))),
        in_file(lambda group: group.pop("terminations")),
        in_file(lambda group: group.parent.move("episode_0", "episode_one")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_imported_says_why_in_one_sentence(tmp_path, left_in, monkeypatch, change):
    source = foreign(tmp_path / "source", np.zeros((3, 40, 40, 3), np.uint8), *TWO)
    change(source)
    monkeypatch.setattr(gym, "make", lambda *a, **k: pytest.fail("an environment was made"))
    with pytest.raises(DatasetError) as caught:
        from_minari(source, tmp_path / "set")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert left_in(tmp_path) == ["source"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["spec"].update(position=[9]),
        lambda record: record["spec"].pop("action"),
        lambda record: record.update(files=None),
        lambda record: record.update(hash="../.."),
        lambda record: record.update(settings=3),
    ],
)
def test_a_record_of_ours_that_lies_is_refused(tmp_path, left_in, change):
    export = to_minari(sample_dataset(), tmp_path / "export")
    metadata = json.loads((export / "metadata.json").read_text())
    change(metadata["worldmodels_nb"])
    (export / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(DatasetError) as caught:
        from_minari(export, tmp_path / "set")
    assert "\n" not in str(caught.value) and left_in(tmp_path) == ["export"]


def test_whether_data_can_be_made_again_travels_along(tmp_path, discrete, make_episodes):
    with EpisodeWriter(tmp_path / "set", discrete, {}, reproducible=False) as writer:
        writer.add(make_episodes(discrete, [3])[0])
    data = open_dataset(tmp_path / "set")
    back = from_minari(to_minari(data, tmp_path / "export"), tmp_path / "back", color="grey")
    assert back.hash == data.hash and back.info["reproducible"] is False
