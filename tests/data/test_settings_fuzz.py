"Settings under fire: whatever a file, a preset or an override says is taken, or refused in one sentence."

import ast
import datetime
from types import UnionType
from typing import Annotated

import numpy as np
from hypothesis import HealthCheck, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from worldmodels_nb.settings import (
    Settings,
    SettingsError,
    load_settings,
    make_settings,
    repo_root,
    save_settings,
    sections,
)

LINES = (repo_root() / "settings.ini").read_bytes().splitlines(keepends=True)
BASE = b"".join(line for line in LINES if line.strip() and not line.startswith((b"#", b"[study/", b"[demo/")))
KEYS = sorted(Settings().flat())


def often(examples):
    return limits(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def survives(call, folder):
    "Settings that load are written and read back; the rest is one line of `SettingsError`."
    try:
        settings = call()
    except SettingsError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and len(said) < 2000, said
        return
    assert load_settings(save_settings(settings, folder / "saved.ini")) == settings


@st.composite
def damaged(draw, data=BASE):
    "A piece of the file, some bytes of it flipped, cut out, doubled or swapped."
    start = draw(st.integers(0, len(data) - 1))
    data = bytearray(data[start : start + draw(st.integers(1, 1500))])
    for _ in range(draw(st.integers(0, 4))):
        i, j = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(st.sampled_from(["flip", "cut", "double", "swap", "insert"]))
        if kind == "flip" and data:
            data[i % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[i:j]
        elif kind == "double":
            data[i:i] = data[i : min(j, i + 200)]
        elif kind == "swap":
            data[i:j] = data[i:j][::-1]
        else:
            data[i:i] = draw(
                st.sampled_from([b"\0", b"\xff", b"\\", b'"', b"\n", b"[", b"=", b"1e999", b"#", b"'"])
            )
    return bytes(data)


words = st.text(st.characters(), max_size=12)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 300),
    st.floats(),
    words,
    st.sampled_from(["1e-4", "True", "D:\new", "~", "../..", "", "patch", "null", "9" * 5000]),
    st.just(5000).map(lambda digits: 10**digits),
)
plain = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
strange = st.one_of(
    st.dates(),
    st.datetimes(),
    st.binary(max_size=5),
    st.sets(st.integers(), max_size=3),
    st.tuples(st.integers()),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int64, st.integers(0, 99)),
    st.complex_numbers(),
    st.just(datetime.timedelta(1)),
    st.just(object()),
    st.just(ast),
    st.just(np.eye(3)),
    st.dictionaries(st.integers() | st.none() | st.tuples(), plain, min_size=1, max_size=2),
)
anything = plain | strange | st.lists(strange, max_size=2) | st.dictionaries(words, strange, max_size=2)
keys = (
    st.sampled_from(KEYS)
    | st.sampled_from(sorted(sections()))
    | words
    | strange.filter(lambda value: value.__hash__ is not None)
)


@often(200)
@given(data=damaged() | st.binary(max_size=60), preset=st.sampled_from([None, "smoke", "atari"]))
@example(data=b'[env]\nid = "a"\n  b\n', preset=None)
def test_a_damaged_file_loads_or_is_refused(data, preset, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.ini"
    path.write_bytes(data)
    survives(lambda: load_settings(path, preset), folder)


@often(250)
@given(values=st.dictionaries(keys, anything, max_size=3) | anything)
def test_any_override_is_taken_or_refused(values, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "given.ini"
    path.write_text("[loss.dino]\nweight = 0.5\n[near/train]\nsteps = 3\n", encoding="utf-8")
    survives(lambda: load_settings(path, "near", values), folder)


@often(150)
@given(key=st.sampled_from(KEYS), value=anything, section=st.sampled_from(sorted(sections())) | words)
def test_any_value_in_any_key_is_taken_or_refused(key, value, section, tmp_path_factory):
    folder, (own, _, name) = tmp_path_factory.getbasetemp(), key.rpartition(".")
    survives(lambda: make_settings({own: {name: value}, section: {}}), folder)


@often(100)
@given(preset=anything)
def test_any_preset_is_known_or_refused(preset, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "presets.ini"
    path.write_text("[near/train]\nsteps = 3\n", encoding="utf-8")
    survives(lambda: load_settings(path, preset), folder)


def of_its_type(key):
    section, _, name = key.rpartition(".")
    field = sections()[section].model_fields[name]
    if key == "env.kwargs":
        return st.dictionaries(words, plain, max_size=3)
    bounds = [bound for bound in field.metadata if type(bound).__module__ == "annotated_types"]
    kinds = [kind for kind in getattr(field.annotation, "__args__", ()) if kind is not type(None)]
    kind = kinds[0] if isinstance(field.annotation, UnionType) else field.annotation
    own = st.from_type(Annotated[(kind, *bounds)] if bounds else kind)
    return own | st.none() if isinstance(field.annotation, UnionType) else own


@often(100)
@given(data=st.data())
def test_values_within_bounds_are_kept(data, tmp_path_factory):
    values = {}
    for key in data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)):
        section, _, name = key.rpartition(".")
        values.setdefault(section, {})[name] = data.draw(of_its_type(key))
    survives(lambda: make_settings(values), tmp_path_factory.getbasetemp())
