"Readers and writers: whatever a file holds, it is read whole or refused in one sentence with its name."

import errno
import io
import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from worldmodels_nb.settings import (
    FileError,
    Settings,
    WriteError,
    find_fault,
    one_line,
    parse_json,
    read_arrays,
    read_json,
    read_json_lines,
    read_text,
    refusal,
    save_settings,
    shorten,
    write_json,
    write_whole,
    writing,
)

DEEP = b'{"a":' * 5000 + b"1" + b"}" * 5000
NUMBER = b'{"schema_version": 1, "a": ' + b"7" * 5000 + b"}"
READERS = [read_text, lambda path, mend: read_json(path, None, mend), read_json_lines, read_arrays]


def refused(call, *words):
    with pytest.raises(FileError) as caught:
        call()
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and len(said) < 600 and all(word in said for word in words), said


# --- plain values and pictures of values


@pytest.mark.parametrize(
    "value, words",
    [
        (float("inf"), "not finite"),
        ([1, [float("nan")]], "not finite"),
        ({"a": b"b"}, "bytes"),
        ((1, 2), "tuple"),
        ({"a": {None: 1}}, "key None"),
        ("a\0b", r"\x00"),
        (["\udfff"], r"\udfff"),
        ({"\ud800": 1}, r"\ud800"),
        (10**40, "40 digits"),
        (-(10**5000), "40 digits"),
        (np.int64(3), "int64"),
        (np.zeros(2), "ndarray"),
        (json.loads("[" * 40 + "]" * 40), "32 deep"),
        (object(), "object"),
        (1j, "complex"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_is_said(value, words):
    assert words in find_fault(value)


@pytest.mark.parametrize(
    "value", [None, True, 0, -1.5, "", "κ\n", [], {}, {"a": [1, {"b": None}]}, 10**39, "\U0001f600"]
)
def test_what_is_plain_has_no_fault(value):
    assert find_fault(value) == "" and parse_json(json.dumps(value)) == value
    assert bool(find_fault(value, below=" ")) == (value == "κ\n")


def test_no_value_is_too_large_or_too_round_to_be_looked_through():
    circle, laughs = {}, [1] * 10
    circle["a"] = [circle]
    for _ in range(20):
        laughs = [laughs] * 10
    assert "deep" in find_fault(circle) and "values" in find_fault(laughs)


class Shy:
    "Has no picture of itself."

    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value",
    [
        "a" * 10**5,
        list(range(10**5)),
        np.eye(30),
        10**5000,
        Shy(),
        [[[[[[Shy()]]]]]],
        {"a\nb": "c\nd"},
        {i: i for i in range(1000)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_value_is_shown_in_a_short_line(value):
    said = shorten(value)
    assert 0 < len(said) <= 80 and len(said.splitlines()) == 1
    assert one_line("a\n\t b\u2028c") == "a b c" and len(one_line("x" * 999)) == 160


# --- text


@pytest.mark.parametrize(
    "data, text",
    [
        ("κ = 1\n".encode(), "κ = 1\n"),
        (b"\xef\xbb\xbfa", "a"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        (b"", ""),
        ("a\u2028b\x85".encode(), "a\u2028b\x85"),
    ],
)
def test_text_is_read_with_or_without_a_mark(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt") == text


@pytest.mark.parametrize(
    "data",
    [
        "größe".encode("latin-1"),
        "a = 1".encode("utf-16"),
        "a = 1".encode("utf-16-le"),
        "a".encode("utf-32"),
        b"a\0b",
        b"\xff",
        b"\xed\xa0\x80",
        b"\x80abc",
    ],
)
@pytest.mark.parametrize("read", READERS[:2])
def test_other_encodings_are_refused(tmp_path, data, read):
    (tmp_path / "a.txt").write_bytes(data)
    refused(lambda: read(tmp_path / "a.txt", "save it again"), "a.txt", "UTF-8", "save it again")


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    missing = [] if read is READERS[1] else ["none", "loop", "n" * 300, "a\0b"]
    for name in ("", "pipe", *missing):
        refused(lambda name=name: read(tmp_path / name, "look there"), "look there")
    assert read_json(tmp_path / "none") is None


# --- JSON


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1}{', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        (DEEP, "deep"),
        (b"[" * 40 + b"]" * 40, "deep"),
        (NUMBER, "digits"),
        (b'{"a": "\\ud800"}', "d800"),
        (b'{"a\\u0000": 1}', "x00"),
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b'"a"', "not an object"),
        (b"7", "not an object"),
    ],
)
def test_damaged_json_is_refused(tmp_path, data, words):
    (tmp_path / "a.json").write_bytes(data)
    refused(lambda: read_json(tmp_path / "a.json", None, "get it again"), "a.json", words, "get it again")


@pytest.mark.parametrize("version", ["true", "1.0", '"1"', "null", "[1]", "2", "9" * 39, '{"a": 1}'])
def test_only_the_version_that_is_read_is_taken(tmp_path, version):
    (tmp_path / "a.json").write_text(f'{{"schema_version": {version}}}')
    refused(lambda: read_json(tmp_path / "a.json", 1), "a.json", "schema version", "reads 1")


CONTENT = {
    "schema_version": 1,
    "rows": [],
    "run": {"seed": 3, "name": "a", "done": True},
    "best": None,
    "x": 1.5,
}


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"row": list}, ["no 'row'"]),
        ({"run.sed": int}, ["no 'run.sed'"]),
        ({"rows.seed": int}, ["no 'rows.seed'"]),
        ({"run.done": int}, ["run.done", "a whole number"]),
        ({"run.seed": bool}, ["run.seed", "true or false"]),
        ({"x": int}, ["'x'", "1.5"]),
        ({"rows": dict}, ["an object"]),
        ({"best": float}, ["None", "a number"]),
        ({"run.name": list}, ["a list"]),
        ({"run.done": float}, ["a number"]),
        ({"run.seed": str | None}, ["str"]),
    ],
)
def test_keys_that_must_be_there_are_checked(tmp_path, keys, words):
    write_json(tmp_path / "a.json", CONTENT)
    refused(lambda: read_json(tmp_path / "a.json", keys=keys), "a.json is damaged", *words)
    fine = {"rows": list, "run": dict, "run.seed": int, "x": float, "best": float | None, "run.done": bool}
    assert read_json(tmp_path / "a.json", keys=fine | {"run.seed": float}) == CONTENT


# --- JSON lines

LINES = b'{"step": 1}\n{"step": 2, "a": "\xce\xba"}\n'


@pytest.mark.parametrize(
    "tail", [b"", b"{", b'{"step": 3, "a', b'{"a": "\xce', b"\0\0\0", b"[1]", b"NaN", b"  "]
)
def test_half_a_line_at_the_end_is_left_out(tmp_path, tail):
    (tmp_path / "a.jsonl").write_bytes(LINES + tail)
    assert read_json_lines(tmp_path / "a.jsonl") == [{"step": 1}, {"step": 2, "a": "κ"}]


def test_a_whole_line_at_the_end_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"step": 3}')
    assert [row["step"] for row in read_json_lines(tmp_path / "a.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{", "not JSON"),
        (b"[1]", "not an object"),
        (b"\xff", "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (DEEP, "deep"),
        (NUMBER, "digits"),
        (b"\0", "not JSON"),
        (b'{"a": 1} {"a": 2}', "not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(LINES + line + b"\n" + LINES)
    refused(lambda: read_json_lines(tmp_path / "a.jsonl", "start over"), "in line 3", words, "start over")


# --- arrays


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def forged(shape, dtype="<f4", data=b"", version=b"\x01\0"):
    "An .npz whose one array has this header."
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    own = b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("z.npy", own)
    return buffer.getvalue()


def encrypted():
    data = bytearray(npz(z=np.zeros(3)))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def test_arrays_are_read_back(tmp_path):
    arrays = dict(
        a=np.arange(6).reshape(2, 3),
        b=np.asfortranarray(np.eye(3, dtype=np.float32)),
        c=np.zeros((0, 4)),
        d=np.array(True),
        e=np.array([1, 2], np.uint8),
    )
    (tmp_path / "a.npz").write_bytes(npz(**arrays))
    found = read_arrays(tmp_path / "a.npz", names=["a", "e"])
    assert list(found) == list(arrays)
    for name, own in arrays.items():
        assert (
            found[name].dtype == own.dtype
            and np.array_equal(found[name], own)
            and found[name].flags.writeable
        )


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "npz"),
        (b"PK", "npz"),
        (npz(z=np.zeros(9))[:60], "npz"),
        (b"\x93NUMPY", "npz"),
        (encrypted(), "npz"),
        (npz(z=np.array([{}, 3], object)), "object"),
        (npz(z=np.arange(3, dtype=">i4")), ">i4"),
        (npz(z=np.array([b"a"])), "S1"),
        (npz(z=np.zeros(2, [("a", "i4")])), "npz"),
        (npz(z=np.zeros(3, complex)), "npz"),
        (forged("(1000000000000000,)"), "header promises"),
        (forged("(-1, -2)", data=b"\0" * 8), "header promises"),
        (forged(f"(0, {10**30})"), "npz"),
        (forged("(2,)", data=b"\0" * 4), "header promises"),
        (forged("(2,)", data=b"\0" * 12), "header promises"),
        (forged("('a',)"), "npz"),
        (forged("__import__"), "npz"),
        (forged("(" * 50 + ")" * 50), "npz"),
        (forged("(1,)", "|O"), "object"),
        (forged("(1,)", version=b"\x09\0"), "npz"),
        (npz(a=np.zeros(2)), "no array 'z'"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, data, words):
    (tmp_path / "a.npz").write_bytes(data)
    refused(
        lambda: read_arrays(tmp_path / "a.npz", "measure again", ["z"]), "a.npz is damaged", words, "again"
    )


def test_an_archive_that_unfolds_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("worldmodels_nb.settings._LARGEST", 10**6)
    (tmp_path / "a.npz").write_bytes(npz(z=np.zeros(10**6)))
    assert (tmp_path / "a.npz").stat().st_size < 10**5
    refused(lambda: read_arrays(tmp_path / "a.npz"), "unfolds")


# --- every reader, under fire

SOUND = [
    LINES,
    json.dumps(CONTENT).encode(),
    npz(z=np.arange(9), y=np.eye(2)),
    forged("(3,)", data=b"\0" * 12),
]


@limits(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    data=st.sampled_from(SOUND),
    read=st.sampled_from(READERS),
    places=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 40), st.binary(max_size=4)), max_size=4),
)
def test_bytes_flipped_cut_and_swapped(data, read, places, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fire"
    for at, cut, new in places:
        data = data[:at] + new + data[at + cut :]
    path.write_bytes(data)
    try:
        found = read(path, "make it again")
    except FileError as error:
        assert len(str(error).splitlines()) == 1 and str(path) in str(error)
    else:
        assert isinstance(found, (str, dict, list))


# --- writing


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "No space left on device; make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "make its folder writable"),
        (errno.EIO, "cannot write"),
        (errno.EACCES, "make its folder writable"),
    ],
)
@pytest.mark.parametrize("at", ["os.fsync", "os.replace", "tempfile.mkstemp"])
def test_whatever_the_system_refuses_is_one_sentence(tmp_path, monkeypatch, number, words, at):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    path = write_whole(tmp_path / "a.txt", "old")
    monkeypatch.setattr(at, refuse)
    for call in (
        lambda: write_whole(path, "new"),
        lambda: write_json(path, {}),
        lambda: save_settings(Settings(), path),
    ):
        with pytest.raises(WriteError) as caught:
            call()
        said = str(caught.value)
        assert said.startswith(f"cannot write {path}: ") and words in said and "\n" not in said
        assert caught.value.errno == number and isinstance(caught.value, OSError)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("none/a.txt", "make its folder first"),
        ("n" * 300, "choose a shorter name"),
        ("folder", "choose another name"),
        ("file/a.txt", "cannot write"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, words):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=words):
        write_whole(tmp_path / name, b"")


@pytest.mark.parametrize(
    "content",
    [
        {"a": {1}},
        {"a": float("nan")},
        {"a": object()},
        {"a": "\ud800"},
        {(1, 2): 3},
        {"a": [10**5000]},
        {"a": b""},
    ],
)
def test_values_that_cannot_be_written_leave_the_old_file(tmp_path, content):
    write_json(tmp_path / "a.json", dict(steps=1))
    with pytest.raises(WriteError, match="cannot write .*a.json") as caught:
        write_json(tmp_path / "a.json", content)
    assert "\n" not in str(caught.value) and read_json(tmp_path / "a.json")["steps"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_other_writes_get_the_same_sentence(tmp_path):
    with pytest.raises(WriteError, match="cannot write here: File exists"), writing("here"):
        tmp_path.mkdir()
    with pytest.raises(WriteError, match="^inner$"), writing("outer"):
        raise WriteError("inner")
    with pytest.raises(KeyError), writing("here"):
        raise KeyError("not a matter of disks")
    assert refusal(lambda: read_json(write_whole(tmp_path / "a", b"\xff"))).endswith("make it again")
