"Contracts of what is written: checked as it comes in, whole or not at all, the same bytes wherever made."

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from worldmodels_nb.data import episodes as module
from worldmodels_nb.data.datasets import Windows
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import (
    PARTIAL,
    DatasetError,
    DataSpec,
    Episode,
    EpisodeWriter,
    RowFile,
    as_rows,
    cached_rows,
    start_partial,
    sweep_partial,
    whole_folder,
)
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


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64", "bool"])
def test_a_grown_file_is_the_file_numpy_saves(tmp_path, dtype):
    whole = np.arange(24).reshape(12, 2).astype(dtype)
    grown = RowFile(tmp_path / "grown.npy", dtype, (2,))
    for part in np.split(whole, [1, 5]):
        grown.append(part)
    grown.close()
    np.save(tmp_path / "saved.npy", whole)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_a_file_grows_by_its_own_kind_of_rows_only(tmp_path):
    grown = RowFile(tmp_path / "grown.npy", "float32", (2,))
    for wrong in (np.zeros((1, 3), "float32"), np.zeros((1, 2))):
        with pytest.raises(DatasetError, match=r"grows by float32 rows of shape \(2,\), not by"):
            grown.append(wrong)
    grown.abandon()
    grown.abandon()


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
    ],
    ids=["float frames", "a frame missing", "double actions", "no states", "a reward missing"],
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
    "where", ["RowFile.append", "RowFile.close", "write_json", "os.rename", "os.chmod", "start_partial"]
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path, discrete, make_episodes, written, left_in, monkeypatch, where
):
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr({"RowFile": RowFile, "os": os}.get(owner, module), name, full)
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


def test_a_dataset_of_nothing_is_refused(tmp_path, discrete, written, left_in):
    with pytest.raises(DatasetError, match="raise collect.episodes"):
        written(tmp_path / "set", discrete, [])
    assert left_in(tmp_path) == []


def test_another_hash_than_the_expected_one_is_refused(tmp_path, discrete, make_episodes, left_in):
    with pytest.raises(DatasetError, match="altered or damaged"):
        with EpisodeWriter(tmp_path / "set", discrete, {}, expected="0" * 64) as writer:
            writer.add(make_episodes(discrete, [3])[0])
    assert left_in(tmp_path) == []


KILLED = """
import sys, time
from pathlib import Path
from worldmodels_nb.data.episodes import start_partial
folder = start_partial(Path(sys.argv[1]))
(folder / "frames.npy").write_bytes(b"x" * 1000)
print(folder.name, flush=True)
time.sleep(60)
"""
FOREIGN = [".partial-another_machine-1-abc", "partial", ".partial-", f"{PARTIAL}x-y", "precious"]


@pytest.fixture
def killed(tmp_path, left_in):
    "What a process left that was killed while it wrote; and folders that are nobody's leftovers."
    child = run(KILLED, tmp_path / "set")
    try:
        name = child.stdout.readline().strip()
        assert name.startswith(PARTIAL) and sweep_partial(tmp_path) == [] and left_in(tmp_path) == [name]
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    for foreign in FOREIGN:
        (tmp_path / foreign).mkdir()
    return tmp_path / name


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(
    tmp_path, discrete, make_episodes, written, left_in, killed
):
    assert killed.exists()
    written(tmp_path / "set", discrete, make_episodes(discrete, [3]))
    assert left_in(tmp_path) == sorted(["set", *FOREIGN])


def test_foreign_folders_are_never_swept(tmp_path, left_in):
    for foreign in FOREIGN:
        (tmp_path / foreign).mkdir()
    assert sweep_partial(tmp_path) == [] and left_in(tmp_path) == sorted(FOREIGN)


# ---------------------------------------------------------------- whole_folder


def test_a_folder_appears_whole_and_others_may_read_it(tmp_path, left_in):
    with whole_folder(tmp_path / "deep" / "final") as folder:
        (folder / "one").write_text("1")
        assert folder.parent == tmp_path / "deep" and left_in(tmp_path / "deep") == [folder.name]
    assert left_in(tmp_path / "deep") == ["final"]
    assert (tmp_path / "deep" / "final" / "one").read_text() == "1"
    assert (tmp_path / "deep" / "final").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), OSError("x")], ids=lambda e: type(e).__name__
)
def test_a_folder_whose_block_fails_does_not_appear(tmp_path, left_in, error):
    with pytest.raises(type(error)):
        with whole_folder(tmp_path / "final") as folder:
            (folder / "one").write_text("1")
            raise error
    assert left_in(tmp_path) == []


def test_a_folder_that_is_there_stays_as_it_is(tmp_path, left_in):
    (tmp_path / "final").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        with whole_folder(tmp_path / "final"):
            pytest.fail("the block ran")
    with pytest.raises(FileExistsError, match="has appeared meanwhile"):
        with whole_folder(tmp_path / "late") as folder:
            (folder / "mine").write_text("1")
            (tmp_path / "late").mkdir()
    assert left_in(tmp_path) == ["final", "late"] and left_in(tmp_path / "late") == []


@pytest.mark.parametrize("name", ["rename", "chmod"])
def test_a_folder_on_a_full_disk_does_not_appear(tmp_path, left_in, monkeypatch, name):
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"):
        with whole_folder(tmp_path / "final") as folder:
            (folder / "one").write_text("1")
    monkeypatch.undo()
    assert left_in(tmp_path) == []


def test_a_folder_sweeps_what_a_killed_process_left(tmp_path, left_in, killed):
    with whole_folder(tmp_path / "final"):
        assert not killed.exists()
    assert left_in(tmp_path) == sorted(["final", *FOREIGN])


# ---------------------------------------------------------------- cached_rows

ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)


class Parts:
    "Rows in two parts; counts how often they are asked for."

    def __init__(self, rows=ROWS):
        self.rows, self.asked = rows, 0

    def __call__(self):
        self.asked += 1
        yield from np.array_split(self.rows, 2)


def test_rows_are_computed_once_and_are_the_file_numpy_saves(tmp_path, left_in):
    path, parts = tmp_path / "deep" / "rows.npy", Parts()
    for _ in range(2):
        rows = cached_rows(path, (6, 2), "float32", parts)
        assert np.array_equal(rows, ROWS) and isinstance(rows, np.memmap) and not rows.flags.writeable
    np.save(tmp_path / "saved.npy", ROWS)
    assert path.read_bytes() == (tmp_path / "saved.npy").read_bytes()
    assert parts.asked == 1 and left_in(path.parent) == ["rows.npy"]


def test_rows_keep_every_shape_and_type(tmp_path):
    for shape, dtype in (((6,), "int64"), ((6, 1, 2, 3), "float16"), ((6, 5), "bool")):
        rows = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        cached = cached_rows(tmp_path / f"{dtype}.npy", shape, dtype, Parts(rows))
        assert np.array_equal(cached, rows) and cached.dtype == dtype


@pytest.mark.parametrize(
    "there",
    [
        lambda path: np.save(path, ROWS[:5]),
        lambda path: np.save(path, ROWS[:, :1]),
        lambda path: np.save(path, ROWS.reshape(6, 2, 1)),
        lambda path: np.save(path, ROWS.astype(np.float64)),
        lambda path: np.save(path, np.array([[print] * 2] * 6, object)),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an array"),
    ],
    ids=["fewer rows", "narrower", "another rank", "doubles", "pickled", "empty", "garbage"],
)
def test_a_file_that_holds_something_else_is_made_again(tmp_path, left_in, there):
    path, parts = tmp_path / "rows.npy", Parts()
    there(path)
    assert np.array_equal(cached_rows(path, (6, 2), "float32", parts), ROWS)
    assert parts.asked == 1 and left_in(tmp_path) == ["rows.npy"]


@pytest.mark.parametrize("kept", [5, 100, -1])
def test_a_file_that_was_cut_off_is_made_again(tmp_path, left_in, kept):
    path, parts = tmp_path / "rows.npy", Parts()
    np.save(path, ROWS)
    path.write_bytes(path.read_bytes()[:kept])
    assert np.array_equal(cached_rows(path, (6, 2), "float32", parts), ROWS)
    assert parts.asked == 1 and left_in(tmp_path) == ["rows.npy"]


class CacheError(ValueError):
    pass


@pytest.mark.parametrize(
    "where", ["RowFile.append", "RowFile.close", "os.fsync", "os.replace", "start_partial"]
)
def test_rows_on_a_full_disk_are_one_sentence_and_leave_nothing(tmp_path, left_in, monkeypatch, where):
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr({"RowFile": RowFile, "os": os}.get(owner, module), name, full)
    sentence = "cannot write .*rows.npy: No space left on device; make room, or keep it in another folder"
    for error in (DatasetError, CacheError):
        with pytest.raises(error, match=sentence) as caught:
            cached_rows(tmp_path / "rows.npy", (6, 2), "float32", Parts(), error)
        assert "\n" not in str(caught.value) and type(caught.value) is error
    monkeypatch.undo()
    assert left_in(tmp_path) == []


def test_rows_on_a_full_disk_leave_an_older_file_alone(tmp_path, left_in, monkeypatch):
    np.save(tmp_path / "rows.npy", ROWS[:3])
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DatasetError, match="make room"):
        cached_rows(tmp_path / "rows.npy", (6, 2), "float32", Parts())
    assert np.array_equal(np.load(tmp_path / "rows.npy"), ROWS[:3]) and left_in(tmp_path) == ["rows.npy"]


ROWS_LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from worldmodels_nb.data.episodes import DatasetError, cached_rows
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def parts():
    for _ in range(50): yield np.zeros((1000, 2), np.float32)
try: cached_rows(Path(sys.argv[1]), (50_000, 2), "float32", parts)
except DatasetError as error: print(error)
"""


def test_a_real_limit_of_the_system_while_caching(tmp_path, left_in):
    out, err = run(ROWS_LIMITED, tmp_path / "rows.npy").communicate(timeout=120)
    assert "File too large" in out and "make room" in out, err[-500:]
    assert left_in(tmp_path) == []


ROWS_KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from worldmodels_nb.data.episodes import cached_rows
def parts():
    yield np.zeros((3, 2), np.float32)
    print("half", flush=True)
    time.sleep(60)
cached_rows(Path(sys.argv[1]), (6, 2), "float32", parts)
"""


def test_rows_of_a_killed_process_are_swept_and_made_again(tmp_path, left_in):
    child = run(ROWS_KILLED, tmp_path / "rows.npy")
    try:
        assert child.stdout.readline().strip() == "half"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    (leftover,) = left_in(tmp_path)
    assert leftover.startswith(PARTIAL)
    parts = Parts()
    assert np.array_equal(cached_rows(tmp_path / "rows.npy", (6, 2), "float32", parts), ROWS)
    assert parts.asked == 1 and left_in(tmp_path) == ["rows.npy"]


@pytest.mark.parametrize("shape", [(5, 2), (7, 2)])
def test_another_number_of_rows_than_promised_is_refused(tmp_path, left_in, shape):
    with pytest.raises(DatasetError, match=f"would hold 6 rows, not {shape[0]}"):
        cached_rows(tmp_path / "rows.npy", shape, "float32", Parts())
    assert left_in(tmp_path) == []


def test_what_computing_the_rows_raises_goes_on_and_leaves_nothing(tmp_path, left_in):
    def parts():
        yield ROWS[:3]
        raise CacheError("not finite")

    with pytest.raises(CacheError, match="not finite"):
        cached_rows(tmp_path / "rows.npy", (6, 2), "float32", parts)
    with pytest.raises(DatasetError, match="grows by float32"):
        cached_rows(tmp_path / "rows.npy", (6, 2), "float32", Parts(ROWS.astype(float)))
    assert left_in(tmp_path) == []


def test_a_partial_folder_is_named_after_its_process(tmp_path):
    folder = start_partial(tmp_path / "new" / "final")
    assert folder.parent == tmp_path / "new" and folder.name.startswith(f"{PARTIAL}{os.getpid()}-")
