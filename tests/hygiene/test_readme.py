"What README says is so: of commands, chapters and presets by the files, of results by a small run's results."
import re
from pathlib import Path

import nbformat
import pytest
from run_tools import run_in

from worldmodels_nb.models.base import build_model
from worldmodels_nb.runs.report import read_rows
from worldmodels_nb.settings import load_settings, repo_root

ROOT = repo_root(Path(__file__).parent)
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHAPTERS = sorted((ROOT / "nbs").glob("*/*.ipynb"))
FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:ini|ipynb|py|md|png|txt|toml)"


def test_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {name for line in re.findall(r"^([\w ]+):", makefile, re.M) for name in line.split()}
    named = set(re.findall(r"(?:`|^)make (\w+)", README + CONTRIBUTING, re.M))
    assert named and named - targets == set()


def test_files_that_are_named_exist():
    named = re.findall(rf"[`(]({FILE})[`)]", README + CONTRIBUTING)
    places = (ROOT, ROOT / "worldmodels_nb")
    assert len(named) > 40
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_every_chapter_is_in_the_list_of_its_folder():
    rows = [row.split(" | ") for row in README.splitlines() if row.startswith("| ")]
    linked = [path for row in rows for path in re.findall(r"\]\(nbs/(\S+\.ipynb)\)", " ".join(row))]
    assert linked == [path.relative_to(ROOT / "nbs").as_posix() for path in CHAPTERS]


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
    assert found == {"rollout": {"persistence", "shuffled_actions", "mean_frame"}, "probe": {"untrained"},
                     "reward": {"mean_reward", "last_reward"}, "cost": set(), "collapse": set()}
    assert {"steps", "frames_seen", "seconds"} <= {row["metric"] for row in rows if row["protocol"] == "cost"}


def test_no_timing_is_typed_by_hand():
    paths = [ROOT / "nbs" / "index.ipynb", *(ROOT / "nbs").glob("[89]_*/*.ipynb")]
    cells = [cell for path in paths for cell in nbformat.read(path, as_version=4).cells]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    word = r"\b(?:(?:some|few|\d+|a|half an?|under an?) (?:minute|second|hour)s?|in minutes|takes minutes)\b"
    assert [text for text in [*prose, CONTRIBUTING] if re.search(word, text, re.I)] == []
