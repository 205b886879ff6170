"Engines start commands and say how they ended: processes here, Ray, SLURM."
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from batch_tools import check_counted, counting_grid, counting_notebook, until, workers
from filelock import FileLock
from run_tools import refused

from worldmodels_nb.runs.batch import run_batch
from worldmodels_nb.runs.engines import EngineError, LocalEngine, make_engine, run_command
from worldmodels_nb.runs.worker import FULL, HELD, LATE, Task, take_turn, work


def task(folder, book, **changes) -> Task:
    "The first run of a grid of counting runs."
    parameters = dict(run="one", overrides={"run.dir": str(folder), "run.seed": 0})
    stages = ["data", "train", "heads", "evaluate"]
    given = dict(notebook=str(book), output=str(folder / "one.ipynb"), parameters=parameters, stages=stages,
                 folder=str(folder / "one"), lock=str(folder / "one.lock"), shared={}, cwd=os.getcwd())
    return Task(**given | changes)


def test_a_command_has_its_share_of_threads(tmp_path):
    said = "import os; print(os.environ['OMP_NUM_THREADS']); raise SystemExit(7)"
    assert run_command([sys.executable, "-c", said], tmp_path / "log", threads=3) == 7
    assert (tmp_path / "log").read_text().split() == ["3"]


def ended(handle) -> int:
    "How a task ended, when it has."
    until(lambda: handle.poll() is not None)
    return handle.poll()


@pytest.fixture
def engine():
    found = LocalEngine(1)
    yield found
    found.close()


def test_a_process_takes_one_run_after_another(engine, tmp_path):
    threads = "import os; assert os.environ['OMP_NUM_THREADS'] == str(os.cpu_count())\n"
    book, seen = counting_notebook(tmp_path / "count.ipynb", before=threads), []
    for run in ("one", "two"):
        parameters = dict(run=run, overrides={"run.dir": str(tmp_path), "run.seed": 0})
        own = dict(output=str(tmp_path / f"{run}.ipynb"), lock=str(tmp_path / f"{run}.lock"))
        own |= dict(folder=str(tmp_path / run), parameters=parameters)
        given = dataclasses.replace(task(tmp_path, book), **own)
        handle = engine.submit(given, tmp_path / f"{run}.log")
        seen += [worker.pid for worker in workers(tmp_path)]
        assert ended(handle) == 0
        assert (tmp_path / run / "result.json").exists()
    assert seen == [seen[0]] * 2
    engine.close()
    assert not workers(tmp_path)


@pytest.mark.parametrize("fault, code", [
    ("1 / 0", 1), ("os.kill(os.getppid(), 9)", -9), ("time.sleep(1000)", LATE),
])
def test_a_run_that_ends_badly_costs_the_next_one_nothing(engine, tmp_path, fault, code):
    book = counting_notebook(tmp_path / "bad.ipynb", before=fault)
    handle = engine.submit(task(tmp_path, book, limit=4 if code == LATE else None), tmp_path / "log")
    assert ended(handle) == code
    counting_notebook(book)
    handle = engine.submit(task(tmp_path, book), tmp_path / "log")
    assert ended(handle) == 0


def test_what_is_shared_is_not_held_by_a_run_that_failed(tmp_path):
    book = counting_notebook(tmp_path / "bad.ipynb", before="1 / 0")
    bad = task(tmp_path, book, shared={str(tmp_path / "never"): str(tmp_path / "never.lock")})
    assert work(bad) == 1
    with FileLock(tmp_path / "never.lock", timeout=2): pass


def is_over(process):
    "Whether a process has ended; its parent may not have noticed."
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_cancelling_ends_what_a_run_has_started(engine, tmp_path):
    started = "import subprocess; subprocess.run('sleep 1000 & sleep 1000', shell=True)"
    book = counting_notebook(tmp_path / "count.ipynb", before=started)
    handle = engine.submit(task(tmp_path, book), tmp_path / "log")
    process = until(lambda: workers(tmp_path))[0]
    family = until(lambda: len(found := process.children(recursive=True)) >= 4 and found)
    handle.cancel()
    until(lambda: all(map(is_over, family)))
    assert handle.poll() < 0


def test_a_worker_leaves_a_run_that_another_has(tmp_path):
    book = counting_notebook(tmp_path / "count.ipynb")
    with FileLock(tmp_path / "one.lock"): assert work(task(tmp_path, book)) == HELD
    assert not (tmp_path / "one").exists()


def test_a_worker_leaves_a_run_that_is_finished(tmp_path):
    (tmp_path / "one").mkdir()
    status = dict(stages=["data", "train", "heads", "evaluate"])
    (tmp_path / "one" / "status.json").write_text(json.dumps(status))
    assert work(task(tmp_path, "no notebook")) == 0


def test_a_worker_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr("papermill.execute_notebook", full)
    assert work(task(tmp_path, "no notebook")) == FULL


def test_turns_are_taken(tmp_path):
    target, lock, made = tmp_path / "made", tmp_path / "lock", []
    def make():
        take_turn(target, lock)
        if target.exists(): return
        made.append(1)
        time.sleep(.3)
        target.touch()
    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert made == [1]


def test_a_maker_that_dies_is_followed_by_the_next(tmp_path):
    code = ("import sys, time; from worldmodels_nb.runs.worker import take_turn\n"
            "take_turn(*sys.argv[1:]); print('mine', flush=True); time.sleep(1000)")
    command = [sys.executable, "-c", code, str(tmp_path / "made"), str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as maker:
        maker.stdout.readline()
        assert FileLock(tmp_path / "lock").is_locked is False
        maker.kill()
    take_turn(tmp_path / "made", tmp_path / "lock")  # does not wait for ever
    (tmp_path / "made").touch()


def test_engines_that_cannot_be(tmp_path, monkeypatch):
    with refused(EngineError, "'moon'", "local, ray, slurm"): make_engine("moon", tmp_path, 1)
    with refused(EngineError, "0 processes"): make_engine("local", tmp_path, 0)
    with refused(EngineError, "'local'", "gpus"): make_engine("local", tmp_path, 1, gpus=1)
    for name, module in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(sys.modules, module, None)
        with refused(EngineError, module, 'pip install "worldmodels_nb[cluster]"'):
            make_engine(name, tmp_path, 1)


def test_slurm_on_this_machine(tmp_path):
    pytest.importorskip("submitit")
    grid, book = counting_grid(2, "jobs"), counting_notebook(tmp_path / "count.ipynb")
    rows = run_batch(grid, tmp_path, engine="slurm", cluster="local", notebook=book)
    assert [row["status"] for row in rows] == ["finished"] * 2
    check_counted(grid, tmp_path)


def free_ports(n) -> list[int]:
    "Ports that nobody listens on."
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in found: one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def node() -> dict:
    "A node of one processor; one that is told its ports does not wait for its agents to find some."
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port",
             "dashboard_agent_listen_port")
    return dict(num_cpus=1, **dict(zip(names, free_ports(4))))


@pytest.fixture
def cluster(monkeypatch):
    "A Ray cluster of three nodes, on loopback and without a dashboard."
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read when it is imported
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    try: found = Cluster(initialize_head=True, head_node_args=node() | dict(include_dashboard=False))
    except Exception as error: pytest.skip(f"Ray does not start here in its half minute: {error}")
    nodes = [found.add_node(**node()) for _ in range(2)]
    yield found, nodes[0]
    ray.shutdown()
    found.shutdown()


def test_a_node_of_a_ray_cluster_is_lost(cluster, tmp_path):
    cluster, node = cluster
    grid, book = counting_grid(12, "nodes"), counting_notebook(tmp_path / "count.ipynb", pause=.1)
    lost = threading.Thread(target=lose, args=(cluster, node, tmp_path))
    lost.start()
    rows = run_batch(grid, tmp_path, engine="ray", address=cluster.address, notebook=book)
    lost.join()
    assert [row["status"] for row in rows] == ["finished"] * 12
    check_counted(grid, tmp_path)


def lose(cluster, node, runs):
    "Remove a node as soon as three runs are at work."
    until(lambda: len(workers(runs)) >= 3)
    cluster.remove_node(node, allow_graceful=False)
