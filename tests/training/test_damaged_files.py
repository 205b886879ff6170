"""Files of a training that are damaged: one sentence that names them, or as if nothing had happened."""

import errno
import io
import json
import math
import os
import pickle
import random
import shutil
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_tools import At, Rows

from worldmodels_nb.settings import TrainingSettings, WriteError
from worldmodels_nb.training import callbacks, parts
from worldmodels_nb.training.callbacks import read_metrics
from worldmodels_nb.training.fit import (
    LossTerms,
    Trainable,
    TrainingError,
    WeightsError,
    load_weights,
    plain_name,
    save_weights,
    weights_hash,
)
from worldmodels_nb.training.parts import Resume, check_recipe, read_archive, read_result, train
from worldmodels_nb.viz import curves

SHORT = TrainingSettings(
    steps=24,
    batch_size=8,
    learning_rate=0.01,
    validate_every=10,
    validation_batches=3,
    checkpoint_every=10,
    picture_every=20,
)


class Small(Trainable):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, x):
        error = (self.net(x) - x.prod(1, keepdim=True)).square().mean()
        return LossTerms(total=2 * error, terms={"error": error.detach()})


DATA, OTHERS = Rows(64), Rows(20, seed=1)


def small():
    torch.manual_seed(0)
    return Small()


def ours(folder, model=None, recipe=SHORT, **more):
    return train(model or small(), DATA, OTHERS, recipe, folder, progress=False, **more)


class Off(Exception):
    "The machine is switched off."


def switch_off(run):
    raise Off


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A training that was switched off after step 13, one that is finished, and the weights it ends with."
    folder = tmp_path_factory.mktemp("kept")
    with pytest.raises(Off):
        ours(folder / "killed", callbacks=[At(13, switch_off)])
    return folder, ours(folder / "done")["weights"]


@pytest.fixture
def killed(kept, tmp_path):
    shutil.copytree(kept[0] / "killed", tmp_path / "part")
    return tmp_path / "part"


def sentence(error, *names):
    said = str(error.value)
    assert "\n" not in said and len(said) < 1000 and all(name in said for name in names), said
    return said


def test_undamaged_it_goes_on_to_the_same_bits(kept, killed):
    assert ours(killed)["weights"] == kept[1]


# --- state.pt: every tensor is compared before it is used -----------------------------------------


def moments(state, i=0):
    return state["optimizer"]["state"][i]


def put(state, *path_and_value):
    *path, key, value = path_and_value
    for name in path:
        state = state[name]
    state[key] = value


def drop(state, *path):
    *path, key = path
    for name in path:
        state = state[name]
    del state[key]


AVG = ("optimizer", "state", 0, "exp_avg")
STEP = ("optimizer", "state", 0, "step")
GROUP = ("optimizer", "param_groups", 0)
CPU = ("generators", "cpu")
DEEP = []
for _ in range(200):
    DEEP = [DEEP]

TENSORS = {
    "short": lambda: torch.zeros(3),
    "long": lambda: torch.zeros(10_000),
    "transposed": lambda: torch.zeros(2, 8),
    "scalar": lambda: torch.zeros(()),
    "empty": lambda: torch.zeros(0),
    "double": lambda: torch.zeros(8, 2, dtype=torch.float64),
    "half": lambda: torch.zeros(8, 2, dtype=torch.bfloat16),
    "whole": lambda: torch.zeros(8, 2, dtype=torch.int32),
    "bool": lambda: torch.zeros(8, 2, dtype=torch.bool),
    "complex": lambda: torch.zeros(8, 2, dtype=torch.complex64),
    "sparse": lambda: torch.zeros(8, 2).to_sparse(),
    "rows": lambda: torch.zeros(8, 2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(8, 2), 0.1, 0, torch.qint8),
    "number": lambda: 0.5,
    "list": lambda: [[0.0] * 2] * 8,
    "none": lambda: None,
    "bytes": lambda: b"\0" * 64,
}


@pytest.mark.parametrize("where", ["exp_avg", "exp_avg_sq", "step", "model", "generator"])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
def test_no_tensor_of_another_kind_reaches_the_optimiser(killed, where, kind):
    if (where, kind) == ("step", "scalar"):
        kind = "double"
    path = {"model": ("model", "net.0.weight"), "generator": CPU}.get(where, (*AVG[:3], where))
    state = torch.load(killed / "state.pt", weights_only=True)
    put(state, *path, TENSORS[kind]())
    torch.save(state, killed / "state.pt")
    model = small()
    before = weights_hash(model)
    with pytest.raises(TrainingError) as caught:
        ours(killed, model)
    sentence(caught, "state.pt", "resume=False" if "over with" in str(caught.value) else "delete it")
    assert weights_hash(model) == before  # nothing of it was used


DAMAGES = {
    "count nan": lambda s: put(s, *STEP, torch.tensor(math.nan)),
    "count inf": lambda s: put(s, *STEP, torch.tensor(math.inf)),
    "count negative": lambda s: put(s, *STEP, torch.tensor(-3.0)),
    "count broken": lambda s: put(s, *STEP, torch.tensor(2.5)),
    "count beyond": lambda s: put(s, *STEP, torch.tensor(11.0)),
    "moments lost": lambda s: drop(s, "optimizer", "state", 0),
    "moments of nobody": lambda s: put(s, "optimizer", "state", 99, dict(moments(s))),
    "moments by a word": lambda s: put(s, "optimizer", "state", "0", dict(moments(s))),
    "moments swapped": lambda s: put(s, "optimizer", "state", {0: moments(s, 1), 1: moments(s, 0)}),
    "moment lost": lambda s: drop(s, *AVG),
    "moment too many": lambda s: put(s, *AVG[:3], "max_exp_avg_sq", torch.zeros(8, 2)),
    "moments a list": lambda s: put(s, "optimizer", "state", [moments(s)]),
    "one moment a list": lambda s: put(s, "optimizer", "state", 0, [1, 2]),
    "no optimizer": lambda s: drop(s, "optimizer"),
    "optimizer a list": lambda s: put(s, "optimizer", []),
    "no groups": lambda s: drop(s, "optimizer", "param_groups"),
    "groups a number": lambda s: put(s, "optimizer", "param_groups", 3),
    "one group": lambda s: s["optimizer"]["param_groups"].pop(),
    "group longer": lambda s: s["optimizer"]["param_groups"][0]["params"].append(7),
    "group a list": lambda s: put(s, *GROUP, ["lr"]),
    "betas words": lambda s: put(s, *GROUP, "betas", ("0.9", "0.999")),
    "betas tensors": lambda s: put(s, *GROUP, "betas", (torch.zeros(2), torch.ones(2))),
    "eps negative": lambda s: put(s, *GROUP, "eps", -1.0),
    "decay nan": lambda s: put(s, *GROUP, "weight_decay", math.nan),
    "decay lost": lambda s: drop(s, *GROUP, "weight_decay"),
    "maximising": lambda s: put(s, *GROUP, "maximize", True),
    "one key too many": lambda s: put(s, *GROUP, "momentum", 0.9),
    "weights lost": lambda s: drop(s, "model", "net.0.weight"),
    "weights too many": lambda s: put(s, "model", "net.9\n.weight", torch.zeros(2)),
    "weights a list": lambda s: put(s, "model", [torch.zeros(8, 2)]),
    "no generator": lambda s: drop(s, *CPU),
    "generators a list": lambda s: put(s, "generators", [s["generators"]["cpu"]]),
    "generator of zeros": lambda s: put(s, *CPU, torch.zeros_like(s["generators"]["cpu"])),
    "generator of ones": lambda s: put(s, *CPU, torch.full_like(s["generators"]["cpu"], 255)),
    "step true": lambda s: put(s, "step", True),
    "step a float": lambda s: put(s, "step", 10.0),
    "step negative": lambda s: put(s, "step", -1),
    "step zero": lambda s: put(s, "step", 0),
    "step beyond": lambda s: put(s, "step", 25),
    "step a tensor": lambda s: put(s, "step", torch.tensor(10)),
    "step endless": lambda s: put(s, "step", 10**5000),
    "seconds nan": lambda s: put(s, "seconds", math.nan),
    "seconds negative": lambda s: put(s, "seconds", -1.0),
    "seconds a word": lambda s: put(s, "seconds", "long"),
    "no stop": lambda s: drop(s, "stop"),
    "stop a number": lambda s: put(s, "stop", 1),
    "best lost": lambda s: drop(s, "resume_state", "best_step"),
    "best nothing": lambda s: put(s, "resume_state", {}),
    "best a word": lambda s: put(s, "resume_state", "best_value", "low"),
    "best nan": lambda s: put(s, "resume_state", "best_value", math.nan),
    "best in the future": lambda s: put(s, "resume_state", "best_step", 11),
    "waited negative": lambda s: put(s, "resume_state", "waited", -1),
    "waited a list": lambda s: put(s, "resume_state", "waited", [1]),
    "resume state a tensor": lambda s: put(s, "resume_state", torch.zeros(2)),
    "recipe lost": lambda s: drop(s, "recipe"),
    "recipe a list": lambda s: put(s, "recipe", [1]),
    "recipe of tensors": lambda s: put(s, "recipe", "train.delta", torch.zeros(2)),
    "recipe of tuples": lambda s: put(s, "recipe", "train.delta", (0.0,)),
    "recipe deep": lambda s: put(s, "recipe", "train.delta", DEEP),
    "recipe endless": lambda s: put(s, "recipe", "train.delta", 10**5000),
    "version true": lambda s: put(s, "schema_version", True),
    "version a float": lambda s: put(s, "schema_version", float(parts.STATE_SCHEMA)),
    "version a list": lambda s: put(s, "schema_version", [parts.STATE_SCHEMA]),
    "version lost": lambda s: drop(s, "schema_version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_this_run_cannot_have_written_is_refused(killed, damage):
    state = torch.load(killed / "state.pt", weights_only=True)
    DAMAGES[damage](state)
    torch.save(state, killed / "state.pt")
    with pytest.raises(TrainingError) as caught:
        ours(killed)
    sentence(caught, str(killed))


def laughs():
    "A list in a list in a list, each ten times the same: small on the disk, and not when it is shown."
    one = [0] * 10
    for _ in range(40):
        one = [one] * 10
    return one


@pytest.mark.parametrize("where", [("recipe", "train.delta"), (*GROUP, "betas"), ("schema_version",)])
def test_what_grows_when_it_is_looked_at_is_refused_at_once(killed, where):
    state = torch.load(killed / "state.pt", weights_only=True)
    put(state, *where, laughs())
    torch.save(state, killed / "state.pt")
    with pytest.raises(TrainingError) as caught:
        ours(killed)
    sentence(caught, str(killed))


WIDE = torch.zeros(8, 5)
SHARED = torch.rand(40)
ODD_STORAGE = {
    "expanded": lambda t: t[:1, :1].clone().expand(8, 2),
    "overlapping": lambda t: torch.as_strided(SHARED, (8, 2), (1, 1)),
    "a column": lambda t: WIDE[:, 1:3],
    "by columns": lambda t: t.t().contiguous().t(),
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "a parameter": nn.Parameter,
}


@pytest.mark.parametrize("kind", ODD_STORAGE)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_however_a_tensor_is_stored_its_numbers_count_and_nothing_else_is_touched(killed, kind, name):
    state = torch.load(killed / "state.pt", weights_only=True)
    odd = ODD_STORAGE[kind](moments(state)[name])
    for content in (odd, odd.detach().clone().contiguous()):
        put(state, *AVG[:3], name, content)
        torch.save(state, killed / f"{content is odd}.pt")
    hashes = []
    for stored in (True, False):
        shutil.copytree(killed, copy := killed.parent / f"{stored}")
        shutil.copy(killed / f"{stored}.pt", copy / "state.pt")
        hashes.append(ours(copy)["weights"])
    assert hashes[0] == hashes[1] and not WIDE.any()


def test_moments_that_share_one_memory_become_two(killed):
    state = torch.load(killed / "state.pt", weights_only=True)
    put(state, *AVG[:3], "exp_avg_sq", moments(state)["exp_avg"])
    torch.save(state, killed / "state.pt")
    run = parts.fit_windows(small(), DATA, SHORT, callbacks=[Resume(killed / "state.pt", {})])
    first = next(iter(run.optimizer.state.values()))
    assert first["exp_avg"].data_ptr() != first["exp_avg_sq"].data_ptr()


# --- archives --------------------------------------------------------------------------------------


def repacked(path, change=lambda name, data: data, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        held = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in held.items():
            archive.writestr(name, change(name, data))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/never-made",)


ARCHIVES = {
    "nothing": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"step": 3})),
    "code": lambda path: torch.save({"schema_version": parts.STATE_SCHEMA, "step": Bomb()}, path),
    "code, packed anew": lambda path: repacked(
        path, lambda name, data: pickle.dumps(Bomb(), 2) if name.endswith("data.pkl") else data
    ),
    "packed": lambda path: repacked(path, how=zipfile.ZIP_DEFLATED),
    "a bomb": lambda path: repacked(
        path, lambda name, data: bytes(10**7) if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED
    ),
    "numbers cut": lambda path: repacked(
        path, lambda name, data: data[:-8] if name.endswith("data/0") else data
    ),
    "numbers missing": lambda path: repacked(
        path, lambda name, data: b"" if "/data/" in name else data
    ),
    "deep": lambda path: repacked(
        path, lambda name, data: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
        if name.endswith("data.pkl") else data
    ),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights": lambda path: path.write_bytes(safetensors.torch.save({"a": torch.zeros(3)})),
    "legacy": lambda path: torch.save(
        torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False
    ),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a text": lambda path: path.write_text("step,loss\n1,0.3\n"),
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_is_not_whole_or_not_plain_is_refused(killed, kind):
    ARCHIVES[kind](killed / "state.pt")
    with pytest.raises(TrainingError) as caught:
        ours(killed)
    sentence(caught, "state.pt", "delete it")
    assert not os.path.exists("/tmp/never-made")


@pytest.mark.parametrize("name", ["state.pt", "metrics.jsonl"])
def test_a_folder_in_place_of_a_file_is_refused(killed, name):
    (killed / name).unlink()
    (killed / name).mkdir()
    with pytest.raises(TrainingError) as caught:
        ours(killed)
    sentence(caught, name)


def test_one_bit_of_a_number_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(1000.0), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    first = whole.index(torch.tensor([5.0, 6.0]).numpy().tobytes())
    for at in random.Random(0).sample(range(first, first + 3000), 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="checksum"):
            read_archive(path)


# --- damage at random ------------------------------------------------------------------------------


@st.composite
def damages(draw):
    "Flip a bit, cut, leave out, swap two stretches, write zeros: as a function of the content."
    kind = draw(st.sampled_from(["flip", "flip", "cut", "drop", "swap", "zeros", "repeat"]))
    at, to = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    length, bit = draw(st.integers(1, 64)), draw(st.integers(0, 7))

    def damage(data):
        i, j = sorted((int(at * (len(data) - 1)), int(to * (len(data) - 1))))
        if kind == "flip":
            return data[:i] + bytes([data[i] ^ (1 << bit)]) + data[i + 1 :]
        if kind == "cut":
            return data[:i]
        if kind == "drop":
            return data[:i] + data[i + length :]
        if kind == "zeros":
            return data[:i] + bytes(length) + data[i + length :]
        if kind == "repeat":
            return data[:i] + data[i : i + length] + data[i:]
        a, b = data[i : i + length], data[j : j + length]
        return data if j < i + length else data[:i] + b + data[i + length : j] + a + data[j + length :]

    return damage


@pytest.mark.parametrize("name", ["state.pt", "metrics.jsonl", "weights.safetensors"])
def test_a_killed_training_goes_on_to_the_same_bits_or_says_why_not(kept, name, tmp_path_factory):
    whole = (kept[0] / "killed" / name).read_bytes()

    @given(damage=damages())
    @settings(max_examples=30, deadline=None, derandomize=True)
    def goes_on(damage):
        folder = tmp_path_factory.mktemp("damaged") / "part"
        shutil.copytree(kept[0] / "killed", folder)
        (folder / name).write_bytes(damage(whole))
        try:
            assert ours(folder)["weights"] == kept[1]
        except (TrainingError, WeightsError) as error:
            assert "\n" not in str(error) and name in str(error)
        shutil.rmtree(folder)

    goes_on()


@pytest.mark.parametrize("name", ["result.json", "state.pt", "metrics.jsonl", "weights.safetensors"])
def test_a_finished_training_is_reused_or_refused(kept, name, tmp_path_factory):
    whole, model = (kept[0] / "done" / name).read_bytes(), small()
    folder = tmp_path_factory.mktemp("damaged") / "part"
    shutil.copytree(kept[0] / "done", folder)

    @given(damage=damages())
    @settings(max_examples=50, deadline=None, derandomize=True)
    def is_reused(damage):
        (folder / name).write_bytes(damage(whole))
        try:
            ours(folder, model)
            read_metrics(folder / "metrics.jsonl")
            assert weights_hash(model) == kept[1]
        except (TrainingError, WeightsError) as error:
            assert "\n" not in str(error) and str(folder) in str(error)

    is_reused()


# --- result.json and metrics.jsonl ----------------------------------------------------------------

RESULTS = {
    "cut": lambda text: text[:-20],
    "nothing": lambda text: "",
    "a list": lambda text: "[1]",
    "not utf-8": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("Small", "Schön").encode("latin-1"),
    "nul": lambda text: text.replace("Small", "\0"),
    "version true": lambda text: text.replace('"schema_version": 1', '"schema_version": true'),
    "deep": lambda text: text.replace('"Small"', "[" * 100_000 + "]" * 100_000),
    "5,000 digits": lambda text: text.replace('"steps": 24', '"steps": ' + "9" * 5000),
    "nan": lambda text: text.replace('"steps": 24', '"steps": NaN'),
    "steps a word": lambda text: text.replace('"steps": 24', '"steps": "24"'),
    "steps true": lambda text: text.replace('"steps": 24', '"steps": true'),
    "no steps": lambda text: text.replace('"steps"', '"stops"'),
    "no recipe": lambda text: text.replace('"recipe"', '"receipt"'),
    "recipe a list": lambda text: json.dumps(json.loads(text) | {"recipe": [1]}),
    "weights a number": lambda text: json.dumps(json.loads(text) | {"weights": 5}),
    "best a word": lambda text: json.dumps(json.loads(text) | {"best_value": "low"}),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_that_is_damaged_is_refused(kept, tmp_path, kind):
    content = RESULTS[kind]((kept[0] / "done" / "result.json").read_text())
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainingError) as caught:
        read_result(tmp_path)
    sentence(caught, "result.json", "resume=False")


ROWS = {
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "cut inside": b'{"step": 5, "lr"\n{"step": 10}\n',
    "no step": b'{"lr": 0.1}\n',
    "step a word": b'{"step": "5"}\n',
    "step true": b'{"step": true}\n',
    "step a float": b'{"step": 5.0}\n',
    "a word": b'{"step": 5, "lr": "fast"}\n',
    "none": b'{"step": 5, "lr": null}\n',
    "a list of numbers": b'{"step": 5, "lr": [0.1]}\n',
    "nan": b'{"step": 5, "lr": NaN}\n',
    "infinite": b'{"step": 5, "lr": 1e999}\n',
    "5,000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
    "deep": b'{"step": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "not utf-8": b'{"step": 5, "\xff": 1}\n',
    "twice": b'{"step": 5, "step": 6}\n',
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_are_none_are_refused_by_line(killed, kind):
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(ROWS[kind])
    with pytest.raises(TrainingError) as caught:
        ours(killed)
    sentence(caught, "metrics.jsonl", "line 2", "delete it")
    (killed / "metrics.jsonl").unlink()
    assert ours(killed)["steps"] == 24


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_left_out_of_its_row(tmp_path, value):
    class Odd(callbacks.Callback):
        def on_step(self, run):
            run.log["odd"] = value

    path = tmp_path / "metrics.jsonl"
    parts.fit_windows(small(), DATA, SHORT, callbacks=[Odd(), callbacks.Metrics(path)])
    assert all("odd" not in row and "lr" in row for row in read_metrics(path))


@pytest.mark.parametrize(
    "found", [{"a": [1]}, {"a": "0.1"}, {"a": 10**5000}, {"a": {"b": 1}}, {"a": "x" * 10**6}, {}]
)
def test_foreign_recipes_are_shown_in_a_short_sentence(found, tmp_path):
    with pytest.raises(TrainingError) as caught:
        check_recipe(found, {"a": 0.1}, tmp_path)
    sentence(caught, "a = ")


# --- weights.safetensors --------------------------------------------------------------------------


def header(entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "a huge header": header({}, length=2**62),
    "a header of 100 MB": header({}, length=10**8),
    "overlapping": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a gap": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "an enormous shape": header({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
    "a shape that wraps": header({"a": entry([2**62, 4], 0, 0)}),
    "a negative shape": header({"a": entry([-1], 0, 4)}, bytes(4)),
    "offsets beyond": header({"a": entry([2], 0, 8)}, bytes(4)),
    "offsets backwards": header({"a": entry([1], 8, 4)}, bytes(8)),
    "another dtype": header({"a": entry([1], 0, 4, "F33")}, bytes(4)),
    "a list": header([1, 2]),
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a line end": header({"net.0\n.weight": entry([1], 0, 4)}, bytes(4)),
    "a pickle": pickle.dumps({"a": 1}),
    "an index of shards": json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}).encode(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_lie_are_refused(tmp_path, kind):
    (tmp_path / "weights.safetensors").write_bytes(HEADERS[kind])
    with pytest.raises(WeightsError) as caught:
        load_weights(small(), tmp_path / "weights.safetensors")
    sentence(caught, "weights.safetensors")


@pytest.mark.parametrize("place", ["nowhere", "no/such/folder", ".", "a\0b"])
def test_weights_that_are_not_there(tmp_path, place):
    with pytest.raises(WeightsError) as caught:
        load_weights(small(), tmp_path / place)
    sentence(caught, "cannot read weights")


def test_a_torch_file_is_named_as_one(tmp_path):
    for name, zipped in (("weights.pt", True), ("pytorch_model.bin", False)):
        torch.save(small().state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError) as caught:
            load_weights(small(), tmp_path / name)
        sentence(caught, name, "torch.save", "safetensors")


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_weights_whose_first_bytes_are_those_of_a_pickle_or_an_archive_load(tmp_path, start):
    model, other = nn.ModuleDict(), nn.ModuleDict()
    for part in (model, other):
        part["x" * 20] = nn.Linear(2, 2)
    for more in range(30_000):  # letters in the header
        content = safetensors.torch.save(model.state_dict(), {"note": "x" * more})
        if content.startswith(start):
            break
    (tmp_path / "w").write_bytes(content)
    load_weights(other, tmp_path / "w")
    assert content.startswith(start) and weights_hash(other) == weights_hash(model)


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "the other way": lambda name: f"_orig_mod.module.{name}",
    "one part compiled": lambda name: name.replace("net.", "net._orig_mod."),
    "parts of a part": lambda name: f"_orig_mod.{name.replace('net.', 'net._orig_mod.')}",
    "some only": lambda name: f"_orig_mod.{name}" if "0" in name else name,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_weights_load(tmp_path, kind):
    torch.manual_seed(3)
    model, other = small(), small()
    for p in model.parameters():
        nn.init.normal_(p)
    tensors = {WRAPPED[kind](name): t for name, t in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "w")
    load_weights(other, tmp_path / "w")
    assert weights_hash(other) == weights_hash(model)


@pytest.mark.parametrize("wrap", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_tensor_that_is_there_twice_is_refused(tmp_path, wrap):
    held = small().state_dict()
    held[f"{wrap}net.0.weight"] = held["net.0.weight"] + 1
    safetensors.torch.save_file(held, tmp_path / "w")
    with pytest.raises(WeightsError) as caught:
        load_weights(small(), tmp_path / "w")
    sentence(caught, "net.0.weight", "twice")


class Wrapped(nn.Module):
    "A network whose own part is called module."

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 3)


def test_compiled_models_and_parts_of_that_name_load_both_ways(tmp_path):
    model, other = Wrapped(), Wrapped()
    save_weights(model, tmp_path / "plain")
    load_weights(torch.compile(other), tmp_path / "plain")
    assert weights_hash(other) == weights_hash(model)
    save_weights(torch.compile(model), tmp_path / "compiled")
    load_weights(again := Wrapped(), tmp_path / "compiled")
    assert weights_hash(again) == weights_hash(model)
    assert plain_name("net.module.0") == "net.module.0" and plain_name("module") == "module"


def test_weights_damaged_while_a_training_went_on_are_not_taken_for_its_result(killed):
    settled = SHORT.model_copy(update={"delta": 10.0})  # the first validation is the best
    shutil.rmtree(killed)
    with pytest.raises(Off):
        ours(killed, None, settled, callbacks=[At(13, switch_off)])
    save_weights(small(), killed / "weights.safetensors")
    with pytest.raises(WeightsError) as caught:
        ours(killed, None, settled)
    sentence(caught, "weights.safetensors", "SHA-256")
    assert not (killed / "result.json").exists()


# --- what cannot be written ------------------------------------------------------------------------


def refuse_write(monkeypatch, number, code):
    "The n-th file that is written, whole or by a line, meets a full disk."
    count, fsync = [0], os.fsync

    def refuse():
        count[0] += 1
        if count[0] == number:
            raise OSError(code, os.strerror(code))

    class Full(io.TextIOWrapper):
        def write(self, text):
            refuse()
            return super().write(text)

    def opened(path, mode="r", encoding="utf-8"):
        return Full(open(path, f"{mode}b"), encoding=encoding)

    monkeypatch.setattr(os, "fsync", lambda handle: refuse() or fsync(handle))
    monkeypatch.setattr(callbacks, "open", opened, raising=False)
    return count


def meets(code, number, folder, **more):
    "Train where the n-th write fails, and say whether there was one."
    with pytest.MonkeyPatch.context() as patch:
        refuse_write(patch, number, code)
        try:
            ours(folder, **more)
            return False
        except WriteError as error:
            said = str(error)
            assert "\n" not in said and str(folder) in said and os.strerror(code) in said, said
            assert ("make room" in said) == (code in (errno.ENOSPC, errno.EDQUOT)), said
            assert error.errno == code
            return True


def test_after_making_room_the_same_command_ends_with_the_same_bits(kept, tmp_path):
    for number in range(1, 40):
        if not meets(errno.ENOSPC, number, folder := tmp_path / f"{number}"):
            break
        assert ours(folder)["weights"] == kept[1]
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [10, 20, 24]
    assert number > 9  # rows, weights, checkpoints and the result


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_whatever_a_write_meets_is_one_sentence(kept, tmp_path, code, number):
    assert meets(code, number, tmp_path)
    assert ours(tmp_path)["weights"] == kept[1]


def picture(step):
    return curves({"a": ([0, 1], [step, 1], None, None)}, "x", "y")


def test_a_picture_that_cannot_be_written_is_one_sentence(kept, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "step_000020.png").mkdir()
    with pytest.raises(WriteError) as caught:
        ours(tmp_path, picture=picture)
    sentence(caught, "step_000020.png")
    (tmp_path / "pictures" / "step_000020.png").rmdir()
    assert ours(tmp_path, picture=picture)["weights"] == kept[1]


@pytest.mark.parametrize("blocked", ["part", "part/pictures", "."])
def test_a_file_where_a_folder_must_be_is_one_sentence(tmp_path, blocked):
    where = tmp_path / "runs" / blocked
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text("in the way")
    with pytest.raises(WriteError) as caught:
        ours(tmp_path / "runs" / "part", picture=picture)
    sentence(caught, "runs")


class Closed(io.StringIO):
    "A screen that is gone."

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.after = error, after

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("after", [0, 2, 7])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O on closed file"), OSError(28, "full")]
)
def test_a_screen_that_is_gone_stops_nothing(kept, tmp_path, error, after):
    bar = callbacks.Progress(file=Closed(error, after))
    result = train(small(), DATA, OTHERS, SHORT, tmp_path, progress=False, callbacks=[bar])
    assert result["weights"] == kept[1]
