"Contracts of what is written: checked as it comes in, whole or not at all, the same bytes wherever made."

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from worldmodels_nb.data import episodes, files
from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import (
    DatasetError,
    DataSpec,
    Episode,
    EpisodeWriter,
    as_rows,
    find_unsound,
)
from worldmodels_nb.data.files import RowFile
from worldmodels_nb.settings import repo_root


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(code, *arguments):
    "A Python process of its own; starts, and is not waited for."
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=repo_root()
    )


# ---------------------------------------------------------------- format


def test_what_is_written_comes_back(tmp_path, either, make_episodes, written):
    episodes = make_episodes(either, [3, 1, 7])
    data = written(tmp_path / "set", either, episodes)
    assert data.spec == either and len(data) == 3 and len(data.frames) == 3 + 1 + 7 + 3
    for i, episode in enumerate(episodes):
        back = data.episode(i)
        assert np.array_equal(back.frames, episode.frames) and np.array_equal(back.actions, episode.actions)
        assert np.array_equal(back.rewards, episode.rewards) and back.terminated == episode.terminated
        assert (back.states is None) == (episode.states is None)
        if episode.states is not None:
            assert np.array_equal(back.states, episode.states)


def test_a_spec_survives_json(either):
    assert DataSpec.from_record(json.loads(json.dumps(asdict(either)))) == either


@pytest.mark.parametrize(
    "part, value",
    [
        ("frame_shape", [3, 64]),
        ("frame_shape", [3, 64, 0]),
        ("frame_shape", [3, 64, 10**12]),
        ("frame_shape", ["3", "64", "64"]),
        ("frame_shape", [True, 64, 64]),
        ("state_names", ["x", "x", "y"]),
        ("state_names", ["x", "y", 3]),
        ("state_names", "xyz"),
        ("position", [3]),
        ("position", [-1]),
        ("position", [0, 0]),
        ("position", [0.0]),
        ("position", ["0"]),
        ("position", [None]),
        ("position", {}),
    ],
)
def test_a_spec_that_no_data_can_have_is_refused(tmp_path, continuous, part, value):
    record = json.loads(json.dumps(asdict(continuous))) | {part: value}
    with pytest.raises(DatasetError, match=f"^{part} of the data is ") as caught:
        DataSpec.from_record(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(n=0),
        dict(n=-1),
        dict(n=10**12),
        dict(n=2.0),
        dict(n="2"),
        dict(kind="discrete"),  # with bounds
        dict(kind="both"),
        dict(kind=None),
        dict(low=None),
        dict(low=[-1.0]),
        dict(high=[1.0, 1.0, 1.0]),
        dict(low=[-1.0, float("nan")]),
        dict(high=[1.0, float("inf")]),
        dict(high=[1.0, 10**400]),
        dict(low=[-1.0, 2.0]),
        dict(low=["-1", "-1"]),
        dict(low=[True, False]),
        dict(low={}),
    ],
    ids=lambda change: str(change)[:40],
)
def test_actions_that_cannot_be_are_refused(continuous, change):
    record = json.loads(json.dumps(asdict(continuous)))
    record["action"] |= change
    with pytest.raises(DatasetError, match="^action of the data is ") as caught:
        DataSpec.from_record(record)
    assert "\n" not in str(caught.value)


def test_a_writer_refuses_a_spec_that_nobody_could_read(tmp_path, left_in):
    spec = DataSpec((3, 2, 2), ActionSpec("discrete", 0), [], [])
    with pytest.raises(DatasetError, match="action of the data"):
        EpisodeWriter(tmp_path / "set", spec, {})
    assert left_in(tmp_path) == []


NAN, INF = np.float32("nan"), np.float32("inf")


@pytest.mark.parametrize("name", ["actions", "rewards", "states"])
@pytest.mark.parametrize("value, said", [(NAN, "NaN"), (INF, "inf"), (-INF, "-inf")])
def test_numbers_that_are_none_are_found_where_they_come_in(continuous, make_episodes, name, value, said):
    (episode,) = make_episodes(continuous, [5])
    getattr(episode, name)[3] = value
    with pytest.raises(DatasetError, match=f"an episode holds {said}: {name} at step 3"):
        as_rows(episode, continuous)


@pytest.mark.parametrize("value", [5, -1, 2**62, -(2**63)])
def test_actions_that_do_not_exist_are_found_where_they_come_in(discrete, make_episodes, value):
    (episode,) = make_episodes(discrete, [5])
    episode.actions[2] = value
    with pytest.raises(DatasetError, match=f"holds action {value}, and there are 0 to 4: actions at step 2"):
        as_rows(episode, discrete)


def test_sound_numbers_are_sound(either, make_episodes):
    assert all(find_unsound(as_rows(e, either), either.action) is None for e in make_episodes(either, [3, 1]))
    ram = dict(actions=np.zeros(2, np.int64), rewards=np.zeros(2), states=np.full((2, 128), 255, np.uint8))
    assert find_unsound(ram, ActionSpec("discrete", 1)) is None


def test_rows_of_last_frames_are_zero(tmp_path, continuous, make_episodes, written):
    data = written(tmp_path / "set", continuous, make_episodes(continuous, [4, 2]))
    last = data.starts + data.lengths
    assert not data.actions[last].any() and not data.rewards[last].any() and not data.terminated[last].any()


def test_every_array_has_one_row_per_frame_and_types_are_native(tmp_path, continuous, make_episodes, written):
    data = written(tmp_path / "set", continuous, make_episodes(continuous, [4, 2]))
    arrays = (data.frames, data.actions, data.rewards, data.terminated, data.states)
    assert {len(a) for a in arrays} == {8}
    assert [a.dtype.name for a in arrays] == ["uint8", "float32", "float32", "bool", "float32"]
    assert isinstance(data.frames, np.memmap) and not data.frames.flags.writeable


def test_byte_states_stay_bytes_on_disk_and_become_floats_in_batches(
    tmp_path, discrete, make_episodes, written
):
    spec = DataSpec((1, 2, 2), ActionSpec("discrete", 2), ["ram 0", "ram 1"], [])
    (episode,) = make_episodes(discrete, [3])
    episode.actions, episode.states = episode.actions % 2, np.arange(8, dtype=np.uint8).reshape(4, 2)
    data = written(tmp_path / "set", spec, [episode])
    assert data.states.dtype == np.uint8
    assert Windows(data, [0], 1).batch(np.array([0])).states.dtype == torch.float32


def test_the_same_content_has_the_same_hash_wherever_it_is_written(
    tmp_path, discrete, make_episodes, written
):
    episodes = make_episodes(discrete, [3, 4])
    a, b = (written(tmp_path / name, discrete, episodes, note=name) for name in "ab")
    assert a.hash == b.hash
    assert a.hash != written(tmp_path / "c", discrete, episodes[::-1]).hash
    other = DataSpec((1, 2, 2), ActionSpec("discrete", 6), [], [])
    assert a.hash != written(tmp_path / "d", other, episodes).hash


def test_record_states_counts_and_door_crossings(tmp_path, discrete, continuous, make_episodes, written):
    episodes = make_episodes(continuous, [3, 3, 2])
    for episode, side in zip(episodes, ([1, 1, 1, 1], [1, 1, -1, 1], [-1, -1, -1])):
        episode.states[:, 0], episode.states[:, 1] = np.array(side) + 5, 5
    info = written(tmp_path / "walls", continuous, episodes).info
    assert info["counts"] == dict(episodes=3, steps=8, frames=11) and info["door_crossing_share"] == 1 / 3
    assert info["schema_version"] == 1
    assert set(info["versions"]) == {"worldmodels_nb", "gymnasium", "numpy"}
    none = written(tmp_path / "none", discrete, make_episodes(discrete, [2]))
    assert none.info["door_crossing_share"] is None


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda e: setattr(e, "frames", e.frames / 255), "frames .* float64"),
        (lambda e: setattr(e, "frames", e.frames[:-1]), r"frames .* \(3, 3, 2, 4\)"),
        (lambda e: setattr(e, "actions", e.actions.astype(float)), "actions .* float64"),
        (lambda e: setattr(e, "states", None), "states"),
        (lambda e: setattr(e, "rewards", e.rewards[1:]), "rewards"),
        (lambda e: setattr(e, "rewards", e.rewards[:, None]), r"rewards .* \(4, 1\)"),
        (lambda e: setattr(e, "actions", e.actions[:, 0]), r"actions .* \(4,\)"),
        (lambda e: setattr(e, "actions", e.actions[..., None]), r"actions .* \(4, 2, 1\)"),
    ],
    ids=["float frames", "a frame missing", "double actions", "no states", "a reward missing"]
    + ["a column of rewards", "numbers for actions", "columns for actions"],
)
def test_an_episode_that_does_not_fit_is_refused_and_nothing_is_left(
    tmp_path, continuous, make_episodes, written, left_in, change, says
):
    good, bad = make_episodes(continuous, [3, 3])
    change(bad)
    with pytest.raises(DatasetError, match=says):
        written(tmp_path / "set", continuous, [good, bad])
    assert left_in(tmp_path) == []


def test_an_episode_without_steps_or_with_states_nobody_promised_is_refused(discrete, make_episodes):
    (episode,) = make_episodes(discrete, [2])
    none = Episode(episode.frames[:1], episode.actions[:0], episode.rewards[:0], False, None)
    with pytest.raises(DatasetError, match="at least 1 step"):
        as_rows(none, discrete)
    episode.states = np.zeros((3, 4), np.float32)
    with pytest.raises(
        DatasetError,
        match="wanted are at least 1 step, and frames, actions, rewards, terminated, lengths",
    ):
        as_rows(episode, discrete)


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_any_failure_removes_what_was_written(tmp_path, discrete, make_episodes, left_in, error):
    with pytest.raises(type(error)):
        with EpisodeWriter(tmp_path / "set", discrete, {}) as writer:
            writer.add(make_episodes(discrete, [3])[0])
            raise error
    assert left_in(tmp_path) == []


def test_trouble_of_others_inside_the_block_keeps_its_name(tmp_path, discrete, make_episodes, left_in):
    "What the environment raises is not called a full disk."
    with pytest.raises(ConnectionError, match="the simulator hung up"):
        with EpisodeWriter(tmp_path / "set", discrete, {}) as writer:
            writer.add(make_episodes(discrete, [3])[0])
            raise ConnectionError("the simulator hung up")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "where",
    ["RowFile.append", "RowFile.close", "episodes.write_json", "files.start_partial"]
    + ["os.rename", "os.chmod", "os.mkdir", "os.fsync", "os.replace"],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path, discrete, make_episodes, written, left_in, monkeypatch, where
):
    owner, _, name = where.rpartition(".")
    owners = {"RowFile": RowFile, "os": os, "episodes": episodes, "files": files}
    monkeypatch.setattr(owners[owner], name, full)
    sentence = "No space left on device; make room in .* or set data.dir"
    with pytest.raises(DatasetError, match=sentence) as caught:
        written(tmp_path / "set", discrete, make_episodes(discrete, [3]))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert left_in(tmp_path) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import DataSpec, DatasetError, Episode, EpisodeWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
frames, zeros = np.zeros((3, 3, 64, 64), np.uint8), np.zeros(2, np.float32)
try:
    with EpisodeWriter(sys.argv[1], DataSpec((3, 64, 64), ActionSpec("discrete", 2), [], []), {}) as writer:
        for _ in range(20): writer.add(Episode(frames, zeros.astype(int), zeros, False, None))
except DatasetError as error: print(error)
"""


def test_a_real_limit_of_the_system_while_writing(tmp_path, left_in):
    out, err = run(LIMITED, tmp_path / "set").communicate(timeout=120)
    assert "File too large" in out and "data.dir" in out, err[-500:]
    assert left_in(tmp_path) == []


def test_nothing_is_visible_before_the_end_and_an_existing_folder_is_kept(
    tmp_path, discrete, make_episodes, written, left_in
):
    with EpisodeWriter(tmp_path / "set", discrete, {}) as writer:
        writer.add(make_episodes(discrete, [3])[0])
        assert not (tmp_path / "set").exists()
    before = (tmp_path / "set" / "dataset.json").read_bytes()
    with pytest.raises(FileExistsError):
        written(tmp_path / "set", discrete, make_episodes(discrete, [9]))
    with pytest.raises(FileExistsError, match="there already"):
        EpisodeWriter(tmp_path / "set", discrete, {}).__enter__()
    assert (tmp_path / "set" / "dataset.json").read_bytes() == before and left_in(tmp_path) == ["set"]


def test_marks_are_in_the_record_and_not_in_the_hash(tmp_path, discrete, make_episodes, written):
    plain = written(tmp_path / "plain", discrete, make_episodes(discrete, [3]))
    with EpisodeWriter(tmp_path / "set", discrete, {}, reproducible=False, hash="mine") as writer:
        writer.add(make_episodes(discrete, [3])[0])
    record = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert record["hash"] == plain.hash and record["reproducible"] is False
    assert "reproducible" not in plain.info


def test_a_dataset_of_nothing_is_refused(tmp_path, discrete, written, left_in):
    with pytest.raises(DatasetError, match="raise collect.episodes"):
        written(tmp_path / "set", discrete, [])
    assert left_in(tmp_path) == []


def test_another_hash_than_the_expected_one_is_refused(tmp_path, discrete, make_episodes, left_in):
    with pytest.raises(DatasetError, match="altered or damaged"):
        with EpisodeWriter(tmp_path / "set", discrete, {}, expected="0" * 64) as writer:
            writer.add(make_episodes(discrete, [3])[0])
    assert left_in(tmp_path) == []
