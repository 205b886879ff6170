"""Tracking mirrors what the callbacks write, once, and can neither stop nor delay a run.

Weights & Biases is tried for real: offline, and against an imitation on loopback.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from worldmodels_nb.settings import TrainingSettings, read_json_lines
from worldmodels_nb.training import tracking as module
from worldmodels_nb.training.callbacks import Pictures, read_metrics
from worldmodels_nb.training.fit import Callback, LossTerms, Trainable, weights_hash
from worldmodels_nb.training.parts import train
from worldmodels_nb.training.tracking import (
    Journal,
    Once,
    ThreadedTracker,
    Tracker,
    Tracking,
    TrackingWarning,
    WandbTracker,
    make_tracker,
    run_name,
)
from worldmodels_nb.viz import curves, png_bytes


class Toy(Trainable):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, x):
        error = (self.net(x) - x.sin()).square().mean()
        return LossTerms(total=error, terms={"error": error.detach()})


class Table:
    def __len__(self):
        return 64

    def batch(self, indices):
        return torch.linspace(-3, 3, 64)[indices, None]

    def sample(self, batch_size, seed, step):
        return self.batch(np.random.default_rng([seed, step]).integers(64, size=batch_size))


RECIPE = TrainingSettings(
    steps=100,
    batch_size=8,
    learning_rate=0.01,
    validate_every=50,
    validation_batches=1,
    checkpoint_every=50,
    picture_every=0,
)
STEPS = list(range(10, 101, 10))


def draw(step):
    return curves({"truth": ([0, 1, 2], [0, 1, step], None, None)}, "x", "y")


def ours(folder, tracker, *more, prefix="toy"):
    "A tiny training, tracked, with a picture at step 100."
    pictures = folder / "pictures"
    model = Toy()
    train(
        model,
        Table(),
        Table(),
        RECIPE,
        folder / "part",
        progress=False,
        callbacks=[Pictures(pictures, draw, 100), Tracking(tracker, prefix, pictures), *more],
    )
    return model


class Recorder(Tracker):
    def __init__(self):
        self.rows, self.pictures, self.ends = [], [], []

    def metrics(self, step, values, prefix):
        self.rows.append((prefix, step, values))

    def picture(self, name, picture, step):
        self.pictures.append((name, step, Path(picture).name))

    def finish(self, status="finished"):
        self.ends.append(status)


@pytest.fixture
def heard():
    "Every warning, as it would be shown if none were held back."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in said if w.category is TrackingWarning]


# the mirror shows what stands in the files


def test_rows_and_pictures_are_those_of_the_files(tmp_path):
    recorder = Recorder()
    ours(tmp_path, recorder, prefix="jepa/decoder")
    assert [{"step": step, **values} for _, step, values in recorder.rows] == read_metrics(
        tmp_path / "part" / "metrics.jsonl"
    )
    assert {prefix for prefix, *_ in recorder.rows} == {"jepa/decoder"} and [
        step for _, step, _ in recorder.rows
    ] == STEPS
    assert "val/total" in recorder.rows[-1][2] and "train/error" in recorder.rows[0][2]
    assert recorder.pictures == [("jepa/decoder/picture", 100, "step_000100.png")]


def test_switched_off_it_leaves_no_trace(tmp_path, heard):
    tracker = make_tracker(tmp_path, {}, enabled=False)
    (
        tracker.metrics(1, {"a": 1.0}, "toy"),
        tracker.picture("toy/picture", "no such file", 1),
        tracker.finish("failed"),
    )
    assert type(tracker) is Tracker and list(tmp_path.iterdir()) == [] and heard() == []


def test_runs_are_named_by_prefix_and_start():
    assert run_name("exp", datetime(2025, 1, 1, 12)) == "exp-20250101-120000"
    assert run_name("a-b", datetime(2031, 12, 9, 23, 5, 59)) == "a-b-20311209-230559"


# neither fatal nor slow


class Broken(Recorder):
    "Raises at one of its methods."

    def __init__(self, where, error):
        super().__init__()

        def fail(*args):
            raise error

        setattr(self, where, fail)


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    return weights_hash(ours(tmp_path_factory.mktemp("untracked"), Tracker()))


@pytest.mark.parametrize(
    "where, error, reason",
    [
        ("metrics", ConnectionError("gone\nfor good"), "ConnectionError: gone"),
        ("picture", KeyError(), "KeyError"),
        ("finish", OSError(28, "No space left"), "OSError: [Errno 28] No space left"),
    ],
)
def test_a_failure_is_said_once_and_changes_nothing(tmp_path, heard, untracked, where, error, reason):
    tracker = ThreadedTracker(Broken(where, error), "; try again")
    model = ours(tmp_path, tracker)
    tracker.finish()
    tracker.finish()
    assert heard() == [
        f"tracking has ended ({reason}); the run goes on, and its own files are complete; try again"
    ]
    assert weights_hash(model) == untracked
    assert [row["step"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")] == STEPS


def test_what_never_answers_is_not_waited_for(tmp_path, heard):
    class Stuck(Recorder):
        def metrics(self, step, values, prefix):
            threading.Event().wait()

    tracker = ThreadedTracker(Stuck(), patience=0.05)
    ours(tmp_path, tracker)
    assert heard() == []
    tracker.finish()
    assert heard() == [
        "tracking has ended (no answer within 0.05 s); the run goes on, and its own files are complete"
    ]


def test_what_does_not_keep_up_is_given_up(tmp_path, heard):
    go_on = threading.Event()

    class Slow(Recorder):
        def metrics(self, step, values, prefix):
            go_on.wait()

    tracker = ThreadedTracker(Slow(), waiting=3)
    ours(tmp_path, tracker)
    tracker.finish()
    go_on.set()
    assert heard() == [
        "tracking has ended (it does not keep up); the run goes on, and its own files are complete"
    ]


def test_all_is_handed_on_in_order_before_the_end(heard):
    recorder = Recorder()
    tracker = ThreadedTracker(recorder)
    values = {"a": 0.0}
    for step in range(1000):
        values["a"] = step  # what is handed on is what it was then
        tracker.metrics(step, values, "toy")
    tracker.picture("toy/picture", "x.png", 1000)
    tracker.finish("failed")
    tracker.metrics(2000, values, "toy"), tracker.finish()
    assert recorder.rows == [("toy", step, {"a": step}) for step in range(1000)]
    assert (recorder.pictures, recorder.ends, heard()) == ([("toy/picture", 1000, "x.png")], ["failed"], [])


# never twice


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["jepa", "jepa/decoder"]), st.integers(0, 20)), max_size=20),
        max_size=4,
    )
)
def test_each_step_of_each_part_goes_out_once_across_restarts(tmp_path_factory, processes):
    path, recorder = tmp_path_factory.mktemp("journal") / "tracking.jsonl", Recorder()
    expected, last, ids = [], {}, set()
    for process in processes:
        once = Once(recorder, journal := Journal(path, "exp"))
        ids.add((journal.id, journal.name))
        for part, step in process:
            once.metrics(step, {}, part)
            if step > last.get(part, -1):
                expected.append((part, step, {}))
                last[part] = step
    assert recorder.rows == expected and len(ids) <= 1


def test_after_a_kill_each_step_of_the_file_was_handed_on_once(tmp_path):
    book, path = Recorder(), tmp_path / "tracking.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ours(tmp_path, Once(book, Journal(path, "exp-20250101-120000")), Interrupt())
    ours(tmp_path, Once(book, Journal(path, "exp-20250101-120000")))
    in_file = [row["step"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")]
    assert [step for _, step, _ in book.rows] == in_file == STEPS
    again = Journal(path, "another")
    assert again.name == "exp-20250101-120000" and again.sent == {"toy": 100, "toy/picture": 100}


def test_a_journal_outlives_half_a_line_and_keeps_its_name(tmp_path):
    first = Journal(path := tmp_path / "tracking.jsonl", "exp-1")
    assert (
        first.new("toy", 10)
        and not first.new("toy", 10)
        and first.new("toy", 20)
        and first.new("toy/picture", 10)
    )
    with open(path, "a") as file:
        file.write('{"part": "to')
    again = Journal(path, "exp-2")
    assert (again.id, again.name, again.sent) == (first.id, "exp-1", {"toy": 20, "toy/picture": 10})
    assert again.new("toy", 30) and Journal(path, "exp-3").sent["toy"] == 30
    assert Journal(tmp_path / "other", "exp").id != first.id


def test_a_journal_of_another_version_is_named(tmp_path, heard):
    (tmp_path / "tracking.jsonl").write_text('{"schema_version": 99}\n')
    with pytest.raises(ValueError, match="tracking.jsonl is of another version; delete it"):
        Journal(tmp_path / "tracking.jsonl", "exp")


# Weights & Biases


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, heard, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = make_tracker(tmp_path, {}, enabled=True)
    assert type(tracker) is Tracker and list(tmp_path.iterdir()) == []
    assert heard() == [
        'the run goes on untracked, for tracking.enabled needs an extra: pip install "worldmodels_nb[wandb]"'
    ]


def test_each_part_has_its_own_axis():
    class Service:
        def __init__(self):
            self.rows, self.axes = [], []

        def define_metric(self, name, step_metric):
            self.axes.append((name, step_metric))

        def log(self, row):
            self.rows.append(row)

    tracker = WandbTracker(service := Service())
    for step in (10, 20):
        tracker.metrics(step, {"train/total": 1.0}, "jepa")
    tracker.metrics(10, {"train/total": 2.0}, "jepa/decoder")
    assert service.axes == [
        ("jepa/train/total", "jepa/step"),
        ("jepa/decoder/train/total", "jepa/decoder/step"),
    ]
    assert service.rows == [
        {"jepa/step": 10, "jepa/train/total": 1.0},
        {"jepa/step": 20, "jepa/train/total": 1.0},
        {"jepa/decoder/step": 10, "jepa/decoder/train/total": 2.0},
    ]


KEY = "0" * 40


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    "The library, with an empty home: no key, no settings, no network; forgotten afterwards."
    wandb = pytest.importorskip("wandb")
    home = str(tmp_path_factory.mktemp("home"))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "HOME": home,
        "NETRC": f"{home}/.netrc",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_HTTP_TIMEOUT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield wandb
    wandb.teardown()


def logs(folder):
    return sorted(folder.glob("wandb/*run-*/run-*.wandb"))


def records(log):
    "What the library's own reader finds in a log."
    read = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", log],
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in read.stdout.splitlines()]


def history(log):
    return [record["history"]["item"] for record in records(log) if record["type"] == "history"]


def test_an_offline_run_holds_settings_metrics_and_a_picture(tmp_path, heard, wandb, untracked, capfd):
    tracker = make_tracker(
        tmp_path,
        {"training": {"steps": 100, "epochs": None}},
        enabled=True,
        project="p",
        run_name_prefix="exp",
        mode="offline",
    )
    model = ours(tmp_path, tracker)
    tracker.finish()
    assert heard() == [] and capfd.readouterr() == ("", "")
    (log,) = logs(tmp_path)
    assert log.parent.name.startswith("offline-run-")
    found = records(log)
    run = next(record["run"] for record in found if record["type"] == "run")
    name = read_json_lines(tmp_path / "tracking.jsonl")[0]["name"]
    assert (run["project"], run["display_name"], run["config"]["update"]["training"]) == (
        "p",
        name,
        {"steps": 100, "epochs": None},
    ) and name.startswith("exp-2")
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    numbers = [
        {key.removeprefix("toy/"): value for key, value in row.items() if key.startswith("toy/")}
        for row in rows
        if "toy/train/total" in row
    ]
    assert numbers == read_metrics(tmp_path / "part" / "metrics.jsonl")
    axes = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for record in found
        if record["type"] == "metric"
    }
    assert axes["toy/train/total"] == axes["toy/val/total"] == axes["toy/picture"] == "toy/step"
    picture = next(row for row in rows if "toy/picture.path" in row)
    assert picture["toy/step"] == 100
    with (
        Image.open(log.parent / "files" / picture["toy/picture.path"]) as sent,
        Image.open(tmp_path / "pictures" / "step_000100.png") as written,
    ):
        assert np.array_equal(np.asarray(sent), np.asarray(written))
    assert weights_hash(model) == untracked
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


def test_a_figure_is_sent_as_its_pixels(tmp_path, wandb):
    tracker, figure = make_tracker(tmp_path, {}, enabled=True, mode="offline"), Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    tracker.picture("toy/imagined", figure, 7)
    tracker.finish("failed")
    found = records(logs(tmp_path)[0])
    (row,) = [record["history"]["item"] for record in found if record["type"] == "history"]
    with (
        Image.open(logs(tmp_path)[0].parent / "files" / row["toy/imagined.path"]) as sent,
        Image.open(io.BytesIO(png_bytes(figure))) as drawn,
    ):
        assert row["toy/step"] == 7 and np.array_equal(np.asarray(sent), np.asarray(drawn))
    assert [record["exit"]["exit_code"] for record in found if record["type"] == "exit"] == [1]


@pytest.mark.parametrize(
    "key, says",
    [
        (
            "",
            "nobody is logged in to Weights & Biases (say wandb login, or set WANDB_API_KEY, "
            'or set tracking.mode to "offline")',
        ),
        (
            KEY,
            "Weights & Biases cannot be reached, or refuses the key "
            "(AuthenticationError: Failed to authenticate with http://127.0.0.1:9",
        ),
        (
            "short",
            "Weights & Biases cannot be reached, or refuses the key "
            "(AuthenticationError: WANDB_API_KEY invalid",
        ),
    ],
    ids=["no key", "no network", "no such key"],
)
def test_without_key_or_network_one_sentence_and_offline(
    tmp_path, heard, wandb, monkeypatch, capfd, key, says
):
    monkeypatch.setenv("WANDB_API_KEY", key)
    tracker = make_tracker(tmp_path, {}, enabled=True, mode="online")
    ours(tmp_path, tracker)
    tracker.finish()
    (sentence,) = heard()
    assert sentence.startswith(says) and sentence.endswith(
        f"; this run is tracked offline, and wandb sync {tmp_path / 'wandb'}/offline-run-* uploads it"
    )
    assert [row["toy/step"] for row in history(logs(tmp_path)[0]) if "toy/train/total" in row] == STEPS
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode, folders", [("offline", 1), ("disabled", 0)])
def test_the_librarys_own_switch_has_its_say(tmp_path, heard, wandb, monkeypatch, mode, folders):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = make_tracker(tmp_path, {}, enabled=True, mode="online")
    ours(tmp_path, tracker)
    tracker.finish()
    assert heard() == [] and len(logs(tmp_path)) == folders


def test_a_broken_start_is_said_and_the_run_goes_on(tmp_path, heard, wandb):
    (tmp_path / "tracking.jsonl").write_text('{"schema_version": 99}\n')
    assert type(make_tracker(tmp_path, {}, enabled=True, mode="offline")) is Tracker
    (sentence,) = heard()
    assert (
        sentence.startswith("the run goes on untracked, for Weights & Biases did not start (ValueError: ")
        and "delete it" in sentence
    )


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_tracking import Callback, make_tracker, ours
assert "wandb" not in sys.modules, "imported before it was asked for"
class Kill(Callback):
    def on_step(self, run):
        if run.step != 70: return
        assert "matplotlib.pyplot" not in sys.modules, "keeps every figure"
        time.sleep(1.5)  # the library writes its log every second
        os.kill(os.getpid(), signal.SIGKILL)
tracker = make_tracker(Path(sys.argv[2]), {}, enabled=True, mode="offline")
ours(Path(sys.argv[2]), tracker, Kill())
"""


def test_a_killed_run_goes_on_under_the_same_name_without_repeating_a_step(tmp_path, heard, wandb):
    with open(tmp_path / "said", "w") as said:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path], stdout=said, stderr=said
        )
    assert (killed.returncode, (tmp_path / "said").read_text()) == (-signal.SIGKILL, "")
    tracker = make_tracker(tmp_path, {}, enabled=True, mode="offline")
    ours(tmp_path, tracker)
    tracker.finish()
    first, second = logs(tmp_path)
    assert first.name == second.name and heard() == []  # named by the id
    before, after = (
        [row["toy/step"] for row in history(log) if "toy/train/total" in row] for log in (first, second)
    )
    assert (
        before and before == STEPS[: len(before)] and after == STEPS[7:]
    )  # a step that was still on its way when the process died is not sent again


def test_the_process_that_sends_may_die(tmp_path, heard, wandb):
    tracker = make_tracker(tmp_path, {}, enabled=True, mode="offline")
    living = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]  # of other tests
    (service,) = [child for child in living if "wandb-core" in " ".join(child.cmdline())]
    service.kill()
    ours(tmp_path, tracker)
    tracker.finish()
    (sentence,) = heard()
    assert (
        sentence.startswith("tracking has ended (") and "its own files are complete; wandb sync" in sentence
    )
    assert [row["step"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")] == STEPS
    with contextlib.suppress(Exception):
        wandb.teardown()  # the library stumbles over it, here rather than in the next test


# an imitation of the service, on loopback


class Imitation(ThreadingHTTPServer):
    "Keeps what it is sent: of each run its name and rows, and the paths of uploaded files."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.runs, self.files, self.refuse = {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *args):
        pass

    def rows(self, run):
        return [json.loads(row) for row in self.runs[run]["rows"]]


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.body()
        self.server.files.append(self.path)
        self.say({})

    def do_POST(self):
        asked = json.loads(self.body())
        if not self.path.endswith("/file_stream"):
            return self.say(self.graphql(asked.get("operationName"), asked.get("variables", {})))
        run, sent = (
            self.server.runs[self.path.split("/")[-2]],
            asked.get("files", {}).get("wandb-history.jsonl"),
        )
        if sent:
            run["rows"] = run["rows"][: sent["offset"]] + sent["content"]
        self.say({})

    def graphql(self, operation, asked):
        runs, project = self.server.runs, {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
        if operation == "Viewer":
            return {
                "data": {
                    "viewer": {
                        "id": "V",
                        "entity": "me",
                        "username": "me",
                        "email": "",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            }
        if operation == "UpsertBucket" and self.server.refuse:
            return {"errors": [{"message": "entity nobody not found"}], "data": None}
        if operation == "UpsertBucket":
            new = asked["name"] not in runs
            runs.setdefault(asked["name"], {"name": asked["displayName"], "rows": []})
            return {
                "data": {
                    "upsertBucket": {
                        "bucket": {**self.bucket(asked["name"]), "project": project},
                        "inserted": new,
                    }
                }
            }
        if operation == "RunResumeStatus":
            return {
                "data": {
                    "model": {
                        **project,
                        "bucket": self.bucket(asked["name"]) if asked["name"] in runs else None,
                    }
                }
            }
        if operation == "CreateRunFiles":
            files = [
                {"name": name, "uploadUrl": f"http://127.0.0.1:{self.server.server_port}/{name}"}
                for name in asked["files"]
            ]
            return {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def bucket(self, run):
        rows = self.server.runs[run]["rows"]
        return {
            "id": "B",
            "name": run,
            "displayName": self.server.runs[run]["name"],
            "description": None,
            "config": "{}",
            "sweepName": None,
            "summaryMetrics": "{}",
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": '{"t": 1}',
        }

    def say(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def service(wandb, monkeypatch):
    service = Imitation()
    for name, value in {
        "WANDB_BASE_URL": f"http://127.0.0.1:{service.server_port}",
        "WANDB_API_KEY": KEY,
        "WANDB_HTTP_TIMEOUT": "10",
    }.items():
        monkeypatch.setenv(name, value)
    yield service
    service.shutdown()
    service.server_close()


class Interrupt(Callback):
    def on_step(self, run):
        if run.step == 70:
            raise KeyboardInterrupt


def test_online_rows_and_pictures_arrive_once_also_when_the_run_was_interrupted(
    tmp_path, heard, service, capfd
):
    tracker = make_tracker(tmp_path, {}, enabled=True, run_name_prefix="exp")
    with pytest.raises(KeyboardInterrupt):
        ours(tmp_path, tracker, Interrupt())
    tracker.finish("failed")
    tracker = make_tracker(tmp_path, {}, enabled=True, run_name_prefix="other")
    ours(tmp_path, tracker)
    tracker.finish()
    ((id, run),) = service.runs.items()
    rows = service.rows(id)
    assert run["name"].startswith("exp-2") and heard() == [] and capfd.readouterr() == ("", "")
    assert [row["toy/step"] for row in rows if "toy/train/total" in row] == STEPS
    assert [row["_step"] for row in rows] == list(range(len(rows))) and [
        row["toy/step"] for row in rows if "toy/picture" in row
    ] == [100]
    assert len([name for name in service.files if name.startswith("/media/images/toy/picture")]) == 1


def test_a_service_that_goes_away_is_said_at_the_end_and_the_log_is_whole(
    tmp_path, heard, service, monkeypatch
):
    monkeypatch.setattr(module, "UPLOAD_WITHIN", 0.3)
    tracker = make_tracker(tmp_path, {}, enabled=True)
    service.shutdown()
    service.server_close()
    ours(tmp_path, tracker)
    tracker.finish()
    (log,) = logs(tmp_path)
    assert heard() == [
        "tracking has ended (TimeoutError: Timed out finishing run); the run goes on, and its own files "
        f"are complete; wandb sync {log.parent} uploads what it was given until then"
    ]
    assert [row["toy/step"] for row in history(log) if "toy/train/total" in row] == STEPS


def test_a_service_that_refuses_the_run_is_said(tmp_path, heard, service, monkeypatch):
    service.refuse = True
    monkeypatch.setattr(module, "ANSWER_WITHIN", 2.0)
    tracker = make_tracker(tmp_path, {}, enabled=True, entity="nobody")
    ours(tmp_path, tracker)
    tracker.finish()
    (sentence,) = heard()
    assert (
        type(tracker) is Tracker
        and sentence.startswith("the run goes on untracked, for Weights & Biases did not start (")
        and "entity nobody not found" in sentence
    )


def test_what_was_tracked_offline_can_be_uploaded_later(tmp_path, heard, service):
    for part in (slice(0, 5), slice(3, 10)):  # interrupted, and taken up again two rows earlier
        tracker = make_tracker(tmp_path, {}, enabled=True, mode="offline")
        for step in STEPS[part]:
            tracker.metrics(step, {"train/total": 1 / step}, "toy")
        tracker.finish()
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *(log.parent for log in logs(tmp_path))],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    ((id, run),) = service.runs.items()
    assert [row["toy/step"] for row in service.rows(id)] == STEPS and heard() == []


# whatever fails, the run goes on


class Fails(Tracker):
    def __init__(self, error):
        self.error = error

    def metrics(self, step, values, prefix):
        raise self.error


ERRORS = [SystemExit(3), KeyboardInterrupt(), MemoryError(), OSError(28, "No space left"), ValueError("a\nb")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("strict", [False, True])
def test_no_failure_of_a_tracker_stops_a_training_or_hides_another(tmp_path, heard, capfd, error, strict):
    tracker = ThreadedTracker(Fails(error))
    with warnings.catch_warnings():
        if strict:  # as under python -W error
            warnings.simplefilter("error", TrackingWarning)
        ours(tmp_path, tracker)
        tracker.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "part" / "metrics.jsonl")] == STEPS
    said = [capfd.readouterr().err.strip()] if strict else heard()
    assert len(said) == 1 and f"({type(error).__name__}" in said[0] and "\n" not in said[0]


JOURNALS = {
    "empty id": b'{"schema_version": 1, "id": 5, "name": "exp"}\n',
    "no name": b'{"schema_version": 1, "id": "a"}\n',
    "version true": b'{"schema_version": true, "id": "a", "name": "exp"}\n',
    "a list": b"[1]\n",
    "not utf-8": b'{"schema_version": 1, "id": "\xff", "name": "exp"}\n',
    "no step": b'{"schema_version": 1, "id": "a", "name": "exp"}\n{"part": "toy"}\n',
    "step a word": b'{"schema_version": 1, "id": "a", "name": "exp"}\n{"part": "toy", "step": "3"}\n',
    "5,000 digits": b'{"schema_version": ' + b"1" * 5000 + b"}\n",
}


@pytest.mark.parametrize("kind", JOURNALS)
def test_a_damaged_journal_is_named_and_says_what_to_do(tmp_path, kind):
    path = tmp_path / "tracking.jsonl"
    path.write_bytes(JOURNALS[kind])
    with pytest.raises(ValueError) as caught:
        Journal(path, "exp")
    said = str(caught.value)
    assert str(path) in said and "delete it to track this run under a new name" in said and "\n" not in said
