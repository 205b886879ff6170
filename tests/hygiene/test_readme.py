"What README says is so: of commands, chapters and presets by the files, of results by a small run's results."
import csv
import json
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image
from run_tools import run_in
from typer.main import get_command

from worldmodels_nb.models.base import build_model
from worldmodels_nb.runs.cli import app
from worldmodels_nb.runs.facts import read_rows
from worldmodels_nb.runs.reopen import SAMPLE_RUN
from worldmodels_nb.settings import load_settings, repo_root

ROOT = repo_root(Path(__file__).parent)
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHAPTERS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:ini|ipynb|py|md|png|gif|txt|toml)"


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w ]+):", makefile, re.M) for name in line.split()}
    named = set(re.findall(r"(?:`|^)make (\w+)", README + CONTRIBUTING, re.M))
    assert named and named - targets == set()


def test_commands_of_the_program_are_there():
    named = set(re.findall(r"(?:`|^)worldmodels ([a-z]\w+)", README, re.M))
    assert named - set(get_command(app).commands) == set() and len(named) > 5


def test_files_that_are_named_exist():
    named = re.findall(rf"[`(]({FILE})[`)]", README + CONTRIBUTING)
    places = (ROOT, ROOT / "worldmodels_nb")
    assert len(named) > 40
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_every_chapter_is_in_the_map():
    linked = re.findall(r"\]\(nbs/(\S+\.ipynb)\)", README.split("## The whole map")[1])
    assert linked == [path.relative_to(ROOT / "nbs").as_posix() for path in CHAPTERS]


def test_pictures_are_there_small_and_described():
    pictures = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", README)
    assert {path for _, path in pictures} == {f"figures/{path.name}" for path in (ROOT / "figures").iterdir()}
    assert [path for text, path in pictures if len(text) < 40] == []
    sizes = {path: (ROOT / path).stat().st_size for _, path in pictures}
    assert {path: size for path, size in sizes.items() if size > 400_000} == {}
    with Image.open(ROOT / "figures/rollouts.gif") as film:
        assert film.n_frames > 8 and film.info["loop"] == 0


def cell_with(path, text):
    cells = nbformat.read(ROOT / "nbs" / path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code" and text in cell.source)


def test_front_page_and_start_page_draw_the_models_in_the_same_words():
    rows = [cell_with(path, "rows = {").split("}")[0] for path in ("index.ipynb", "8_explore/80_start.ipynb")]
    assert rows[0] == rows[1]


def words(row, digits=2):
    "As findings write a row."
    value, low, high = (f"{row[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} … {high})"


def test_findings_are_of_the_rows_that_are_there():
    path = ROOT / "nbs/9_reference/97_what_we_found.ipynb"
    cells = nbformat.read(path, as_version=4).cells
    shown = json.dumps([cell.get("outputs") for cell in cells], ensure_ascii=False)
    rows = [row for row in read_rows(ROOT / SAMPLE_RUN) if row["kind"] == "model"]
    wanted = [words(row) for row in rows if (row["metric"], row["horizon"]) == ("position_ratio", 8)]
    every = {(r["model"], r["head"]): r["value"] for r in read_rows(ROOT / SAMPLE_RUN)
             if (r["metric"], r["horizon"]) == ("latent", 1)}
    wanted += [f"{value / every[model, 'persistence']:.2f} in its latents"
               for (model, head), value in every.items() if not head]
    wanted += [words(row, 3) for row in rows if (row["metric"], row["model"]) == ("r2 position", "vjepa2")]
    with open(ROOT / "data/study/collapse.csv", newline="", encoding="utf-8") as f:
        spreads = [float(row["value"]) for row in csv.DictReader(f) if row["metric"] == "std_mean"]
    wanted.append(f"spread {min(spreads):.3f} …")
    assert len(wanted) == 10 and [text for text in wanted if text not in shown] == []


def frames_seen(settings, name, spec):
    "Frames that a model looks at in training, all stages added up."
    stages = build_model(name, settings, spec).stages()
    recipes = [(settings.recipe(stage.section), stage.window) for stage in stages]
    return sum(recipe.steps * recipe.batch_size * (window + 1) for recipe, window in recipes)


@pytest.mark.parametrize("preset", ["demo", "study", None])
def test_models_see_as_many_frames_in_other_numbers_of_steps(sample, preset):
    settings = load_settings(preset=preset)
    assert len({frames_seen(settings, name, sample.spec) for name in settings.run.models}) == 1
    first, second = settings.recipe("vjepa2.pretrain"), settings.recipe("vjepa2.action")
    assert first.steps + second.steps > settings.train.steps
    assert max(first.batch_size, second.batch_size) < settings.train.batch_size


def test_baselines_stand_where_readme_says(tmp_path):
    rows = read_rows(run_in(tmp_path))
    found = {row["protocol"]: set() for row in rows}
    for row in rows:
        if row["kind"] == "baseline": found[row["protocol"]].add(row["head"])
    rollout = {"persistence", "shuffled_actions", "mean_frame", "mean_position"}
    assert found == {"rollout": rollout, "probe": {"untrained", "raw_pixels"},
                     "reward": {"mean_reward", "last_reward"}, "cost": set(), "collapse": set()}
    assert {"steps", "frames_seen", "seconds"} <= {row["metric"] for row in rows if row["protocol"] == "cost"}


def test_no_timing_is_typed_by_hand():
    paths = [ROOT / "nbs" / "index.ipynb", *(ROOT / "nbs").glob("[89]_*/*.ipynb")]
    cells = [cell for path in paths for cell in nbformat.read(path, as_version=4).cells]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    word = (r"\b(?:(?:some|few|\d+) (?:minute|second|hour)s?|an? (?:minute|hour)|(?:half|under) a second|"
            r"in minutes|takes minutes)\b")   # "a second" is mostly the next after the first
    assert [text for text in [*prose, CONTRIBUTING] if re.search(word, text, re.I)] == []
