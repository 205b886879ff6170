"The report: one file that loads nothing, names all it shows, and can be made by somebody who has no model."
import base64
import io
import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from run_tools import Page, begin, bytes_of, evaluation_of, read_csv, refused, run_in, small

from worldmodels_nb.eval.results import label
from worldmodels_nb.runs.figures import (
    LINES,
    film_figure,
    horizon_figures,
    moving_part,
    plot_terms,
    signed_difference,
)
from worldmodels_nb.runs.folder import RunError, read_models
from worldmodels_nb.runs.report import write_report
from worldmodels_nb.runs.tables import few_horizons, short_number, table_html
from worldmodels_nb.settings import write_whole
from worldmodels_nb.training.parts import read_result


@pytest.fixture(scope="module")
def page(smoke):
    return Page((smoke.folder.path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def copied(trained, tmp_path):
    "A copy of a finished run's folder, to change."
    return shutil.copytree(trained.folder.path, tmp_path / "copied")


@pytest.fixture
def sketched(monkeypatch):
    "Figures are made and named, and not drawn: that takes most of a report's time."
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "png")
    def save(figure, path, tight): return write_whole(path, dot.getvalue())
    monkeypatch.setattr("worldmodels_nb.runs.report.save_figure", save)


def change_evaluation(folder, change):
    "Change what stands in the evaluation of jepa, in place."
    found = evaluation_of(folder, "jepa")
    change(found)
    (folder / "models" / "jepa" / "evaluation.json").write_text(json.dumps(found))


# ---------------------------------------------------------------- what is on it

LOADING = {"script", "link", "iframe", "object", "embed", "base"}


def test_the_report_is_one_file_that_loads_nothing(page):
    assert not LOADING & {tag for tag, _ in page.tags}
    names = [name for _, attributes in page.tags for name in attributes]
    assert [name for name in names if name in ("srcset", "background") or name.startswith("on")] == []
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) >= 9
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert content.startswith(b"\x89PNG")
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_every_link_leads_to_a_part_of_the_page(page):
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    places = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert len(links) >= 8 and set(links) <= places


def test_the_report_names_every_model_baseline_and_reference(smoke, page, comparison):
    "What belongs to a model stands in its column, under its own name; what is shared has a column."
    names = {row["model"] or label(row) for row in comparison}
    names |= {row["head"].replace("_", " ") for row in comparison if row["model"] and row["kind"] != "model"}
    assert [name for name in names if name not in page.text] == []
    said = json.loads((smoke.folder.path / "provenance.json").read_text())
    words = ("first", "600 frames", "24 episodes", "20 steps", said["dataset_hash"], "checkpoint_every = 10")
    assert [word for word in words if word not in page.text] == []


def test_baselines_and_references_are_set_apart_from_models(page, comparison):
    "Heads of columns have the kind as their class."
    classes = {attributes.get("class") for tag, attributes in page.tags if tag in ("th", "tr")}
    assert classes - {None, "group"} == {row["kind"] for row in comparison}


def test_a_report_can_be_made_again_and_tells_the_steps_that_were_made(tmp_path):
    folder = run_in(tmp_path, {"train.epochs": .5})
    steps = read_result(folder / "models" / "jepa" / "world")["steps"]
    text, before = Page(write_report(folder).read_text()).text, bytes_of(folder)
    write_report(folder)
    assert bytes_of(folder) == before
    assert steps not in (6, 20, 600), "settings.train.steps is not what an epoch comes to"
    assert re.search(rf"\b{steps} steps", text)


EMPTIED = ("latent", "prediction_ratio")


def test_a_report_survives_a_collapsed_model(copied):
    "Equal latents have no relative error, no rank, no R²: such numbers are left empty, and the page says so."
    def empty(found):
        for row in found["rows"]:
            if row["metric"].startswith(EMPTIED): row.update(value=None, low=None, high=None)
    change_evaluation(copied, empty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(copied)
    assert "–" in page.read_text() and ",,," in (copied / "comparison.csv").read_text()
    rows = [row for row in read_csv(copied / "comparison.csv") if row["metric"].startswith(EMPTIED)]
    assert rows and {(row["value"], row["low"], row["high"]) for row in rows} == {("", "", "")}


# ---------------------------------------------------------------- what it does not trust, and does not need

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'


def test_text_of_a_run_is_escaped(copied):
    "Notes, provenance and settings are words, whatever is in them."
    change_evaluation(copied, lambda found: found["notes"].append(HOSTILE))
    origin = json.loads((copied / "provenance.json").read_text())
    (copied / "provenance.json").write_text(json.dumps(origin | {"commit": HOSTILE}))
    ini = (copied / "settings.ini").read_text()
    project = f"project = {json.dumps(HOSTILE)}"
    (copied / "settings.ini").write_text(re.sub("^project = .*$", lambda _: project, ini, flags=re.MULTILINE))
    page = Page(write_report(copied).read_text(encoding="utf-8"))
    assert not LOADING & {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes and attributes.get("src") != "x" for _, attributes in page.tags)
    assert HOSTILE in page.text and json.dumps(HOSTILE) in page.text and project in page.text


def test_names_in_a_table_are_escaped(copied):
    def rename(found):
        for row in found["rows"]:
            if row["protocol"] == "collapse": row.update(metric=HOSTILE, head=HOSTILE, unit=HOSTILE)
    change_evaluation(copied, rename)
    page = Page(write_report(copied).read_text(encoding="utf-8"))
    assert not LOADING & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) >= 2


@pytest.mark.parametrize("name", ["n", "horizon", "value", "low", "high", "seed"])
@pytest.mark.parametrize("value", [HOSTILE, [1], {"a": 1}])
def test_a_number_that_is_none_is_refused(name, value, copied):
    change_evaluation(copied, lambda found: found["rows"][3].update({name: value}))
    with refused(RunError, "evaluation.json", "row 3"): write_report(copied)


@pytest.mark.parametrize("damage", [
    lambda rows: rows.append({}), lambda rows: rows.append(3), lambda rows: rows[0].pop("unit"),
    lambda rows: rows[1].update(model=None), lambda rows: rows[2].update(metric=7)])
def test_a_row_that_is_none_is_refused(damage, copied):
    change_evaluation(copied, lambda found: damage(found["rows"]))
    with refused(RunError, "evaluation.json", "row"): write_report(copied)


@pytest.mark.parametrize("metric", ["../../outside", "/tmp/out", "a/b", "x" * 400, "..", "C:\\x", HOSTILE])
def test_a_metric_is_no_path(metric, copied, sketched):
    def rename(found):
        for row in found["rows"]:
            if row["metric"] == "pixel_ratio": row.update(metric=metric)
    change_evaluation(copied, rename)
    around = {path.name for path in copied.parent.iterdir()}
    before = set(bytes_of(copied))
    write_report(copied)
    assert {path.name for path in copied.parent.iterdir()} == around
    new = set(bytes_of(copied)) - before
    assert {name.count("/") for name in new} <= {0, 1} and not any(".." in name for name in new)


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 99, bytes(range(256))])
def test_damaged_pictures_of_an_evaluation_are_refused_by_name(content, copied):
    (copied / "models" / "jepa" / "evaluation.npz").write_bytes(content)
    with refused(RunError, "evaluation.npz", "evaluate"): write_report(copied)


@pytest.mark.parametrize("arrays", [{}, {"truth": [1, 2]}, {"truth": [[[[[1]]]]]}, {"decoded": [[[[[1]]]]]}])
def test_missing_or_misshapen_pictures_are_refused_by_name(arrays, copied):
    np.savez(copied / "models" / "jepa" / "evaluation.npz", **arrays)
    with refused(RunError, "evaluation.npz", "evaluate"): write_report(copied)


@pytest.mark.parametrize("rows", [
    "", '{"step": 1}\n', '{"step": 1, "val/total": 2}\n',
    '{"step": 1, "train/total": 2}\n{"step": 2, "train/a": 1, "train/total": 2}\n'])
def test_curves_of_a_training_that_told_little(rows, copied):
    (copied / "models" / "jepa" / "world" / "metrics.jsonl").write_text(rows)
    write_report(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema_version": 1, "frames": "many"}', b"\xff"])
def test_a_damaged_provenance_is_refused_by_name(content, copied):
    (copied / "provenance.json").write_bytes(content)
    with refused(RunError, "provenance.json"): write_report(copied)
    (copied / "provenance.json").unlink()
    with refused(RunError, "provenance.json"): write_report(copied)


def test_the_report_tells_each_stage_with_its_own_steps_and_batches(smoke, page):
    for model in ("jepa", "vjepa2"):
        for stage in read_models(smoke.folder)[model]["stages"]:
            done = read_result(smoke.folder.part(model, stage))
            said = f"for {done['steps']:,} steps of {done['recipe']['train.batch_size']} windows"
            assert said in " ".join(page.text.split())


def test_reading_a_run_loads_no_model():
    "A fresh process that can write reports has imported what all models share, and no model."
    code = ("import sys, worldmodels_nb.runs.report\n"
            "print(*sorted(name for name in sys.modules if name.startswith('worldmodels_nb.models')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["worldmodels_nb.models", "worldmodels_nb.models.base"]


def test_a_report_of_nothing_is_refused(tmp_path):
    with refused(RunError, "no run folder", "70_run_experiment"): write_report(tmp_path / "nowhere")
    with refused(RunError, "no evaluation", "evaluate"):
        write_report(begin("mine", small(tmp_path)).folder.path)


def test_an_evaluation_of_another_version_is_refused_by_name(copied):
    change_evaluation(copied, lambda found: found.update(schema_version=1))
    with refused(RunError, "evaluation.json", '"evaluate"'): write_report(copied)


# ---------------------------------------------------------------- the verdict and the parts

def test_the_verdict_comes_first_and_calls_smoke_by_its_name(page):
    text = " ".join(page.text.split())
    assert "These numbers mean nothing: no stage was trained for more than 20 steps" in text
    order = [text.index(word) for word in ("Verdict", "mean nothing", "Contents", "Figure 1")]
    assert order == sorted(order)


def test_a_report_is_small_and_its_figures_are_there_for_print(smoke):
    folder = smoke.folder.path
    assert (folder / "report.html").stat().st_size < 3_000_000
    files = {path.suffix: {p.stem for p in (folder / "pictures").glob(f"*{path.suffix}")}
             for path in (folder / "pictures").iterdir()}
    assert files[".pdf"] and files[".pdf"] <= files[".png"]
    assert {"film_0", "rollout_ratios", "rollout_errors", "training_vjepa2_pretrain"} <= files[".pdf"]
    assert (folder / "pictures/film_0.pdf").read_bytes().startswith(b"%PDF")


def test_terms_are_explained_where_they_are_used(page):
    for term in ("RankMe", "LARP", "R²", "skill", "history", "ratio", "shuffled actions"):
        assert term in page.text
    assert [tag for tag, _ in page.tags].count("dl") >= 5


# ---------------------------------------------------------------- tables

def toy(value, model="", head="", kind="model", metric="position", horizon=4, unit="px", n=8):
    return dict(model=model, head=head, kind=kind, protocol="rollout", metric=metric, unit=unit, value=value,
                horizon=horizon, low=value - .1, high=value + .1, n=n, run="toy", env="toy", seed=0)


def test_what_models_share_has_one_column_and_what_is_theirs_has_none():
    rows = [toy(1., "a"), toy(2., "b"), toy(5., "", "persistence", "baseline")]
    rows += [toy(6., "", "oracle", "reference")]
    rows += [toy(3., "a", "untrained", "baseline"), toy(4., "b", "untrained", "baseline")]
    page = Page(html := table_html(rows, "rollout"))
    heads = [about.get("class") for tag, about in page.tags if tag == "th"][1:5]
    assert heads == ["model", "model", "baseline", "reference"]
    words = page.text.split()
    assert words.count("persistence") == words.count("oracle") == 1 and "untrained," in words
    assert [html.count(f"<td>{short_number(row['value'])}<br>") for row in rows] == [1] * 6


def test_each_head_has_lines_of_its_own_beside_the_shared_baseline():
    rows = [toy(1.1, "a", "larp"), toy(2.2, "a", "reward_mlp"), toy(5.5, "", "mean_reward", "baseline")]
    words = Page(table_html(rows, "rollout", {"position": "error"})).text.split()
    assert "LARP:" in words and "MLP:" in words and words.count("5.50") == 2


def test_only_what_is_asked_for_is_in_a_table_and_a_pattern_names_the_rest():
    rows = [toy(.5, "a", metric="r2 door"), toy(.6, "a", metric="other")]
    text = Page(table_html(rows, "rollout", {"r2 *": "R² of {}"})).text
    assert "R² of door" in text and "other" not in text
    assert table_html(rows, "probe") == table_html([], "rollout") == ""


@pytest.mark.parametrize("horizons, left", [
    ([1, 2, 4, 8, 16], [1, 4, 16]), ([1, 2, 3, 4, 5, 6, 7, 8], [1, 3, 8]), ([5], [5]), ([], []),
    ([2, 2, 1], [1, 2])])
def test_horizons_that_are_left_are_spread_and_keep_the_ends(horizons, left):
    assert few_horizons(horizons, 3) == left


@pytest.mark.parametrize("value, said", [
    (None, "–"), (float("nan"), "–"), (float("inf"), "–"), (.5, "0.500"), (12.0, "12"), (12.34, "12.3"),
    (123.4, "123"), (1234.5, "1,234"), (5e6, "5 M"), (1.234e9, "1.23 G"), (-.00123, "-0.00123")])
def test_numbers_are_short(value, said):
    assert short_number(value) == said


# ---------------------------------------------------------------- figures

def test_no_panel_has_more_lines_than_can_be_told_apart():
    rows = [toy(1. + k, f"model {k}", metric=metric, horizon=h)
            for k in range(5) for metric in ("position", "position_ratio") for h in (1, 4)]
    rows += [toy(9., "", f"baseline {k}", "baseline", horizon=h) for k in range(4) for h in (1, 4)]
    for figure in horizon_figures(rows)["rollout"].values():
        for ax in figure.axes:
            assert len([line for line in ax.lines if line.get_label()[0] != "_"]) <= LINES


def test_ratios_stand_on_a_logarithmic_axis_and_errors_begin_at_zero():
    given = (("position", 3.), ("position_ratio", .5))
    rows = [toy(value, "a", metric=metric, horizon=h) for metric, value in given for h in (1, 4)]
    rows += [toy(9., "", "persistence", "baseline", horizon=h) for h in (1, 4)]
    drawn = horizon_figures(rows)["rollout"]
    assert {ax.get_yscale() for ax in drawn["ratios"].axes} == {"log"}
    assert {ax.get_ylim()[0] for ax in drawn["errors"].axes} == {0}


@pytest.mark.parametrize("runs, lines", [(1, 2), (3, 6), (4, 4)])
def test_of_many_runs_only_validation_is_drawn(runs, lines):
    told = [{"step": k, "train/total": 2 / k, "val/total": 3 / k} for k in range(1, 5)]
    figure = plot_terms({f"run {k}": told for k in range(runs)}, ["total"])
    assert len(figure.axes[0].lines) == lines


def test_a_film_shows_the_part_that_moves_and_how_far_rows_are_from_the_truth():
    truth = np.zeros((5, 3, 32, 32), np.uint8)
    for t in range(5): truth[t, :, 4:7, 2 + t:5 + t] = 200
    rows, columns = moving_part(truth)
    assert rows.start <= 4 and rows.stop >= 7 and columns.start <= 2 and columns.stop >= 9
    assert rows.stop - rows.start == columns.stop - columns.start < 32
    late = np.concatenate([truth[:1], truth[:-1]])
    off = signed_difference(late, truth)
    assert (off[0] == 1).all() and off[1, :, 4, 2].tolist() > off[1, :, 4, 5].tolist()
    assert off[1, 0, 4, 2] == 1 > off[1, 2, 4, 2] and off[1, 2, 4, 5] == 1 > off[1, 0, 4, 5], "red, and blue"
    assert len(film_figure({"truth": truth, "late": late}).axes) == 2


def test_where_nothing_moves_all_of_the_frame_is_shown():
    assert moving_part(np.zeros((3, 1, 8, 12), np.uint8)) == (slice(0, 8), slice(0, 12))
