"Contracts of datasets and windows: checked when opened, made once, never across an episode's end."

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from worldmodels_nb.data import datasets as module
from worldmodels_nb.data.datasets import (
    Batch,
    Dataset,
    NoWindows,
    Windows,
    dataset_name,
    dataset_settings,
    make_dataset,
    make_sample,
    open_dataset,
    sample_dataset,
    verify,
)
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import (
    DatasetError,
    DataSpec,
    Episode,
    as_rows,
    content_hash,
    crosses_door,
    file_hash,
)
from worldmodels_nb.settings import load_settings, make_settings, repo_root

PLANE = ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0])
CONTINUOUS = DataSpec((3, 2, 4), PLANE, ["agent x", "wall x", "speed"], [0])


def in_memory(lengths, seed=0, spec=CONTINUOUS):
    "A dataset of random episodes that never was on disk."
    rng, rows = np.random.default_rng(seed), []
    for L in lengths:
        frames = rng.integers(0, 256, (L + 1, *spec.frame_shape), np.uint8)
        if spec.action.kind == "discrete":
            actions = rng.integers(0, spec.action.n, L)
        else:
            actions = rng.uniform(-1, 1, (L, spec.action.n)).astype(np.float32)
        names, rewards = len(spec.state_names), rng.normal(size=L).astype(np.float32)
        states = rng.normal(size=(L + 1, names)).astype(np.float32) if names else None
        rows.append(as_rows(Episode(frames, actions, rewards, bool(rng.random() < 0.5), states), spec))
    arrays = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    return Dataset(Path("toy"), dict(spec=asdict(spec), hash="0"), arrays)


# ---------------------------------------------------------------- opening

NAMES = ["actions", "frames", "lengths", "rewards", "states", "terminated"]


@pytest.fixture
def stored(tmp_path, continuous, make_episodes, written):
    return written(tmp_path / "set", continuous, make_episodes(continuous, [3, 2])).folder


def change_record(folder, change):
    record = json.loads((folder / "dataset.json").read_text())
    change(record)
    (folder / "dataset.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", NAMES)
def test_truncated_missing_and_altered_files_are_named(stored, name):
    path = stored / f"{name}.npy"
    content = path.read_bytes()
    n = len(content)
    path.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=f"{name}.npy has {n - 1} bytes and should have {n}"):
        open_dataset(stored)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if name != "lengths":
        open_dataset(stored)
    altered = "lengths|do not fit" if name == "lengths" else f"{name}.npy was altered"
    with pytest.raises(DatasetError, match=altered):
        verify(stored)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{name}.npy is missing"):
        open_dataset(stored)


def test_what_is_no_dataset_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(DatasetError, match="is not a dataset: it has no dataset.json"):
            open_dataset(path)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r.update(schema_version=2), "schema version 2, and this code reads 1"),
        (lambda r: r.pop("schema_version"), "schema version None"),
        (lambda r: r.pop("spec"), "damaged at 'spec'"),
        (lambda r: r["spec"].pop("action"), "damaged at 'action'"),
        (lambda r: r["spec"]["action"].update(surprise=1), "damaged"),
        (lambda r: r.update(files=[]), "damaged"),
        (lambda r: r["files"].pop("rewards"), "damaged at 'rewards'"),
        (
            lambda r: r["spec"].update(frame_shape=[3, 4, 2]),
            r"frames.npy is not a plain array of uint8 rows \(3, 4, 2\), but begins with .*\(7, 3, 2, 4\)",
        ),
        (lambda r: r["files"].update({"../../outside": dict(bytes=1, sha256="0")}), "damaged at '../../out"),
        (lambda r: r["files"].update({"/etc/passwd": dict(bytes=1, sha256="0")}), "damaged at '/etc/passwd'"),
        (lambda r: r["files"].update(frames="../frames.npy"), "damaged"),
        (lambda r: r["files"]["frames"].update(bytes="9"), "damaged at files"),
        (lambda r: r["files"]["frames"].update(bytes=-1), "frames.npy has .* bytes and should have -1"),
        (lambda r: r["files"]["frames"].update(bytes=10**30), "frames.npy has .* bytes and should have 1000"),
        (lambda r: r["files"]["frames"].update(bytes=True), "damaged at files"),
        (lambda r: r["files"]["frames"].update(sha256=None), "damaged at files"),
        (lambda r: r.update(hash="../../../elsewhere"), "damaged at hash"),
        (lambda r: r.update(hash="0" * 63), "damaged at hash"),
        (lambda r: r.update(hash=7), "damaged"),
        (lambda r: r.update(settings=[]), "damaged at settings"),
        (lambda r: r.update(settings={"env": "CartPole-v1"}), "damaged at settings"),
        (lambda r: r.update(counts=None), "damaged"),
        (lambda r: r["counts"].update(episodes=-2), "counts {'episodes': -2"),
        (lambda r: r["counts"].update(steps=10**12), "counts .*, not {'episodes': 2, 'steps': 5"),
        (lambda r: r["counts"].update(frames="7"), "damaged at counts"),
        (lambda r: r["counts"].pop("frames"), "damaged at counts"),
        (lambda r: r.update(door_crossing_share=2), "damaged at door_crossing_share"),
        (lambda r: r.update(reproducible="<b>"), "damaged at reproducible"),
        (lambda r: r.update(first_action="1"), "damaged at first_action"),
        (lambda r: r.update(spec=[]), "damaged"),
        (lambda r: r["spec"].update(position=[7]), "dataset.json is damaged: position of the data is"),
        (lambda r: r["spec"].update(frame_shape=None), "damaged"),
        (lambda r: r["spec"].update(state_names=[["x"], ["y"], ["z"]]), "damaged"),
        (lambda r: r["spec"]["action"].update(n=10**12), "dataset.json is damaged: action of the data is"),
        (lambda r: r["spec"]["action"].update(kind=[]), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(stored, change, says):
    change_record(stored, change)
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match=says) as caught:
            read(stored)
        assert "\n" not in str(caught.value) and str(stored) in str(caught.value)


def in_place_of(path, kind):
    "Something that is no plain file where one was."
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (path.parent.parent / "elsewhere").write_bytes(content)
        path.symlink_to("../elsewhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")


@pytest.mark.skipif(os.name != "posix", reason="pipes and links")
@pytest.mark.parametrize("name", ["dataset.json", "frames.npy", "lengths.npy", "states.npy"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_only_plain_files_are_read(stored, name, kind):
    in_place_of(stored / name, kind)
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match="no plain file|that is a plain file"):
            read(stored)


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is damaged: it is not JSON"),
        ("{", "is damaged: it is not JSON"),
        ('{"schema_version": 1,', "is damaged: it is not JSON"),
        ("\ufeff", "is damaged: it is not JSON"),
        ("[]", "schema version None"),
        ("[1]", "schema version None"),
        ("null", "schema version None"),
        ('{"schema_version": 2}', "schema version 2"),
        ('{"schema_version": 1}', "damaged at 'spec'"),
    ],
)
def test_a_record_that_is_not_one_is_refused(stored, content, says):
    (stored / "dataset.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match=says):
        open_dataset(stored)


def test_an_altered_record_is_found_by_verify(stored):
    assert verify(stored).hash == open_dataset(stored).hash
    change_record(stored, lambda record: record["spec"].update(position=[1]))
    open_dataset(stored)
    with pytest.raises(DatasetError, match="dataset.json was altered"):
        verify(stored)


def promise_size(stored, name):
    size = (stored / f"{name}.npy").stat().st_size
    change_record(stored, lambda record: record["files"][name].update(bytes=size))


def test_arrays_that_do_not_fit_together_are_refused(stored):
    np.save(stored / "rewards.npy", np.zeros(3, np.float32))
    promise_size(stored, "rewards")
    with pytest.raises(DatasetError, match="rewards do not fit"):
        open_dataset(stored)


class Spring:
    def __reduce__(self):
        return (os.mkdir, (str(Spring.trap),))


def test_pickled_objects_are_never_loaded(stored, tmp_path):
    Spring.trap = tmp_path / "sprung"
    np.save(stored / "rewards.npy", np.array([Spring()] * 7, object))
    promise_size(stored, "rewards")
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match="not a plain array"):
            read(stored)
    assert not Spring.trap.exists()


def forge(stored, name, change):
    "Change an array, and the record so that every hash fits."
    array = np.load(stored / f"{name}.npy")
    np.save(stored / f"{name}.npy", change(array))
    about = dict(bytes=(stored / f"{name}.npy").stat().st_size, sha256=file_hash(stored / f"{name}.npy"))

    def fit(record):
        record["files"][name] = about
        record["hash"] = content_hash(record)

    change_record(stored, fit)


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    "name, row, value, says",
    [
        ("states", 5, np.nan, "the data hold NaN: .*states.npy, row 5 .step 1 of episode 1."),
        ("states", (0, 2), np.inf, "the data hold inf: .*states.npy, row 0 .step 0 of episode 0."),
        ("rewards", 2, -np.inf, "the data hold -inf: .*rewards.npy, row 2 .step 2 of episode 0."),
        ("rewards", -1, np.nan, "the data hold NaN: .*rewards.npy, row 6 .step 2 of episode 1."),
        ("actions", (4, 1), np.nan, "the data hold NaN: .*actions.npy, row 4 .step 0 of episode 1."),
        ("lengths", 0, 0, "lengths do not fit|do not fit together"),
        ("lengths", 0, -1, "do not fit together"),
        ("lengths", 0, 2**63 - 1, "do not fit together"),
        ("lengths", slice(None), [-(2**62), 2**62 + 5], "do not fit together"),
        ("lengths", slice(None), [2**63 - 1, -(2**63) + 5], "do not fit together"),
    ],
)
def test_numbers_that_cannot_be_are_found_on_opening(stored, name, row, value, says):
    forge(stored, name, put(row, value))
    with pytest.raises(DatasetError, match=says) as caught:
        open_dataset(stored)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row, value", [(0, 5), (3, -1), (5, 2**40), (6, -(2**63))])
def test_actions_that_do_not_exist_are_found(tmp_path, discrete, make_episodes, written, row, value):
    folder = written(tmp_path / "set", discrete, make_episodes(discrete, [3, 2])).folder
    forge(folder, "actions", put(row, value))
    says = f"the data hold action {value}, and there are 0 to 4: .*actions.npy, row {row} "
    with pytest.raises(DatasetError, match=says):
        open_dataset(folder)


@pytest.mark.parametrize(
    "name, row, value, says",
    [
        ("actions", (1, 0), 1.5, "the action is out of the record's bounds at row 1 .step 1 of episode 0."),
        ("actions", (5, 1), -1.0000002, "the action is out of the record's bounds at row 5"),
        ("actions", (0, 1), 3e38, "the action is out of the record's bounds at row 0"),
        ("terminated", 1, True, "an episode ends, and goes on at row 1"),
        ("terminated", 4, True, "an episode ends, and goes on at row 4"),
        ("terminated", 6, True, "an episode ends, and goes on at row 6 .step 2 of episode 1."),
    ],
)
def test_what_is_possible_and_untrue_is_found_by_verify(stored, name, row, value, says):
    forge(stored, name, put(row, value))
    open_dataset(stored)
    with pytest.raises(DatasetError, match=says):
        verify(stored)


@pytest.mark.parametrize(
    "name, change",
    [
        ("frames", lambda array: array.astype(">u2")),
        ("frames", np.asfortranarray),
        ("rewards", lambda array: array.astype(">f4")),
        ("actions", lambda array: array.astype(np.float64)),
        ("states", lambda array: array.astype([("x", "<f4")])),
        ("states", lambda array: array[:, :2]),
        ("terminated", lambda array: array.astype(np.int8)),
        ("lengths", lambda array: array.astype(np.uint64)),
        ("lengths", lambda array: array.reshape(2, 1)),
        ("lengths", lambda array: array[:0]),
    ],
)
def test_arrays_of_another_layout_are_refused(stored, name, change):
    forge(stored, name, change)
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match=f"{name}.npy is not a plain array of"):
            read(stored)


def test_opening_does_not_read_the_frames(stored, monkeypatch):
    data = open_dataset(stored)
    assert isinstance(data.frames, np.memmap)
    monkeypatch.setattr(module, "file_hash", lambda path: pytest.fail(f"{path} was read"))
    open_dataset(stored)


# ---------------------------------------------------------------- making and reusing


def wanted(tmp_path, **more):
    values = {"collect": {"episodes": 4, "steps": 6}, "data": {"dir": str(tmp_path / "datasets")}}
    for key, value in more.items():
        section, _, name = key.replace("__", ".").rpartition(".")
        values.setdefault(section, {})[name] = value
    return make_settings(values)


def test_a_dataset_is_made_once_and_then_reused(tmp_path, left_in, monkeypatch):
    first = make_dataset(wanted(tmp_path), progress=False)
    monkeypatch.setattr(module, "gather", lambda *a: pytest.fail("collected again"))
    for same in (
        {},
        dict(collect__workers=2),
        dict(train__steps=7),
        dict(collect__ppo__n_steps=64),
        dict(model__frame_stack=4),
        dict(data__validation_split=0.5),
    ):
        again = make_dataset(wanted(tmp_path, **same), progress=False)
        assert (again.origin, again.folder, again.hash) == ("reused", first.folder, first.hash)
    assert first.origin == "made" and left_in(tmp_path / "datasets") == [first.folder.name]
    assert first.folder.name.startswith("tworooms-v0-wander-4-")


@pytest.mark.parametrize(
    "key, value",
    [
        ("env__color", "grey"),
        ("env__size", 48),
        ("env__kwargs", {"wall": "random"}),
        ("collect__steps", 7),
        ("collect__persistence", 1.0),
        ("collect__policy", "random"),
        ("run__seed", 1),
        ("collect__random_share", 0.5),
    ],
)
def test_what_determines_the_content_makes_another_dataset(tmp_path, key, value):
    extra = {"model__patch_size": 8, key: value}
    assert dataset_name(wanted(tmp_path, **extra)) != dataset_name(wanted(tmp_path))


def test_ppo_counts_only_when_it_is_the_policy(tmp_path):
    def name(n, **more):
        return dataset_name(wanted(tmp_path, collect__policy="ppo", collect__ppo__n_steps=n, **more))

    assert name(64) != name(128)
    assert name(64) != name(64, model__frame_stack=4)
    assert name(64) == name(64, collect__ppo__subprocesses=True)
    loads, names = wanted(tmp_path, collect__policy="ppo", collect__ppo__load=str(tmp_path)), []
    for content in (b"one", b"two"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        names.append(dataset_name(loads))
    assert names[0] != names[1]


def test_names_and_records_are_what_they_always_were(tmp_path):
    "Datasets that were made earlier are found, whatever the settings' groups are called by now."
    smoke = load_settings(preset="smoke")
    assert dataset_name(smoke) == "tworooms-v0-wander-24-eff8b87a"
    assert dataset_name(make_settings({})) == "tworooms-v0-wander-1500-09d3d5d0"
    sample = make_settings({"collect": {"episodes": 8, "steps": 11}, "run": {"seed": 16}})
    assert dataset_settings(sample) == sample_dataset().info["settings"]
    agent = {"policy": "ppo", "episodes": 3, "steps": 20}
    values = {"env": {"id": "CartPole-v1"}, "collect": agent, "model": {"frame_stack": 2}}
    assert dataset_name(make_settings(values)) == "cartpole-v1-ppo-3-659308ab"


def test_the_smoke_dataset_has_the_content_it_always_had(tmp_path):
    data = make_dataset(load_settings(preset="smoke", overrides={"data.dir": str(tmp_path)}), progress=False)
    assert data.hash == "fc92f6b64dacfa028db90d021621d83f394070d987b8618996a8b91ea535641f"


def test_a_given_dataset_is_used_as_it_is_or_refused_with_both_values(tmp_path):
    made = make_dataset(wanted(tmp_path), progress=False)
    path = str(made.folder)
    given = make_dataset(wanted(tmp_path, data__path=path, collect__episodes=99, run__seed=5), progress=False)
    assert (given.origin, given.hash) == ("given", made.hash)
    id = "worldmodels_nb/TwoRooms-v0"
    for key, value, says in (
        ("env__color", "grey", 'env.color = "rgb", and the settings say "grey"'),
        ("env__size", 48, "env.size = 64, and the settings say 48"),
        ("env__id", "CartPole-v1", f'env.id = "{id}", and the settings say "CartPole-v1"'),
        ("env__kwargs", {"wall": "random"}, 'env.kwargs = {}, and the settings say {"wall": "random"}'),
    ):
        with pytest.raises(DatasetError) as caught:
            make_dataset(wanted(tmp_path, data__path=path, **{key: value}))
        assert says in str(caught.value) and "data.path" in str(caught.value)
    with pytest.raises(DatasetError, match="is not a dataset"):
        make_dataset(wanted(tmp_path, data__path=str(tmp_path / "nowhere")))


def test_a_given_dataset_without_settings_is_judged_by_its_frames(tmp_path, discrete, make_episodes, written):
    folder = written(tmp_path / "set", discrete, make_episodes(discrete, [3])).folder
    says = r"frames of shape \(1, 2, 2\), and the settings ask for \(3, 64, 64\)"
    with pytest.raises(DatasetError, match=says):
        make_dataset(wanted(tmp_path, data__path=str(folder)))


def test_how_long_an_environment_may_take_changes_no_data(tmp_path):
    made = make_dataset(wanted(tmp_path), progress=False)
    for timeout in (0.0, 1.5, 9999.0):
        again = make_dataset(wanted(tmp_path, env__timeout=timeout), progress=False)
        assert (again.origin, again.folder) == ("reused", made.folder)
        path = wanted(tmp_path, env__timeout=timeout, data__path=str(made.folder))
        assert make_dataset(path, progress=False).origin == "given"
    assert "timeout" not in made.info["settings"]["env"]


def test_a_dataset_says_whether_it_could_be_made_again(tmp_path, monkeypatch):
    made = make_dataset(wanted(tmp_path), progress=False)
    assert made.info["reproducible"] is True and made.info["first_action"] == 0
    monkeypatch.setattr(module, "is_reproducible", lambda settings: False)
    with pytest.warns(UserWarning, match="TwoRooms-v0 gives other episodes for the same seed"):
        other = make_dataset(wanted(tmp_path / "other"), progress=False)
    assert other.info["reproducible"] is False and other.hash == made.hash
    for folder in (made.folder, other.folder):  # records that were written earlier do not say
        change_record(folder, lambda record: [record.pop(key) for key in ("reproducible", "first_action")])
        assert verify(folder).hash == made.hash


class Careless(gym.Env):
    "Draws from a generator that nobody seeds."
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    chance = np.random.default_rng(0)

    def __init__(self, careful=False, render_mode=None):
        self.careful, self.render_mode = careful, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        chance = self.np_random if self.careful else self.chance
        return chance.integers(0, 256, (16, 16, 3), np.uint8)


@pytest.mark.parametrize("careful", [True, False])
def test_an_environment_that_cannot_be_repeated_is_named(tmp_path, careful, recwarn):
    gym.register("Careless-v0", Careless)
    more = dict(env__id="Careless-v0", env__kwargs={"careful": careful}, collect__policy="random")
    data = make_dataset(wanted(tmp_path, **more), progress=False)
    assert data.info["reproducible"] is careful
    assert careful != any("Careless-v0 gives other episodes" in str(one.message) for one in recwarn)


@pytest.mark.parametrize("place", ["file", "file/datasets"])
def test_a_file_where_the_datasets_should_be_is_named(tmp_path, left_in, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="was not written: .*data.dir"):
        make_dataset(wanted(tmp_path, data__dir=str(tmp_path / place)), progress=False)
    assert left_in(tmp_path) == ["file"]


def test_a_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = make_dataset(wanted(tmp_path, data__dir="~/sets"), progress=False)
    assert made.folder.parent == tmp_path / "sets"
    given = make_dataset(wanted(tmp_path, data__path=f"~/sets/{made.folder.name}"))
    assert given.hash == open_dataset(f"~/sets/{made.folder.name}").hash == made.hash


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    settings, real = wanted(tmp_path), module.write_dataset

    def late(settings, folder, progress):
        real(settings, folder, progress)
        return real(settings, folder, progress)

    monkeypatch.setattr(module, "write_dataset", late)
    assert make_dataset(settings, progress=False).origin == "reused"


def test_a_folder_with_other_settings_than_its_name_is_refused(tmp_path):
    made, other = make_dataset(wanted(tmp_path), progress=False), wanted(tmp_path, run__seed=3)
    made.folder.rename(made.folder.with_name(dataset_name(other)))
    with pytest.raises(DatasetError, match="other settings than its name"):
        make_dataset(other, progress=False)


def test_a_failed_collection_leaves_nothing(tmp_path, make_episodes, left_in, monkeypatch):
    def broken(settings, progress):
        spec = DataSpec((3, 64, 64), ActionSpec("continuous", 2), ["a", "b", "c", "d"], [])
        yield from make_episodes(spec, [3])
        raise RuntimeError("the environment died")

    monkeypatch.setattr(module, "gather", broken)
    with pytest.raises(RuntimeError):
        make_dataset(wanted(tmp_path), progress=False)
    assert left_in(tmp_path / "datasets") == []


def test_stored_size_is_at_most_two_percent_above_the_content(tmp_path):
    data = make_dataset(wanted(tmp_path, collect__episodes=30, collect__steps=32), progress=False)
    on_disk = sum(path.stat().st_size for path in data.folder.iterdir())
    assert on_disk <= 1.02 * sum(array.nbytes for array in (data.frames, data.actions, data.rewards))


# ---------------------------------------------------------------- the sample


def test_the_sample_is_whole_small_and_worth_looking_at(left_in):
    data = verify("data/sample/tworooms")
    assert sample_dataset().hash == data.hash and data.spec.frame_shape == (3, 64, 64)
    assert sum(path.stat().st_size for path in data.folder.iterdir()) < 1.2e6
    right = data.states[:, 0] > data.states[:, 2]
    assert 0.2 < right.mean() < 0.8 and data.info["door_crossing_share"] >= 3 / 8 and data.lengths.min() >= 7
    assert str(repo_root()) not in (data.folder / "dataset.json").read_text()
    assert crosses_door(data.episode(0).states, data.spec.state_names)
    assert not [name for name in left_in(data.folder.parent) if name.startswith(".partial")]


def arrays_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".npy"}


def test_the_sample_can_be_made_again_and_replaced(tmp_path, left_in):
    first = make_sample(tmp_path / "sample")
    again = make_sample(tmp_path / "sample")
    assert first.hash == again.hash == sample_dataset().hash
    assert arrays_of(again.folder) == arrays_of(sample_dataset().folder)
    assert left_in(tmp_path) == ["sample"]


# ---------------------------------------------------------------- split


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_a_split_covers_all_episodes_and_shares_none(E, share, seed):
    data = in_memory([1] * E)
    training, validation = data.split(share, seed)
    assert sorted([*training, *validation]) == list(range(E)) and len(training) and len(validation)
    assert abs(len(validation) - E * share) <= 1
    again = data.split(share, seed)
    assert np.array_equal(training, again[0]) and np.array_equal(validation, again[1])


def test_a_split_depends_on_its_seed_and_needs_two_episodes():
    assert len({tuple(in_memory([1] * 30).split(0.2, seed)[1]) for seed in range(10)}) == 10
    with pytest.raises(DatasetError, match="collect.episodes"):
        in_memory([5]).split(0.2)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 40), st.data())
def test_frame_indices_are_the_rows_of_their_episodes_in_order(lengths, at_most, draw):
    data = in_memory(lengths)
    episodes = draw.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    by_hand = [data.starts[e] + t for e in sorted(episodes) for t in range(lengths[e] + 1)]
    rows = data.frame_indices(np.array(episodes))
    assert rows.tolist() == by_hand
    some = data.frame_indices(episodes, at_most)
    assert 1 <= len(some) <= at_most and some[0] == rows[0]
    assert some.tolist() == by_hand[:: -(-len(by_hand) // at_most)]
    assert data.frame_indices(np.array([], int), at_most).tolist() == []


# ---------------------------------------------------------------- windows


def windows_by_hand(data, episodes, T, F):
    "The slow way: one window after another, one frame after another."
    found = []
    for e in episodes:
        episode = data.episode(e)
        L = len(episode.actions)
        for t in range(L + 1 - T):
            frames = np.stack([episode.frames[max(t + i, 0)] for i in range(-(F - 1), T + 1)])
            ends = np.array([episode.terminated and t + k == L - 1 for k in range(T)], bool)
            acts = episode.actions[t : t + T], episode.rewards[t : t + T]
            found.append((frames, *acts, ends, episode.states[t : t + T + 1]))
    return found


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(0, 1000),
    st.data(),
)
def test_windows_equal_the_slow_reference(lengths, T, F, seed, draw):
    data = in_memory(lengths, seed)
    episodes = draw.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    expected = windows_by_hand(data, episodes, T, F)
    if not expected:
        with pytest.raises(DatasetError, match="train.window_steps.*collect.steps"):
            Windows(data, episodes, T, F)
        return
    windows = Windows(data, np.array(episodes), T, F)
    assert len(windows) == len(expected)
    order = np.random.default_rng(seed).permutation(len(windows))
    batch = windows.batch(order)
    parts = (batch.frames, batch.actions, batch.rewards, batch.terminated, batch.states)
    for b, i in enumerate(order):
        for got, want in zip(parts, expected[i]):
            assert np.array_equal(got[b].numpy(), want)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(0, 12), st.integers(1, 6))
def test_windows_never_leave_their_episode(lengths, T, F):
    if max(lengths) < T:
        return
    data = in_memory(lengths)
    windows = Windows(data, np.arange(len(lengths)), T, F)
    episode_of = np.repeat(np.arange(len(lengths)), np.array(lengths) + 1)
    rows = windows.rows(np.arange(len(windows)))
    own = rows[:, F - 1 :]
    assert (episode_of[rows] == episode_of[rows[:, :1]]).all()
    assert len({tuple(r) for r in own}) == len(windows) == sum(max(L + 1 - T, 0) for L in lengths)
    assert (np.diff(own, axis=1) == 1).all()
    if T:  # no action is read from a last row
        assert (own[:, :-1] < (data.starts + data.lengths)[episode_of[own[:, :-1]]]).all()


def test_no_window_in_no_episodes():
    for T in (0, 1):
        with pytest.raises(DatasetError, match="no window fits"):
            Windows(in_memory([3]), np.array([], int), T)


@pytest.mark.parametrize(
    "lengths, T, knob",
    [([3, 2], 4, "train.window_steps"), ([1] * 7, 2, "vjepa2.action.window"), ([5], 9, "ac.window")],
)
def test_no_window_names_its_own_setting_and_how_many_are_too_short(lengths, T, knob):
    few, longest = len(lengths), max(lengths)
    says = f"{knob} is {T} steps, and {few} of {few} episodes are too short: .* has {longest}; lower {knob}"
    with pytest.raises(NoWindows, match=says):
        Windows(in_memory(lengths), np.arange(few), T, knob=knob)
    assert len(Windows(in_memory(lengths), np.arange(few), longest, knob=knob)) >= 1


@dataclass
class Marked(Batch):
    "A batch with something more, as another chapter may want it."
    marks: torch.Tensor | None = None


def test_a_batch_that_is_moved_stays_what_it_is(discrete):
    plain = vars(Windows(in_memory([5, 6], spec=discrete), [0, 1], 3).sample(4, 0, 0))
    for marks in (torch.zeros(4), None):
        moved = Marked(**plain, marks=marks).to("meta")
        assert type(moved) is Marked and moved.actions.device.type == "meta"
        assert (moved.marks is None) == (marks is None) and moved.states is None and moved.latents is None
    assert moved.to("meta").frames is not None


def test_types_and_shapes_of_a_batch(discrete):
    few = Windows(in_memory([5, 6], spec=discrete), [0, 1], 3, 2).sample(4, 0, 0)
    assert few.frames.shape == (4, 5, 1, 2, 2) and few.frames.dtype == torch.uint8
    assert few.actions.shape == (4, 3) and few.actions.dtype == torch.int64
    assert few.states is None and few.latents is None
    assert few.rewards.dtype == torch.float32 and few.terminated.dtype == torch.bool
    continuous = Windows(in_memory([5, 6]), [0, 1], 3).sample(4, 0, 0)
    assert continuous.actions.shape == (4, 3, 2) and continuous.states.shape == (4, 4, 3)
    moved = continuous.to("meta")
    assert moved.frames.device.type == "meta" and moved.latents is None
    assert continuous.frames.device.type == "cpu"
    assert torch.equal(continuous.to("cpu").actions, continuous.actions)


def test_no_steps_gives_single_frames():
    data = in_memory([3, 4])
    windows = Windows(data, [0, 1], 0)
    assert len(windows) == len(data.frames)
    batch = windows.batch(np.arange(len(windows)))
    assert np.array_equal(batch.frames[:, 0], data.frames) and batch.actions.shape == (9, 0, 2)
    assert batch.states.shape == (9, 1, 3)


def test_the_longest_window_is_a_whole_episode(sample):
    frames = [Windows(sample, [0], T).batch(np.arange(2)).frames.shape[1] for T in (0, 1, 11 - 1)]
    assert frames == [1, 2, 11]
    assert len(Windows(sample, [0], 11)) == 1


def test_cached_latents_follow_their_frames(tmp_path):
    data = in_memory([3, 4])
    np.save(tmp_path / "z.npy", np.arange(9 * 2 * 3, dtype=np.float16).reshape(9, 2, 3))
    latents = np.load(tmp_path / "z.npy", mmap_mode="r")
    for frames in (True, False):
        windows = Windows(data, [1], 2, frame_stack=3, latents=latents, frames=frames)
        batch = windows.batch(np.array([1]))
        assert batch.latents.dtype == torch.float32 and np.array_equal(batch.latents[0].numpy(), latents[5:8])
        assert (batch.frames is not None) == frames
    with pytest.raises(DatasetError, match="8 latents for the 9 frames of toy; encode this dataset anew"):
        Windows(data, [1], 2, latents=latents[:-1])


def test_samples_are_a_function_of_seed_and_step_only():
    windows = Windows(in_memory([9, 9, 9]), [0, 1, 2], 2)
    a = [windows.sample(8, 3, step).frames for step in range(4)]
    b = [Windows(in_memory([9, 9, 9]), [0, 1, 2], 2).sample(8, 3, step).frames for step in (3, 2, 1, 0)][::-1]
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], windows.sample(8, 4, 0).frames)


def test_samples_reach_every_window_equally_often():
    windows = Windows(in_memory([4, 6]), [0, 1], 1)

    def key(frames):
        return tuple(frames.flatten().tolist())

    number = {key(f): i for i, f in enumerate(windows.batch(np.arange(len(windows))).frames)}
    drawn = [number[key(f)] for step in range(50) for f in windows.sample(40, 0, step).frames]
    counts = np.bincount(drawn, minlength=len(windows))
    assert len(windows) == 10 and (abs(counts - 200) < 5 * 200**0.5).all()


def test_batches_do_not_touch_the_file(stored):
    data = open_dataset(stored)
    before = (stored / "frames.npy").read_bytes()
    batch = Windows(data, [0, 1], 1).sample(4, 0, 0)
    batch.frames.zero_()
    batch.states.zero_()
    assert (stored / "frames.npy").read_bytes() == before and data.frames.any()


def anonymous_memory():  # MB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_reading_windows_does_not_fill_memory(tmp_path):
    n = 32_000  # 393 MB of frames, sparse on disk
    frames = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.uint8, (n, 3, 64, 64))
    del frames
    rows = dict(
        frames=np.load(tmp_path / "frames.npy", mmap_mode="r"),
        actions=np.zeros(n, np.int64),
        rewards=np.zeros(n, np.float32),
        terminated=np.zeros(n, bool),
        lengths=np.full(n // 32, 31),
    )
    spec = DataSpec((3, 64, 64), ActionSpec("discrete", 2), [], [])
    data = Dataset(tmp_path, dict(spec=asdict(spec), hash="0"), rows)
    windows = Windows(data, np.arange(len(data)), 3)
    windows.sample(64, 0, 0)
    before = anonymous_memory()
    for step in range(300):
        windows.sample(64, 0, step)
    assert anonymous_memory() - before < 40
