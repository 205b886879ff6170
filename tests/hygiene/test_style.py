"Density, as marks: one thought a line, cells that fit a screen, little that is hidden."
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from style import count

from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)


@pytest.fixture(scope="module")
def figures():
    return count(ROOT)


def test_no_line_is_over_110(figures):
    assert figures.wide == {}


def test_little_is_hidden_and_what_is_is_collapsed(figures):
    assert [(name, lines) for name, lines in figures.hidden.items() if max(lines) > 4] == []
    assert figures.open_hidden == [] and figures.hidden_total <= 350


def test_functions_fit_in_a_head(figures):
    assert {name: lines for name, lines in figures.functions.items() if lines > 30} == {}


def test_exported_cells_fit_a_screen(figures):
    assert max(figures.exported) <= 40 and statistics.median(figures.exported) <= 14


def test_modules_are_short(figures):
    long = {name for name, lines in figures.modules.items() if lines > 350}
    assert long <= {"worldmodels_nb/settings.py"}
    assert {name for name, lines in figures.modules.items() if "/runs/" in name and lines > 300} == set()


def test_settings_can_be_read_in_one_sitting():
    assert len((ROOT / "settings.ini").read_text(encoding="utf-8").splitlines()) <= 330


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "worldmodels_nb", "tests"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
