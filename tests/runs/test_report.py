"The report: one file that loads nothing, names all it shows, and can be made by somebody who has no model."
import base64
import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from run_tools import Page, begin, bytes_of, evaluation_of, read_csv, refused, run_in, small

from worldmodels_nb.eval.results import label
from worldmodels_nb.runs.folder import RunError, read_models
from worldmodels_nb.runs.report import write_report
from worldmodels_nb.training.parts import read_result


@pytest.fixture(scope="module")
def page(smoke):
    return Page((smoke.folder.path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def copied(trained, tmp_path):
    "A copy of a finished run's folder, to change."
    return shutil.copytree(trained.folder.path, tmp_path / "copied")


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
    assert [name for name in names if name in ("href", "srcset", "background") or name.startswith("on")] == []
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) >= 9
    for source in sources:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert content.startswith(b"\x89PNG")
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_report_names_every_model_baseline_and_reference(smoke, page, comparison):
    assert [row for row in comparison if label(row) not in page.text] == []
    said = json.loads((smoke.folder.path / "provenance.json").read_text())
    words = ("first", "600 frames", "24 episodes", "20 steps", said["dataset_hash"], "checkpoint_every = 10")
    assert [word for word in words if word not in page.text] == []


def test_baselines_and_references_are_set_apart_from_models(page, comparison):
    "Heads of columns have the kind as their class."
    classes = {attributes.get("class") for tag, attributes in page.tags if tag == "th"}
    assert classes - {None} == {row["kind"] for row in comparison}


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
    assert page.text.count(HOSTILE) >= 3


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
def test_a_metric_is_no_path(metric, copied):
    def rename(found):
        for row in found["rows"]:
            if row["metric"] == "latent": row.update(metric=metric)
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
