"Contracts of datasets and windows: whole or not at all, checked when opened, never across an episode's end."
import errno, json, os, signal, subprocess, sys
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st

from worldmodels_nb import episodes as module
from worldmodels_nb.data.episodes import Episode
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import *
from worldmodels_nb.settings import make_settings, repo_root

DISCRETE = DataSpec((1, 2, 2), ActionSpec("discrete", 5), [], [])
CONTINUOUS = DataSpec((3, 2, 4), ActionSpec("continuous", 2, [-1.0, -1.0], [1.0, 1.0]), ["agent x", "wall x", "speed"], [0])


def make_episode(spec, L, rng, terminated=False):
    frames = rng.integers(0, 256, (L + 1, *spec.frame_shape), np.uint8)
    discrete = spec.action.kind == "discrete"
    actions = rng.integers(0, spec.action.n, L) if discrete else rng.uniform(-1, 1, (L, spec.action.n)).astype(np.float32)
    states = rng.normal(size=(L + 1, len(spec.state_names))).astype(np.float32) if spec.state_names else None
    return Episode(frames, actions, rng.normal(size=L).astype(np.float32), terminated, states)


def make_episodes(spec, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [make_episode(spec, L, rng, bool(rng.random() < .5)) for L in lengths]


def written(folder, spec, episodes, **about):
    with EpisodeWriter(folder, spec, about) as writer:
        for episode in episodes: writer.add(episode)
    return open_dataset(folder)


def in_memory(lengths, seed=0, spec=CONTINUOUS):
    rows = [as_rows(episode, spec) for episode in make_episodes(spec, lengths, seed)]
    arrays = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    return Dataset(Path("toy"), dict(spec=asdict(spec), hash="0"), arrays)


def left_in(folder): return sorted(path.name for path in folder.iterdir())


# --- format

@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_what_is_written_comes_back(tmp_path, spec):
    episodes = make_episodes(spec, [3, 1, 7])
    data = written(tmp_path / "set", spec, episodes)
    assert data.spec == spec and len(data) == 3 and len(data.frames) == 3 + 1 + 7 + 3
    for i, episode in enumerate(episodes):
        back = data.episode(i)
        assert np.array_equal(back.frames, episode.frames) and np.array_equal(back.actions, episode.actions)
        assert np.array_equal(back.rewards, episode.rewards) and back.terminated == episode.terminated
        assert (back.states is None) == (episode.states is None)
        if episode.states is not None: assert np.array_equal(back.states, episode.states)


def test_rows_of_last_frames_are_zero(tmp_path):
    data = written(tmp_path / "set", CONTINUOUS, make_episodes(CONTINUOUS, [4, 2]))
    last = data.starts + data.lengths
    assert not data.actions[last].any() and not data.rewards[last].any() and not data.terminated[last].any()


def test_every_array_has_one_row_per_frame_and_types_are_native(tmp_path):
    data = written(tmp_path / "set", CONTINUOUS, make_episodes(CONTINUOUS, [4, 2]))
    assert {len(a) for a in (data.frames, data.actions, data.rewards, data.terminated, data.states)} == {8}
    assert [a.dtype.name for a in (data.frames, data.actions, data.rewards, data.terminated, data.states)] == ["uint8", "float32", "float32", "bool", "float32"]
    assert isinstance(data.frames, np.memmap) and not data.frames.flags.writeable


def test_byte_states_stay_bytes_on_disk_and_become_floats_in_batches(tmp_path):
    spec = DataSpec((1, 2, 2), ActionSpec("discrete", 2), ["ram 0", "ram 1"], [])
    episode = make_episode(DISCRETE, 3, np.random.default_rng(0))
    episode.actions, episode.states = episode.actions % 2, np.arange(8, dtype=np.uint8).reshape(4, 2)
    data = written(tmp_path / "set", spec, [episode])
    assert data.states.dtype == np.uint8 and Windows(data, [0], 1).batch(np.array([0])).states.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64", "bool"])
def test_a_grown_file_is_the_file_numpy_saves(tmp_path, dtype):
    whole = np.arange(24).reshape(12, 2).astype(dtype)
    grown = module.RowFile(tmp_path / "grown.npy", dtype, (2,))
    for part in np.split(whole, [1, 5]): grown.append(part)
    grown.close()
    np.save(tmp_path / "saved.npy", whole)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_the_same_content_has_the_same_hash_wherever_it_is_written(tmp_path):
    episodes = make_episodes(DISCRETE, [3, 4])
    a, b = (written(tmp_path / name, DISCRETE, episodes, note=name) for name in "ab")
    assert a.hash == b.hash
    assert a.hash != written(tmp_path / "c", DISCRETE, episodes[::-1]).hash
    other = DataSpec((1, 2, 2), ActionSpec("discrete", 6), [], [])
    assert a.hash != written(tmp_path / "d", other, episodes).hash


def test_record_states_counts_and_door_crossings(tmp_path):
    episodes = make_episodes(CONTINUOUS, [3, 3, 2])
    for episode, side in zip(episodes, ([1, 1, 1, 1], [1, 1, -1, 1], [-1, -1, -1])):
        episode.states[:, 0], episode.states[:, 1] = np.array(side) + 5, 5
    info = written(tmp_path / "walls", CONTINUOUS, episodes).info
    assert info["counts"] == dict(episodes=3, steps=8, frames=11) and info["door_crossing_share"] == 1 / 3
    assert info["schema_version"] == 1 and set(info["versions"]) == {"worldmodels_nb", "gymnasium", "numpy"}
    assert written(tmp_path / "none", DISCRETE, make_episodes(DISCRETE, [2])).info["door_crossing_share"] is None


@pytest.mark.parametrize("change, says", [
    (lambda e: setattr(e, "frames", e.frames / 255), "frames .* float64"),
    (lambda e: setattr(e, "frames", e.frames[:-1]), "frames .* (3, 3, 2, 4)"),
    (lambda e: setattr(e, "actions", e.actions.astype(float)), "actions .* float64"),
    (lambda e: setattr(e, "states", None), "states"),
    (lambda e: setattr(e, "rewards", e.rewards[1:]), "rewards"),
], ids=["float frames", "a frame missing", "double actions", "no states", "a reward missing"])
def test_an_episode_that_does_not_fit_is_refused_and_nothing_is_left(tmp_path, change, says):
    good, bad = make_episodes(CONTINUOUS, [3, 3])
    change(bad)
    with pytest.raises(DatasetError, match=says.replace("(", r"\(").replace(")", r"\)")):
        written(tmp_path / "set", CONTINUOUS, [good, bad])
    assert left_in(tmp_path) == []


# --- whole or not at all

@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
def test_any_failure_removes_what_was_written(tmp_path, error):
    with pytest.raises(type(error)):
        with EpisodeWriter(tmp_path / "set", DISCRETE, {}) as writer:
            writer.add(make_episodes(DISCRETE, [3])[0])
            raise error
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("where", ["RowFile.append", "RowFile.close", "write_whole", "os.rename", "start_partial"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, where):
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    owner, _, name = where.rpartition(".")
    monkeypatch.setattr({"RowFile": module.RowFile, "os": os}.get(owner, module), name, full)
    with pytest.raises(DatasetError, match="No space left on device; make room in .* or set data.dir") as caught:
        written(tmp_path / "set", DISCRETE, make_episodes(DISCRETE, [3]))
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert left_in(tmp_path) == []


def test_a_real_limit_of_the_system_while_writing(tmp_path):
    code = f"""
import resource, signal, numpy as np
from pathlib import Path
from worldmodels_nb.data.episodes import *
from worldmodels_nb.data.envs import ActionSpec
from worldmodels_nb.data.episodes import Episode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with EpisodeWriter({str(tmp_path / 'set')!r}, DataSpec((3, 64, 64), ActionSpec("discrete", 2), [], []), {{}}) as writer:
        for _ in range(20): writer.add(Episode(np.zeros((3, 3, 64, 64), np.uint8), np.zeros(2, np.int64), np.zeros(2, np.float32), False, None))
except DatasetError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo_root(), timeout=120)
    assert "File too large" in done.stdout and "data.dir" in done.stdout, done.stderr[-500:]
    assert left_in(tmp_path) == []


def test_nothing_is_visible_before_the_end_and_an_existing_folder_is_kept(tmp_path):
    with EpisodeWriter(tmp_path / "set", DISCRETE, {}) as writer:
        writer.add(make_episodes(DISCRETE, [3])[0])
        assert not (tmp_path / "set").exists()
    before = (tmp_path / "set" / "dataset.json").read_bytes()
    with pytest.raises(FileExistsError): written(tmp_path / "set", DISCRETE, make_episodes(DISCRETE, [9]))
    assert (tmp_path / "set" / "dataset.json").read_bytes() == before and left_in(tmp_path) == ["set"]


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from worldmodels_nb.data.episodes import start_partial
folder = start_partial(Path({str(tmp_path / 'set')!r})); (folder / "frames.npy").write_bytes(b"x" * 1000)
print(folder.name, flush=True); time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=repo_root())
    try:
        name = child.stdout.readline().strip()
        assert name.startswith(PARTIAL) and sweep_partial(tmp_path) == [] and left_in(tmp_path) == [name]
    finally: child.send_signal(signal.SIGKILL); child.wait()
    for foreign in (".partial-another_machine-1-abc", "partial", ".partial-"): (tmp_path / foreign).mkdir()
    written(tmp_path / "set", DISCRETE, make_episodes(DISCRETE, [3]))
    assert left_in(tmp_path) == sorted(["set", ".partial-another_machine-1-abc", "partial", ".partial-"])


# --- opening

NAMES = ["actions", "frames", "lengths", "rewards", "states", "terminated"]


@pytest.fixture
def stored(tmp_path):
    return written(tmp_path / "set", CONTINUOUS, make_episodes(CONTINUOUS, [3, 2])).folder


@pytest.mark.parametrize("name", NAMES)
def test_truncated_missing_and_altered_files_are_named(stored, name):
    path = stored / f"{name}.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=f"{name}.npy has {len(content) - 1} bytes and should have {len(content)}"): open_dataset(stored)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if name != "lengths": open_dataset(stored)
    with pytest.raises(DatasetError, match="lengths|do not fit" if name == "lengths" else f"{name}.npy was altered"): verify(stored)
    path.unlink()
    with pytest.raises(DatasetError, match=f"{name}.npy is missing"): open_dataset(stored)


@pytest.mark.parametrize("change, says", [
    (lambda r: r.update(schema_version=2), "schema version 2, and this code reads 1"),
    (lambda r: r.pop("schema_version"), "schema version None"),
    (lambda r: r.pop("spec"), "damaged at 'spec'"),
    (lambda r: r["spec"].pop("action"), "damaged at 'action'"),
    (lambda r: r["spec"]["action"].update(surprise=1), "damaged"),
    (lambda r: r.update(files=[]), "damaged"),
    (lambda r: r["files"].pop("rewards"), "damaged at 'rewards'"),
    (lambda r: r["spec"].update(frame_shape=[3, 4, 2]), "frames.npy holds rows uint8 .*, and its record promises"),
])
def test_a_damaged_record_is_refused(stored, change, says):
    record = json.loads((stored / "dataset.json").read_text())
    change(record)
    (stored / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DatasetError, match=says): open_dataset(stored)


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 1,', "\ufeff", "[1]", "null"])
def test_a_record_that_is_not_one_is_refused(stored, content):
    (stored / "dataset.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError): open_dataset(stored)


def test_an_altered_record_is_found_by_verify(stored):
    record = json.loads((stored / "dataset.json").read_text())
    record["spec"]["position"] = [1]
    (stored / "dataset.json").write_text(json.dumps(record))
    open_dataset(stored)
    with pytest.raises(DatasetError, match="dataset.json was altered"): verify(stored)


def test_arrays_that_do_not_fit_together_are_refused(stored):
    record = json.loads((stored / "dataset.json").read_text())
    np.save(stored / "rewards.npy", np.zeros(3, np.float32))
    record["files"]["rewards"]["bytes"] = (stored / "rewards.npy").stat().st_size
    (stored / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DatasetError, match="rewards do not fit"): open_dataset(stored)


class Spring:
    def __reduce__(self): return (os.mkdir, (str(Spring.trap),))


def test_pickled_objects_are_never_loaded(stored, tmp_path):
    Spring.trap = tmp_path / "sprung"
    np.save(stored / "rewards.npy", np.array([Spring()] * 7, object))
    record = json.loads((stored / "dataset.json").read_text())
    record["files"]["rewards"]["bytes"] = (stored / "rewards.npy").stat().st_size
    (stored / "dataset.json").write_text(json.dumps(record))
    for read in (open_dataset, verify):
        with pytest.raises(DatasetError, match="not a plain array"): read(stored)
    assert not Spring.trap.exists()


def test_file_names_in_the_record_lead_nowhere(stored):
    record = json.loads((stored / "dataset.json").read_text())
    record["files"]["../../outside"] = dict(bytes=1, sha256="0")
    (stored / "dataset.json").write_text(json.dumps(record))
    assert len(open_dataset(stored)) == 2


# --- making and reusing

def wanted(tmp_path, **more):
    values = {"collect": {"episodes": 4, "steps": 6}, "data": {"dir": str(tmp_path / "datasets")}}
    for key, value in more.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return make_settings(values)


def test_a_dataset_is_made_once_and_then_reused(tmp_path, monkeypatch):
    first = make_dataset(wanted(tmp_path), progress=False)
    monkeypatch.setattr(module, "gather", lambda *a: pytest.fail("collected again"))
    for same in (wanted(tmp_path), wanted(tmp_path, collect__workers=2), wanted(tmp_path, training__steps=7), wanted(tmp_path, ppo__n_steps=64),
                 wanted(tmp_path, model__frame_stack=4), wanted(tmp_path, data__validation_split=.5)):
        again = make_dataset(same, progress=False)
        assert (again.origin, again.folder, again.hash) == ("reused", first.folder, first.hash)
    assert first.origin == "made" and left_in(tmp_path / "datasets") == [first.folder.name]
    assert first.folder.name.startswith("tworooms-v0-wander-4-")


@pytest.mark.parametrize("key, value", [("env__color", "grey"), ("env__size", 48), ("env__kwargs", {"wall": "random"}), ("collect__steps", 7),
                                        ("collect__persistence", 1.0), ("collect__policy", "random"), ("run__seed", 1), ("collect__random_share", .5)])
def test_what_determines_the_content_makes_another_dataset(tmp_path, key, value):
    extra = {"model__patch_size": 8, key: value}
    assert dataset_name(wanted(tmp_path, **extra)) != dataset_name(wanted(tmp_path))


def test_ppo_counts_only_when_it_is_the_policy(tmp_path):
    plain, other = (wanted(tmp_path, collect__policy="ppo", ppo__n_steps=n) for n in (64, 128))
    assert dataset_name(plain) != dataset_name(other)
    assert dataset_name(plain) != dataset_name(wanted(tmp_path, collect__policy="ppo", ppo__n_steps=64, model__frame_stack=4))
    assert dataset_name(plain) == dataset_name(wanted(tmp_path, collect__policy="ppo", ppo__n_steps=64, ppo__subprocesses=True))
    loads, names = wanted(tmp_path, collect__policy="ppo", ppo__load=str(tmp_path)), []
    for content in (b"one", b"two"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        names.append(dataset_name(loads))
    assert names[0] != names[1]


def test_a_given_dataset_is_used_as_it_is_or_refused_with_both_values(tmp_path):
    made = make_dataset(wanted(tmp_path), progress=False)
    given = make_dataset(wanted(tmp_path, data__path=str(made.folder), collect__episodes=99, run__seed=5), progress=False)
    assert (given.origin, given.hash) == ("given", made.hash)
    for key, value, says in (("env__color", "grey", 'env.color = "rgb", and the settings say "grey"'), ("env__size", 48, "env.size = 64, and the settings say 48"),
                             ("env__id", "CartPole-v1", 'env.id = "worldmodels_nb/TwoRooms-v0", and the settings say "CartPole-v1"'),
                             ("env__kwargs", {"wall": "random"}, 'env.kwargs = {}, and the settings say {"wall": "random"}')):
        with pytest.raises(DatasetError) as caught: make_dataset(wanted(tmp_path, data__path=str(made.folder), **{key: value}))
        assert says in str(caught.value) and "data.path" in str(caught.value)
    with pytest.raises(DatasetError, match="is not a dataset"): make_dataset(wanted(tmp_path, data__path=str(tmp_path / "nowhere")))


def test_a_given_dataset_without_settings_is_judged_by_its_frames(tmp_path):
    folder = written(tmp_path / "set", DISCRETE, make_episodes(DISCRETE, [3])).folder
    with pytest.raises(DatasetError, match=r"frames of shape \(1, 2, 2\), and the settings ask for \(3, 64, 64\)"): make_dataset(wanted(tmp_path, data__path=str(folder)))


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    settings = wanted(tmp_path)
    real = module.write_dataset
    def late(settings, folder, progress):
        real(settings, folder, progress)
        return real(settings, folder, progress)
    monkeypatch.setattr(module, "write_dataset", late)
    assert make_dataset(settings, progress=False).origin == "reused"


def test_a_folder_with_other_settings_than_its_name_is_refused(tmp_path):
    made = make_dataset(wanted(tmp_path), progress=False)
    made.folder.rename(made.folder.with_name(dataset_name(wanted(tmp_path, run__seed=3))))
    with pytest.raises(DatasetError, match="other settings than its name"): make_dataset(wanted(tmp_path, run__seed=3), progress=False)


def test_a_failed_collection_leaves_nothing(tmp_path, monkeypatch):
    def broken(settings, progress):
        yield from make_episodes(DataSpec((3, 64, 64), ActionSpec("continuous", 2), ["a", "b", "c", "d"], []), [3])
        raise RuntimeError("the environment died")
    monkeypatch.setattr(module, "gather", broken)
    with pytest.raises(RuntimeError): make_dataset(wanted(tmp_path), progress=False)
    assert left_in(tmp_path / "datasets") == []


def test_stored_size_is_at_most_two_percent_above_the_content(tmp_path):
    data = make_dataset(wanted(tmp_path, collect__episodes=30, collect__steps=32), progress=False)
    on_disk = sum(path.stat().st_size for path in data.folder.iterdir())
    assert on_disk <= 1.02 * sum(array.nbytes for array in (data.frames, data.actions, data.rewards))


# --- the sample

def test_the_sample_is_whole_small_and_worth_looking_at():
    data = verify("data/sample/tworooms")
    assert sample_dataset().hash == data.hash and data.spec.frame_shape == (3, 64, 64)
    assert sum(path.stat().st_size for path in data.folder.iterdir()) < 1.2e6
    right = data.states[:, 0] > data.states[:, 2]
    assert .2 < right.mean() < .8 and data.info["door_crossing_share"] >= 3 / 8 and data.lengths.min() >= 7
    assert str(repo_root()) not in (data.folder / "dataset.json").read_text()
    assert crosses_door(data.episode(0).states, data.spec.state_names)


def test_the_sample_can_be_made_again_and_replaced(tmp_path):
    first = make_sample(tmp_path / "sample")
    again = make_sample(tmp_path / "sample")
    assert first.hash == again.hash == sample_dataset().hash
    assert {p.name: p.read_bytes() for p in again.folder.iterdir() if p.suffix == ".npy"} == {p.name: p.read_bytes() for p in sample_dataset().folder.iterdir() if p.suffix == ".npy"}
    assert left_in(tmp_path) == ["sample"]


# --- split

@given(st.integers(2, 60), st.floats(.01, .99), st.integers(0, 2**31 - 1))
def test_a_split_covers_all_episodes_and_shares_none(E, share, seed):
    data = in_memory([1] * E)
    training, validation = data.split(share, seed)
    assert sorted([*training, *validation]) == list(range(E)) and len(training) and len(validation)
    assert abs(len(validation) - E * share) <= 1
    again = data.split(share, seed)
    assert np.array_equal(training, again[0]) and np.array_equal(validation, again[1])


def test_a_split_depends_on_its_seed_and_needs_two_episodes():
    assert len({tuple(in_memory([1] * 30).split(.2, seed)[1]) for seed in range(10)}) == 10
    with pytest.raises(DatasetError, match="collect.episodes"): in_memory([5]).split(.2)


# --- windows

def windows_by_hand(data, episodes, T, F):
    "The slow way: one window after another, one frame after another."
    found = []
    for e in episodes:
        episode = data.episode(e)
        for t in range(len(episode.actions) + 1 - T):
            frames = np.stack([episode.frames[max(t + i, 0)] for i in range(-(F - 1), T + 1)])
            found.append((frames, episode.actions[t:t + T], episode.rewards[t:t + T],
                          np.array([episode.terminated and t + k == len(episode.actions) - 1 for k in range(T)], bool), episode.states[t:t + T + 1]))
    return found


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 6), st.integers(1, 5), st.integers(0, 1000), st.data())
def test_windows_equal_the_slow_reference(lengths, T, F, seed, draw):
    data = in_memory(lengths, seed)
    episodes = draw.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True))
    expected = windows_by_hand(data, episodes, T, F)
    if not expected:
        with pytest.raises(DatasetError, match="train.window_steps.*collect.steps"): Windows(data, episodes, T, F)
        return
    windows = Windows(data, np.array(episodes), T, F)
    assert len(windows) == len(expected)
    order = np.random.default_rng(seed).permutation(len(windows))
    batch = windows.batch(order)
    for b, i in enumerate(order):
        for got, want in zip((batch.frames, batch.actions, batch.rewards, batch.terminated, batch.states), expected[i]):
            assert np.array_equal(got[b].numpy(), want)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(0, 12), st.integers(1, 6))
def test_windows_never_leave_their_episode(lengths, T, F):
    if max(lengths) < T: return
    data = in_memory(lengths)
    windows = Windows(data, np.arange(len(lengths)), T, F)
    episode_of = np.repeat(np.arange(len(lengths)), np.array(lengths) + 1)
    rows = windows.rows(np.arange(len(windows)))
    assert (episode_of[rows] == episode_of[rows[:, :1]]).all()
    assert len({tuple(r) for r in rows[:, F - 1:]}) == len(windows) == sum(max(L + 1 - T, 0) for L in lengths)
    own = rows[:, F - 1:]
    assert (np.diff(own, axis=1) == 1).all()
    if T: assert (own[:, :-1] < (data.starts + data.lengths)[episode_of[own[:, :-1]]]).all()   # no action is read from a last row


def test_types_and_shapes_of_a_batch():
    discrete = Windows(in_memory([5, 6], spec=DISCRETE), [0, 1], 3, 2).sample(4, 0, 0)
    assert discrete.frames.shape == (4, 5, 1, 2, 2) and discrete.frames.dtype == torch.uint8
    assert discrete.actions.shape == (4, 3) and discrete.actions.dtype == torch.int64
    assert discrete.states is None and discrete.latents is None
    assert discrete.rewards.dtype == torch.float32 and discrete.terminated.dtype == torch.bool
    continuous = Windows(in_memory([5, 6]), [0, 1], 3).sample(4, 0, 0)
    assert continuous.actions.shape == (4, 3, 2) and continuous.states.shape == (4, 4, 3)
    moved = continuous.to("meta")
    assert moved.frames.device.type == "meta" and moved.latents is None and continuous.frames.device.type == "cpu"


def test_no_steps_gives_single_frames():
    data = in_memory([3, 4])
    windows = Windows(data, [0, 1], 0)
    assert len(windows) == len(data.frames)
    batch = windows.batch(np.arange(len(windows)))
    assert np.array_equal(batch.frames[:, 0], data.frames) and batch.actions.shape == (9, 0, 2)


def test_cached_latents_follow_their_frames(tmp_path):
    data = in_memory([3, 4])
    np.save(tmp_path / "z.npy", np.arange(9 * 2 * 3, dtype=np.float16).reshape(9, 2, 3))
    latents = np.load(tmp_path / "z.npy", mmap_mode="r")
    batch = Windows(data, [1], 2, frame_stack=3, latents=latents).batch(np.array([1]))
    assert batch.latents.dtype == torch.float32 and np.array_equal(batch.latents[0].numpy(), latents[5:8])
    with pytest.raises(DatasetError, match="encode this dataset anew"): Windows(data, [1], 2, latents=latents[:-1])


def test_samples_are_a_function_of_seed_and_step_only():
    windows = Windows(in_memory([9, 9, 9]), [0, 1, 2], 2)
    a = [windows.sample(8, 3, step).frames for step in range(4)]
    b = [Windows(in_memory([9, 9, 9]), [0, 1, 2], 2).sample(8, 3, step).frames for step in reversed(range(4))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], windows.sample(8, 4, 0).frames)


def test_samples_reach_every_window_equally_often():
    windows = Windows(in_memory([4, 6]), [0, 1], 1)
    frames = {tuple(f.flatten().tolist()): i for i, f in enumerate(windows.batch(np.arange(len(windows))).frames)}
    counts = np.bincount([frames[tuple(f.flatten().tolist())] for step in range(50) for f in windows.sample(40, 0, step).frames], minlength=len(windows))
    assert len(windows) == 10 and (abs(counts - 200) < 5 * 200**.5).all()


def test_batches_do_not_touch_the_file(stored):
    data = open_dataset(stored)
    before = (stored / "frames.npy").read_bytes()
    batch = Windows(data, [0, 1], 1).sample(4, 0, 0)
    batch.frames.zero_(); batch.states.zero_()
    assert (stored / "frames.npy").read_bytes() == before and data.frames.any()


def anonymous_memory():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")).split()[1]) / 1e3  # MB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_reading_windows_does_not_fill_memory(tmp_path):
    n = 32_000                                                         # 393 MB of frames, sparse on disk
    frames = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.uint8, (n, 3, 64, 64))
    del frames
    rows = dict(frames=np.load(tmp_path / "frames.npy", mmap_mode="r"), actions=np.zeros(n, np.int64), rewards=np.zeros(n, np.float32),
                terminated=np.zeros(n, bool), lengths=np.full(n // 32, 31))
    data = Dataset(tmp_path, dict(spec=asdict(DataSpec((3, 64, 64), ActionSpec("discrete", 2), [], [])), hash="0"), rows)
    windows = Windows(data, np.arange(len(data)), 3)
    windows.sample(64, 0, 0)
    before = anonymous_memory()
    for step in range(300): windows.sample(64, 0, step)
    assert anonymous_memory() - before < 40


# --- Minari

minari = pytest.importorskip("minari")
pytest.importorskip("h5py")


@pytest.mark.parametrize("spec", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_minari_and_back_changes_nothing(tmp_path, spec):
    spec = DataSpec((spec.frame_shape[0], 40, 40), spec.action, spec.state_names, spec.position)
    data = written(tmp_path / "set", spec, make_episodes(spec, [3, 1, 5]), env=dict(id="CartPole-v1", kwargs={}))
    color = "grey" if spec.frame_shape[0] == 1 else "rgb"
    back = from_minari(to_minari(data, tmp_path / "export"), tmp_path / "back", color=color)
    assert back.hash == data.hash and back.spec == spec and back.info["settings"] == data.info["settings"]
    for name in ("frames", "actions", "rewards", "terminated"): assert np.array_equal(getattr(back, name), getattr(data, name))
    assert left_in(tmp_path) == ["back", "export", "set"]


def test_minari_reads_the_export_by_itself(tmp_path):
    data = sample_dataset()
    theirs = minari.MinariDataset(to_minari(data, tmp_path / "export"))
    assert theirs.total_episodes == 8 and theirs.total_steps == 88 and theirs.env_spec.id == "worldmodels_nb/TwoRooms-v0"
    episode = next(theirs.iterate_episodes([2]))
    assert np.array_equal(episode.observations, np.moveaxis(data.episode(2).frames, 1, -1)) and np.array_equal(episode.actions, data.episode(2).actions)
    assert episode.truncations.tolist() == [False] * 10 + [True] and not episode.terminations.any()


def foreign(folder, images, action_space, actions, **metadata):
    "A Minari dataset as others make them, one episode."
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    storage = MinariStorage.new(folder, gym.spaces.Box(0, 255, images.shape[1:], np.uint8), action_space, data_format="hdf5", jpeg_encoding=False)
    storage.update_metadata(dict(dataset_id="theirs/images-v3", minari_version=minari.__version__, **metadata))
    n = len(actions)
    storage.update_episodes([EpisodeBuffer(observations=images, actions=actions, rewards=[.5] * n, terminations=[False] * (n - 1) + [True], truncations=[False] * n)])
    return folder


def test_a_strangers_image_dataset_is_imported(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 36), np.uint8)                         # grey, not square
    source = foreign(tmp_path / "source", images, gym.spaces.Discrete(3, start=1), np.array([1, 3, 2, 1]))
    data = from_minari(source, tmp_path / "set", size=12, color="grey")
    assert data.spec == DataSpec((1, 12, 12), ActionSpec("discrete", 3), [], [])
    assert data.episode(0).actions.tolist() == [0, 2, 1, 0] and data.episode(0).terminated and data.rewards[:4].tolist() == [.5] * 4
    by_hand = images.reshape(5, 12, 4, 12, 3).mean((2, 4))                                            # 4 × 3 pixels become one
    assert np.abs(data.frames[:, 0] - by_hand).max() <= .51
    assert data.info["settings"]["minari"] == dict(dataset_id="theirs/images-v3")
    assert from_minari(source, tmp_path / "colour", size=12).spec.frame_shape == (3, 12, 12)


def test_a_strangers_dataset_without_images_is_refused(tmp_path):
    source = foreign(tmp_path / "source", np.zeros((3, 4), np.uint8), gym.spaces.Discrete(2), np.array([0, 1]))
    with pytest.raises(DatasetError, match="not uint8 images"): from_minari(source, tmp_path / "set")


def test_an_altered_export_is_refused_and_nothing_is_left(tmp_path):
    import h5py
    export = to_minari(sample_dataset(), tmp_path / "export")
    with h5py.File(export / "main_data.hdf5", "r+") as file: file["episode_3/observations"][2, 5, 5, 0] ^= 1
    with pytest.raises(DatasetError, match="content hash"): from_minari(export, tmp_path / "set")
    assert left_in(tmp_path) == ["export"]


def test_a_minari_dataset_without_spaces_does_not_start_its_environment(tmp_path, monkeypatch):
    source = foreign(tmp_path / "source", np.zeros((3, 40, 40, 3), np.uint8), gym.spaces.Discrete(2), np.array([0, 1]))
    metadata = json.loads((source / "metadata.json").read_text())
    del metadata["action_space"]
    (source / "metadata.json").write_text(json.dumps(metadata | dict(env_spec=gym.spec("CartPole-v1").to_json())))
    monkeypatch.setattr(gym, "make", lambda *a, **k: pytest.fail("an environment was made"))
    with pytest.raises(DatasetError, match="declares no observation and action space"): from_minari(source, tmp_path / "set")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (lambda: to_minari(sample_dataset(), tmp_path / "a"), lambda: from_minari(tmp_path, tmp_path / "b")):
        with pytest.raises(DatasetError, match=r'pip install "worldmodels_nb\[minari\]"'): call()
