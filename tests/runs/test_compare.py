"Runs side by side: what was changed, what came of it, and that nothing but files is read."
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from run_tools import ROOT, SMALL, TWO, Page, bytes_of, cut_short, go, inside, refused

from worldmodels_nb.runs.compare import compare, write_comparison
from worldmodels_nb.runs.facts import read_rows
from worldmodels_nb.runs.folder import RunError
from worldmodels_nb.runs.joined import join_rows, setting_differences, strip_rows
from worldmodels_nb.runs.seeds import difference_rows, mean_rows, seed_groups, student_interval
from worldmodels_nb.settings import load_settings, save_settings
from worldmodels_nb.viz import as_pixels

MODELS = ["encdec", "vjepa2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two seeds; the first with another setting, as a copy; and that one before it was evaluated."
    folder = tmp_path_factory.mktemp("compare")
    first = go("first", inside(folder, base=SMALL | TWO, models=MODELS)).folder.path
    go("second", inside(folder, {"run.seed": 1}, base=SMALL | TWO, models=MODELS))
    same = shutil.copytree(first, first.with_name("same"))
    changed = load_settings(same / "settings.ini", overrides={"train.learning_rate": 5e-3, "run.threads": 3})
    save_settings(changed, same / "settings.ini")
    trained = shutil.copytree(same, first.with_name("trained"))
    for name in ("status.json", "models/encdec/evaluation.json", "models/vjepa2/evaluation.json"):
        (trained / name).unlink()
    return first.parent


@pytest.fixture
def copies(runs, tmp_path):
    "Copies of those runs, to be damaged."
    return shutil.copytree(runs, tmp_path / "runs")


# ---------------------------------------------------------------- settings

def test_only_what_differs_and_matters_is_listed(runs):
    both = compare(["first", "same"], runs)
    assert set(both.differences) == {"train.learning_rate"}
    assert both.differences["train.learning_rate"]["same"] == 5e-3


def test_settings_that_are_equal_are_left_out():
    assert setting_differences({"a": load_settings(), "b": load_settings()}) == {}


def test_what_forbids_a_comparison_is_said_first(runs):
    one, both = compare(["first"], runs), compare(["first", "second"], runs)
    assert len(one.notes) == 1 and "one run with one seed" in one.notes[0]
    assert "single runs" in both.notes[0] and "n = 1" in both.notes[0]


def test_seeds_alone_are_called_chance(runs):
    said = [note for note in compare(["first", "second"], runs).notes if "nothing but their seeds" in note]
    assert len(said) == 1 and not any("chance" in note for note in compare(["first", "same"], runs).notes)


def test_data_that_differ_are_called_so(runs):
    assert any("different datasets" in note for note in compare(["first", "second"], runs).notes)
    assert not any("different datasets" in note for note in compare(["first", "same"], runs).notes)


# ---------------------------------------------------------------- results

def test_a_difference_is_one_to_the_first_run(runs):
    both = compare(["first", "second"], runs)
    own = {run: {(row["model"], row["head"], row["kind"], row["metric"], row["horizon"]): row
                 for row in read_rows(runs / run)} for run in both.folders}
    lines = [line for line in join_rows(both.rows, "first")
             if line["metric"] == "r2 position" and line["label"].split()[-1].strip("()") in MODELS]
    assert len(lines) == 2 * len(MODELS)
    for line in lines:
        assert set(line["cells"]) == {"first", "second"} and line["cells"]["first"]["difference"] is None
        cell, origin = line["cells"]["second"], line["cells"]["first"]
        key = (cell["model"], cell["head"], cell["kind"], cell["metric"], cell["horizon"])
        assert cell["value"] == own["second"][key]["value"] and cell["low"] == own["second"][key]["low"]
        assert cell["difference"] == cell["value"] - origin["value"]


def test_every_result_is_in_one_cell(runs):
    both = compare(["first", "second", "same"], runs)
    lines = join_rows(both.rows, "first")
    written = [row for run in both.folders for row in read_rows(runs / run)]
    assert sum(len(line["cells"]) for line in lines) == len(written)


def test_a_value_that_is_not_there_has_no_difference():
    row = dict(model="m", head="", kind="model", protocol="probe", metric="r2", horizon=0, unit="", n=1)
    given = [row | dict(run="a", value=None), row | dict(run="b", value=1.0)]
    assert [cell["difference"] for cell in join_rows(given, "a")[0]["cells"].values()] == [None, None]


def test_the_table_shows_differences_with_their_sign(runs):
    text = Page(compare(["first", "second"], runs).table("probe")).text
    assert "(+" in text or "(-" in text
    assert "…" in text and "n = " in text and "encdec: r2 position" in text


def measured(run, model, metric, value, horizon=4, head="", kind="model"):
    return dict(run=run, env="toy", seed=0, model=model, head=head, kind=kind, protocol="rollout",
                metric=metric, unit="px", horizon=horizon, value=value, low=value - 1, high=value + 1, n=40)


def kept(mean, seed, metric="position", horizon=4, windows=40):
    "Errors of each window: hard ones are hard for all, whoever is asked."
    hard = np.random.default_rng(0).gamma(1, 2, 40) + np.random.default_rng(seed).normal(0, .05, 40)
    return {f"error_{metric}_{horizon}": (mean + hard)[:windows], f"window_{horizon}": np.arange(windows),
            f"episode_{horizon}": np.arange(windows) // 2}


def test_a_difference_on_the_same_windows_has_an_interval_of_its_own():
    rows = [measured("a", "m", "position", 3.), measured("b", "m", "position", 3.2)]
    line, = join_rows(rows, "a", {"m": {"a": kept(1., 1), "b": kept(1.2, 2, windows=30)}})
    difference, low, high, n = line["cells"]["b"]["paired"]
    assert 0 < low < difference < high < .3 and n == 30 and line["cells"]["a"]["paired"] is None


@pytest.mark.parametrize("rows, errors", [
    (dict(), {}), (dict(head="larp"), {"m": {"a": kept(1., 1), "b": kept(1., 2)}}),
    (dict(kind="baseline"), {"m": {"a": kept(1., 1), "b": kept(1., 2)}}),
    (dict(), {"m": {"a": kept(1., 1)}}), (dict(horizon=8), {"m": {"a": kept(1., 1), "b": kept(1., 2)}})])
def test_without_shared_windows_there_is_a_difference_and_no_paired_one(rows, errors):
    given = [measured(run, "m", "position", 3., **rows) for run in ("a", "b")]
    assert join_rows(given, "a", errors)[0]["cells"]["b"]["paired"] is None


def test_models_of_a_run_are_compared_on_its_windows(runs):
    both = compare(["first", "same"], runs)
    assert set(both.errors["encdec"]) == {"first", "same"}, "they share a dataset"
    text = " ".join(Page(both.pairs()).text.split())
    assert "encdec − vjepa2" in text and "position" in text
    other = compare(["first", "second"], runs)
    assert set(other.errors["encdec"]) == {"first"}, "windows of other data are others"


# ---------------------------------------------------------------- seeds

def test_runs_that_differ_in_their_seed_alone_are_a_group(runs):
    assert compare(["first", "second"], runs).seeds == [["first", "second"]]
    assert compare(["first", "same"], runs).seeds == [] == compare(["first"], runs).seeds
    assert any("2 seeds" in note for note in compare(["first", "second"], runs).notes)


def test_of_one_seed_twice_one_counts():
    one, again, other = (load_settings(overrides={"run.seed": seed}) for seed in (0, 0, 1))
    assert seed_groups({"a": one, "b": again}) == []
    assert seed_groups({"a": one, "b": again, "c": other}) == [["a", "c"]]


@pytest.mark.parametrize("values, factor", [
    ((1., 2.), 12.706), ((1., 2., 3.), 4.303), ((1., 2.) * 40, 2.042)])
def test_the_interval_between_seeds_is_students(values, factor):
    mean, low, high = student_interval(values)
    half = factor * np.std(values, ddof=1) / len(values)**.5
    assert mean == np.mean(values) and high - mean == pytest.approx(half) == pytest.approx(mean - low)


def test_one_seed_has_no_interval(): assert student_interval([3.]) == (3., None, None)


def seeds_of(**values):
    "A row for each model and seed."
    return [measured(f"run {k}", model, "position_ratio", value)
            for model, of in values.items() for k, value in enumerate(of)]


def test_means_count_seeds_and_keep_what_a_row_is():
    row, = mean_rows(seeds_of(m=(1., 2., 3.)), ["run 0", "run 1", "run 2"])
    assert (row["value"], row["n"], row["model"], row["horizon"], row["unit"]) == (2., 3, "m", 4, "px")
    assert mean_rows(seeds_of(m=(1., 2., 3.)), ["run 0", "run 2"])[0]["n"] == 2


def test_models_are_subtracted_seed_by_seed():
    "Seeds differ by far more than the models do, and yet the difference is sure."
    rows, runs = seeds_of(a=(1., 5., 9.), b=(1.5, 5.6, 9.4)), ["run 0", "run 1", "run 2"]
    row, = difference_rows(rows, runs, ["position_ratio"])
    assert row["model"] == "a − b" and row["n"] == 3
    assert row["value"] == pytest.approx(-.5) and row["high"] < 0
    assert difference_rows(rows, runs, ["pixel_ratio"]) == []
    assert difference_rows(rows[:3], runs, ["position_ratio"]) == []
    fewer, = difference_rows(rows[:5], runs, ["position_ratio"])
    assert fewer["n"] == 2


def test_means_over_seeds_stand_on_the_page(runs):
    text = " ".join(Page(compare(["first", "second"], runs)._repr_html_()).text.split())
    assert "Over 2 seeds" in text and "seed by seed" in text and "encdec − vjepa2" in text
    assert "Over" not in Page(compare(["first", "same"], runs)._repr_html_()).text.split()


# ---------------------------------------------------------------- curves and films

def test_curves_of_all_runs_stand_in_each_panel(runs):
    picture = compare(["first", "second"], runs).curves("vjepa2/action")
    assert {len(ax.lines) for ax in picture.axes} == {4}, "two runs, each on training and validation"
    assert [text.get_text() for text in picture.legends[0].texts] == ["first", "second"]


def test_the_total_is_the_first_term(runs):
    both = compare(["first", "second"], runs)
    assert set(both.metrics) == {"encdec", "vjepa2/pretrain", "vjepa2/action"}
    assert all(both.curves(part).axes[0].get_title() == "total" for part in both.metrics)


def test_one_truth_stands_above_runs_that_share_it():
    truth, other = np.zeros((3, 3, 8, 8), np.uint8), np.ones((3, 3, 8, 8), np.uint8)
    windows = dict(a=[dict(truth=truth, jepa=truth + 2)],
                   b=[dict(truth=other, jepa=other + 3), dict(truth=truth, jepa=truth + 4)])
    rows = strip_rows(windows, "jepa")
    assert list(rows) == ["truth", "a", "b"] and rows["b"][0, 0, 0, 0] == 4


def test_runs_on_other_data_have_truths_of_their_own():
    def window(value): return dict(truth=np.full((2, 3, 8, 8), value, np.uint8),
                                   encdec=np.zeros((2, 3, 8, 8), np.uint8),
                                   **{"encdec, own decoder": np.ones((2, 3, 8, 8), np.uint8)})
    rows = strip_rows(dict(a=[window(5)], b=[window(6)]), "encdec")
    assert list(rows) == ["truth of a", "a", "a, own decoder", "truth of b", "b", "b, own decoder"]


def test_frames_of_two_sizes_are_shown_in_one():
    def window(side): return dict(truth=np.zeros((2, 3, side, side), np.uint8),
                                  jepa=np.full((2, 3, side, side), 9, np.uint8))
    rows = strip_rows(dict(a=[window(8)], b=[window(16)]), "jepa")
    assert {frames.shape for frames in rows.values()} == {(2, 3, 16, 16)} and rows["a"].max() == 9
    assert all(as_pixels(frames).shape == (2, 16, 16, 3) for frames in rows.values())


def test_runs_of_one_dataset_and_seed_share_their_truth(runs):
    both = compare(["first", "same"], runs)
    assert list(strip_rows(both.windows["vjepa2"], "vjepa2")) == ["truth", "first", "same"]


# ---------------------------------------------------------------- the page

def test_the_page_is_self_contained_and_whole(runs, tmp_path):
    path = write_comparison(compare(["first", "second"], runs), tmp_path / "new/page.html")
    page = Page(path.read_text())
    assert [child.name for child in path.parent.iterdir()] == ["page.html"]
    pictures = [about for tag, about in page.tags if tag == "img"]
    assert all(about["src"].startswith("data:image/png;base64,") and about["alt"] for about in pictures)
    assert len(pictures) >= len(MODELS) + 3 and not [tag for tag, _ in page.tags if tag in ("script", "link")]
    assert "run.seed" in page.text and "first" in page.text and "second" in page.text


def test_what_files_say_is_text_and_no_markup(copies):
    path = copies / "second/models/encdec/evaluation.json"
    found = json.loads(path.read_text())
    for row in found["rows"]: row["metric"] = row["metric"].replace("r2", "<script>alert(1)</script>")
    path.write_text(json.dumps(found))
    assert "<script" not in compare(["first", "second"], copies).table("probe")


@pytest.mark.parametrize("name", ["page.txt", "page"])
def test_a_page_is_an_html_file(name, runs, tmp_path):
    with refused(RunError, ".html"): write_comparison(compare(["first"], runs), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_reading_changes_nothing_and_loads_no_model(runs, monkeypatch):
    def called(*_): raise AssertionError("weights were read")
    monkeypatch.setattr("worldmodels_nb.training.fit.load_weights", called)
    monkeypatch.setattr("worldmodels_nb.runs.reopen.load_weights", called)
    before, both = bytes_of(runs), compare(["first", "second", "trained"], runs)
    for model in MODELS: both.film(model)
    assert bytes_of(runs) == before


# ---------------------------------------------------------------- what is not there, or damaged

def test_an_unfinished_run_is_compared_by_what_there_is(runs):
    both = compare(["first", "trained"], runs)
    said = " ".join(both.notes)
    assert "trained is not finished" in said and "trained has no results yet for encdec" in said
    assert set(both.metrics["encdec"]) == {"first", "trained"} and set(both.windows["encdec"]) == {"first"}
    legend = both.curves("encdec").legends[0]
    assert [text.get_text() for text in legend.texts] == ["first", "trained"]


def test_a_run_killed_before_its_first_step_has_no_curves(copies):
    for path in (copies / "first" / "models").rglob("metrics.jsonl"): path.write_text("")
    for part in ("encdec", "nothing"):
        with refused(RunError, f"no run has written metrics of {part} yet"):
            compare(["first"], copies).curves(part)


def test_runs_without_any_result_can_be_compared(runs):
    assert "Training" in compare(["trained"], runs)._repr_html_()


@pytest.mark.parametrize("name", ["settings.ini", "status.json", "models.json", "provenance.json",
                                  "models/encdec/evaluation.json", "models/encdec/evaluation.npz"])
def test_a_damaged_run_is_one_sentence_with_the_file(name, copies):
    cut_short(copies / "second" / name)
    with refused(RunError, "second", name.rpartition("/")[2]): compare(["first", "second"], copies)


def test_a_damaged_curve_is_one_sentence_with_the_file(copies):
    path = copies / "second/models/encdec/world/metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with refused(RunError, str(path)): compare(["first", "second"], copies)


@pytest.mark.parametrize("given, word", [([], "a list of names"), ("first", "a list of names"),
                                         (["first", "first"], "one name"), (["fist"], "'first'")])
def test_names_that_cannot_be_compared_are_refused(given, word, runs):
    with refused(RunError, word): compare(given, runs)


# ---------------------------------------------------------------- without a screen

def test_the_notebook_writes_the_page(runs, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "out.ipynb"
    given = dict(runs=["trained"], where=str(runs), page=str(page))
    command = [sys.executable, "-m", "papermill", ROOT / "nbs/7_run/73_compare.ipynb", out,
               "--no-progress-bar", "-y", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Settings that differ" in page.read_text() and out.stat().st_size < 300_000
