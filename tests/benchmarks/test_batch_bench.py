"What a batch costs beyond its runs, and twelve real runs whose drivers and workers are killed; `make bench`."
import random
import time
from concurrent.futures import ThreadPoolExecutor

from batch_tools import counting_grid, counting_notebook, driver, until, weights_of, workers
from jupyter_client.manager import start_new_kernel

from worldmodels_nb.runs.batch import run_batch
from worldmodels_nb.runs.grid import read_grid

EMPTY, PROCESSES = 20, 2


def start_kernels(n):
    "Start a kernel and end it, so many times."
    for _ in range(n):
        manager, client = start_new_kernel(kernel_name="python3")
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_overhead_of_empty_runs(benchmark, tmp_path):
    "Seconds a run and core, beyond a kernel's start, with as many processes at a time."
    began = time.perf_counter()
    with ThreadPoolExecutor(PROCESSES) as pool: list(pool.map(start_kernels, [4] * PROCESSES))
    kernel = (time.perf_counter() - began) / 4
    grid, book = counting_grid(EMPTY, "empty"), counting_notebook(tmp_path / "count.ipynb", steps=0)
    rows = benchmark.pedantic(run_batch, (grid, tmp_path), dict(notebook=book, processes=PROCESSES), rounds=1)
    assert {row["status"] for row in rows} == {"finished"}
    a_run = benchmark.stats.stats.total * PROCESSES / EMPTY
    benchmark.extra_info |= dict(kernel=kernel, a_run=a_run, overhead=a_run - kernel)
    print(f"a run {a_run:.2f} s, a kernel {kernel:.2f} s: overhead {a_run - kernel:.2f} s")


def results(grid, runs):
    "Hashes of all weights, by run and file."
    return {cell.run: weights_of(runs / cell.run) for cell in grid.cells}


def smoke_grid(folder):
    "Twelve runs of the smoke preset."
    fixed = {"data.dir": str(folder / "datasets"), "train.checkpoint_every": 5}
    return read_grid(dict(name="smoke", preset="smoke", fixed=fixed,
                          axes={"run.models": [["jepa"], ["encdec"]], "run.seed": list(range(6))}))


def test_twelve_smoke_runs_are_killed_ten_times(benchmark, tmp_path):
    "Weights of killed runs are those of undisturbed ones, bit for bit, and no run is done twice."
    chance, grid = random.Random(0), smoke_grid(tmp_path)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_batch(grid, undisturbed)
    def disturbed():
        for _ in range(5):
            with driver(grid, killed):
                until(lambda: workers(killed))
                time.sleep(chance.uniform(5, 20))
                for worker in workers(killed)[:1]: worker.kill()
                time.sleep(chance.uniform(0, 10))
        return run_batch(grid, killed, retries=5)
    rows = benchmark.pedantic(disturbed, rounds=1)
    assert [row["status"] for row in rows] == ["finished"] * 12
    assert results(grid, undisturbed) == results(grid, killed)
