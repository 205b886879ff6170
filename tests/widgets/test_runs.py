"The table of runs without a browser: what it lists, what it shows of those selected, and what it says."
import json
import shutil

import pytest
from run_tools import Page, bytes_of

from worldmodels_nb.runs.folder import RunError
from worldmodels_nb.runs.reopen import find_run
from worldmodels_nb.settings import load_settings, repo_root, save_settings
from worldmodels_nb.widgets.runs import RunTable, headlines, run_lines, runs_html, unusual_settings


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    "The sample beside two copies of it: one with other settings, one that has not been evaluated."
    folder = tmp_path_factory.mktemp("runs")
    sample = find_run("sample").path
    for name in ("other", "young"): shutil.copytree(sample, folder / name)
    changed = load_settings(folder / "other/settings.ini", overrides={"train.steps": 77})
    save_settings(changed, folder / "other/settings.ini")
    (folder / "young/status.json").unlink()
    for path in (folder / "young/models").glob("*/evaluation.json"): path.unlink()
    return folder


@pytest.fixture
def table(where): return RunTable(["sample", "other"], where)


# ---------------------------------------------------------------- the list

def test_every_run_is_a_line_and_the_sample_the_last(where):
    lines = run_lines(where)
    assert {line["name"] for line in lines} == {"other", "young", "sample"} and lines[-1]["name"] == "sample"
    own = {line["name"]: line for line in lines}
    assert own["other"]["settings"] == ["train.steps = 77"] and own["sample"]["settings"] == []
    assert own["young"]["results"] == [] and own["young"]["status"] == "begun"
    assert own["sample"]["results"][-1] == "position ratio at 8"
    assert len(own["sample"]["results"]) == 5


def test_a_setting_is_unusual_where_most_have_another():
    differing = {"run.seed": dict(a=0, b=1, c=2), "train.steps": dict(a=5, b=5, c=6)}
    assert unusual_settings(differing, "a") == ["run.seed = 0"]
    assert unusual_settings(differing, "c") == ["run.seed = 2", "train.steps = 6"]


def test_a_headline_is_the_longest_horizon_that_is_not_too_long():
    row = dict(kind="model", model="m", metric="pixel_ratio")
    rows = [row | dict(horizon=h, value=h / 10) for h in (1, 4, 16)]
    assert headlines(rows) == ["m 0.400", "pixel ratio at 4"] and headlines([]) == []
    assert headlines([row | dict(horizon=4, value=None)]) == ["m –", "pixel ratio at 4"]


def test_a_damaged_run_is_listed_and_cannot_be_selected(where, tmp_path):
    shutil.copytree(where / "other", tmp_path / "bad")
    (tmp_path / "bad/models/jepa/evaluation.json").write_text("{")
    line = run_lines(tmp_path)[0]
    assert line["status"] == "damaged" and "evaluation.json" in line["note"]
    assert "evaluation.json" in Page(runs_html([line])).text
    assert RunTable(["bad"], tmp_path).controls["runs"].options == ("sample",)


def test_links_lead_to_files_that_are_there(where, tmp_path, monkeypatch):
    root = repo_root()
    monkeypatch.setattr("worldmodels_nb.widgets.runs.repo_root", lambda: tmp_path)
    shutil.copytree(where / "other", tmp_path / "data/runs/other")
    (tmp_path / "data/runs/other/report.html").write_text("a report")
    own = {line["name"]: line["links"] for line in run_lines(tmp_path / "data/runs", "../..")}
    assert own["other"] == {"report": "../../data/runs/other/report.html"} and own["sample"] == {}
    assert root != tmp_path


def test_what_files_say_is_text_and_no_markup(where, tmp_path):
    shutil.copytree(where / "other", tmp_path / "bad")
    status = dict(schema_version=1, status="failed", stages=[], error="<script>alert(1)</script>")
    (tmp_path / "bad/status.json").write_text(json.dumps(status))
    assert "<script" not in RunTable(["bad"], tmp_path).table.value


# ---------------------------------------------------------------- the view

def test_a_picture_depends_on_its_state_alone(depends_on_its_state_alone, where):
    depends_on_its_state_alone(lambda: RunTable(["sample", "other"], where))


@pytest.mark.parametrize(("name", "value"), [
    ("show", "film"), ("part", "vjepa2/action"), ("runs", ("other",))])
def test_a_control_redraws_the_picture_and_back(table, redraws_and_goes_back, name, value):
    redraws_and_goes_back(table, name, value)


def test_another_term_redraws_the_curves(table, redraws_and_goes_back):
    table.change(part="jepa")
    assert len(table.controls["terms"].options) > 1
    redraws_and_goes_back(table, "terms", table.controls["terms"].options[1])


def test_terms_are_those_of_the_model(table):
    table.change(part="vjepa2/action")
    assert "teacher_forcing" in " ".join(table.controls["terms"].options)


def test_what_does_not_apply_is_switched_off(table):
    assert table.controls["window"].disabled and not table.controls["terms"].disabled
    table.change(show="film")
    assert table.controls["terms"].disabled


def test_what_to_know_before_comparing_stands_below(table):
    text = Page(table.about.value).text
    assert "single runs" in text and "train.steps" in text and "77" in text


def test_the_text_of_the_picture_says_what_it_shows(table):
    assert table.image.alt.startswith("sample, other: training curves of encdec")
    table.change(show="film", part="jepa")
    assert "what jepa imagines" in table.image.alt


@pytest.mark.parametrize("change, word", [
    (dict(runs=()), "no run is selected"), (dict(runs=("young",), show="film"), "young")])
def test_what_cannot_be_shown_is_one_sentence_and_the_picture_stays(table, change, word):
    before = table.image.value
    for name, value in change.items(): table.controls[name].value = value
    assert word in table.message.value and "\n" not in table.message.value
    if not change["runs"]: assert table.image.value == before


def test_a_run_that_was_damaged_since_is_one_sentence(where, tmp_path):
    shutil.copytree(where / "other", tmp_path / "bad")
    table = RunTable(["sample"], tmp_path)
    (tmp_path / "bad/models/jepa/evaluation.npz").write_bytes(b"")
    table.controls["runs"].value = ["bad"]
    assert "evaluation.npz" in table.message.value


def test_a_selection_is_read_once(table, monkeypatch):
    def called(*_): raise AssertionError("read again")
    monkeypatch.setattr("worldmodels_nb.widgets.runs.compare", called)
    table.change(show="film", part="vjepa2/action")
    assert table.message.value == ""


def test_without_runs_of_ones_own_there_is_the_sample(tmp_path):
    table = RunTable(where=tmp_path / "nowhere")
    assert table.controls["runs"].options == ("sample",) and table.image.value


def test_looking_changes_nothing(where):
    before = bytes_of(where)
    RunTable(["other"], where).change(show="film")
    assert bytes_of(where) == before


def test_nothing_selected_is_refused_from_python_too(table):
    with pytest.raises(RunError, match="select"): table.compared([])
