"However a dataset is damaged, it opens, or one sentence says why not."

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worldmodels_nb.data.datasets import Dataset, Windows, open_dataset, verify
from worldmodels_nb.data.episodes import DatasetError

NAMES = ["actions", "frames", "lengths", "rewards", "states", "terminated"]
many = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, continuous, make_episodes, written):
    "A tiny dataset, and all its bytes."
    folder = tmp_path_factory.mktemp("fuzz") / "set"
    written(folder, continuous, make_episodes(continuous, [3, 2]))
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def judge(whole, name, content):
    "Put other bytes into one file; what is then opened can be used, and what is not says so in one line."
    folder, contents = whole
    (folder / name).write_bytes(content)
    try:
        for read in (open_dataset, verify):
            try:
                data = read(folder)
            except DatasetError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                assert isinstance(data, Dataset)
                batch = Windows(data, np.arange(len(data)), 1).batch(np.array([0]))
                assert batch.states.isfinite().all() and batch.rewards.isfinite().all()
                assert data.episode(len(data) - 1).frames.shape[1:] == data.spec.frame_shape
    finally:
        (folder / name).write_bytes(contents[name])


def damaged(content, first):
    "Bytes flipped, cut out, swapped or put in, most often near the beginning."
    place = st.one_of(st.integers(0, min(first, len(content)) - 1), st.integers(0, len(content) - 1))
    odd = st.sampled_from([b"\x00", b"\xff", b"(", b"[", b"{", b"}", b"-", b"9", b"'", b"\n", b"9" * 30])

    def flip(at, bits): return content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :]
    def cut(at, n): return content[:at] + content[at + n :]
    def put(at, some): return content[:at] + some + content[at:]
    def over(at, some): return content[:at] + some + content[at + len(some) :]

    def swap(at, to):
        bytes_ = bytearray(content)
        bytes_[at], bytes_[to] = bytes_[to], bytes_[at]
        return bytes(bytes_)

    return st.one_of(
        st.builds(flip, place, st.integers(1, 255)),
        st.builds(cut, place, st.integers(1, 200)),
        st.builds(put, place, odd),
        st.builds(over, place, odd),
        st.builds(swap, place, place),
    )


@many
@given(st.data())
def test_any_damage_to_the_record_s_bytes(whole, data):
    content = whole[1]["dataset.json"]
    judge(whole, "dataset.json", data.draw(damaged(content, len(content))))


@pytest.mark.parametrize("name", NAMES)
@settings(many, max_examples=30)
@given(st.data())
def test_any_damage_to_an_array(whole, name, data):
    judge(whole, f"{name}.npy", data.draw(damaged(whole[1][f"{name}.npy"], 128)))


@pytest.mark.parametrize("name", NAMES)
def test_an_array_in_another_s_place(whole, name):
    for other in whole[1]:
        if other != f"{name}.npy":
            judge(whole, f"{name}.npy", whole[1][other])


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**12, 2**63, 10**30, 1.5, "", "../..", "/dev/zero", "\ud800", "0" * 64])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    "The way to every value in nested lists and dictionaries."
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


@many
@given(st.data())
def test_any_other_value_in_the_record(whole, data):
    record = json.loads(whole[1]["dataset.json"])
    lie = copy.deepcopy(record)
    for path in data.draw(st.lists(st.sampled_from(list(places(record))[1:]), min_size=1, max_size=2)):
        inner = lie
        try:
            for key in path[:-1]:
                inner = inner[key]
            if data.draw(st.booleans()) or isinstance(inner, list):
                inner[path[-1]] = data.draw(plain)
            else:
                del inner[path[-1]]
        except (KeyError, TypeError, IndexError):
            pass  # the other lie has taken its place
    judge(whole, "dataset.json", json.dumps(lie).encode())
