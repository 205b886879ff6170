"Tracking with Trackio, for real: it stays on this machine, in one database beside the runs, and asks nobody."
import json
import os
import sqlite3
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from worldmodels_nb.training.tracking import Tracker, TrackingWarning, make_tracker

CUT = """
import socket, sys
from pathlib import Path
from worldmodels_nb.training.tracking import make_tracker
folder, tried = Path(sys.argv[1]), []
def cut(name, real):
    def ask(*args, **more):
        text = repr(args)
        if "127.0.0.1" in text or "localhost" in text: return real(*args, **more)
        tried.append((name, text))
        raise OSError("the network is cut")
    return ask
socket.socket.connect = cut("connect", socket.socket.connect)
socket.getaddrinfo = cut("look up", socket.getaddrinfo)
def track(run, steps, status="finished", picture=None):
    assert run != "first" or steps[0] > 10 or "trackio" not in sys.modules, "imported before it was asked for"
    config = {"train": {"steps": 100}}
    (folder / run).mkdir(exist_ok=True)
    tracker = make_tracker(folder / run, config, enabled=True, backend="trackio", project="mine")
    for step in steps: tracker.metrics(step, {"train/total": 1 / step}, "toy")
    if picture: tracker.picture("toy/picture", folder / picture, steps[-1])
    tracker.finish(status)
    assert not tried, tried
"""
DASHBOARD = """
import contextlib, io, psutil, trackio, urllib.request
with contextlib.redirect_stdout(io.StringIO()):
    app, url, shared, _ = trackio.show(project="mine", open_browser=False, block_thread=False)
served = urllib.request.urlopen(url).status
listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
assert served == 200 and listening and set(listening) == {"127.0.0.1"} and shared is None, (listening, shared)
assert not tried, tried
app.close()
"""


def process(folder, *parts, **environment):
    "Run a program in a process of its own, as somebody who is logged in at Hugging Face; what it printed."
    pytest.importorskip("trackio")
    known = {key: value for key, value in os.environ.items() if not key.startswith(("TRACKIO", "HF_"))}
    known |= {"HF_HOME": str(folder.parent / "hub"), "HF_TOKEN": "hf_" + "x" * 34, "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "always::UserWarning", "-c", "\n".join(parts), folder]
    done = subprocess.run(command, env=known | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def rows_in(database):
    "Every row: of which run, its name, at which step, and what; and the settings of the first run."
    with sqlite3.connect(database) as opened:
        found = opened.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
        configs = opened.execute("select config from configs order by id").fetchall()
    return [(id, name, step, json.loads(row)) for id, name, step, row in found], json.loads(configs[0][0])


def test_runs_are_mirrored_beside_themselves_with_the_network_cut_and_shown_on_loopback(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    Image.new("RGB", (8, 4), "red").save(folder / "seen.png")
    twice = 'track("first", (10, 20, 30), "failed")\ntrack("first", (20, 30, 40), picture="seen.png")'
    assert process(folder, CUT, twice, 'track("second", (10, 20))', DASHBOARD) == ("", "")
    rows, config = rows_in(folder / ".trackio" / "mine.db")
    first, second = dict.fromkeys(id for id, *_ in rows)  # what was interrupted goes on as the same run
    numbers = [(id, step, row) for id, _, step, row in rows if "toy/picture" not in row]
    steps = {first: (10, 20, 30, 40), second: (10, 20)}
    assert numbers == [(id, step, {"toy/train/total": 1 / step}) for id in steps for step in steps[id]]
    assert config["train"] == {"steps": 100} and all(name.startswith("exp-2") for _, name, *_ in rows)
    ((step, row),) = [(step, row) for *_, step, row in rows if "toy/picture" in row]
    with Image.open(folder / ".trackio" / "media" / row["toy/picture"]["file_path"]) as kept:
        assert step == 40 and kept.convert("RGB").tobytes() == bytes((255, 0, 0)) * 32
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
    assert not outside


def test_a_place_named_by_the_environment_is_used_and_one_on_the_network_is_not(tmp_path):
    folder, place = tmp_path / "runs", tmp_path / "elsewhere"
    away = {"TRACKIO_SPACE_ID": "me/board", "TRACKIO_SERVER_URL": "http://192.0.2.1"}
    process(folder, CUT, 'track("first", (10, 20))', TRACKIO_DIR=str(place), **away)
    assert len(rows_in(place / "mine.db")[0]) == 2 and not (folder / ".trackio").exists()


def test_a_database_that_cannot_be_written_stops_nothing(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / ".trackio").write_text("in the way")
    process(folder, CUT, 'track("first", (10, 20))')
    assert (folder / ".trackio").read_text() == "in the way"


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "never"))
    with pytest.warns(TrackingWarning) as heard:
        warnings.simplefilter("always")
        tracker = make_tracker(tmp_path, {}, enabled=True, backend="trackio")
    (said,) = [str(one.message) for one in heard]
    assert type(tracker) is Tracker and said.endswith('needs an extra: pip install "worldmodels_nb[trackio]"')
    assert list(tmp_path.iterdir()) == []
