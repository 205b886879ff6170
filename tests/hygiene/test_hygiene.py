"The repository keeps its own promises: package in sync, notebooks clean and small, README fresh, nothing unsafe."
import re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest
from worldmodels_nb.settings import Settings, _read_ini, load_settings, repo_root

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, to run its commands on."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "worldmodels_nb"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, folder / name)
    return folder


def sources(folder):
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in (folder / "worldmodels_nb").rglob("*.py")}


def test_package_is_what_the_notebooks_export(copy):
    subprocess.run([BIN / "nbdev-export"], cwd=copy, check=True)
    assert sources(copy) == sources(ROOT)


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    unclean = [p.name for p in NOTEBOOKS if p.read_text(encoding="utf-8") != (copy / "nbs" / p.name).read_text(encoding="utf-8")]
    assert unclean == []


def test_readme_is_what_index_says(tmp_path):
    made = tmp_path / "README.md"
    subprocess.run(["make", "--silent", "readme", f"README={made}", f"BIN={BIN}", "--old-file=.venv/core"], cwd=ROOT, check=True)
    assert made.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8"), "README.md is stale: make readme"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_a_chapter(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.match(r"# .+\n+> .+", notebook.cells[0].source), "first cell: '# title' and '> what it is for'"
    assert path.stat().st_size <= 500_000
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    exported = [m[1] for c in notebook.cells if (m := re.search(r"#\| default_exp (\S+)", c.source))]
    assert exported in ([], [re.sub(r"^\d+_", "", path.stem)])
    assert not [c for c in notebook.cells if "nbdev_export()" in c.source]


def test_chapters_import_only_lower_numbers():
    number = {re.sub(r"^\d+_", "", p.stem): int(p.stem[:2]) for p in NOTEBOOKS if p.stem[0].isdigit()}
    wrong = []
    for path in NOTEBOOKS:
        if not path.stem[0].isdigit(): continue
        code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" and re.search(r"#\|\s*exporti?\b", c.source))
        for module in re.findall(r"^\s*from worldmodels_nb\.([\w.]+) import", code, re.M):
            if module in number and number[module] >= int(path.stem[:2]): wrong.append((path.stem, module))
    assert wrong == []


def test_parameters_cells_are_tagged():
    for name in ("70_run_experiment", "71_run_report"):
        cells = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells
        assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1


def test_settings_file_names_every_knob_and_every_preset_loads():
    raw = _read_ini(ROOT / "settings.ini")
    for section, field in Settings.model_fields.items():
        assert set(raw[section]) == set(field.annotation.model_fields), section
    for preset in ("smoke", "demo", "study", "atari", "seed"): load_settings(ROOT / "settings.ini", preset)


def test_seed_preset_holds_the_seed_projects_defaults():
    s = load_settings(ROOT / "settings.ini", "seed")
    assert (s.env.id, s.env.color, s.env.size, s.model.frame_stack, s.model.latent_dim, s.model.patch_size) == ("ALE/Assault-v5", "grey", 64, 4, 64, 4)
    assert (s.collect.policy, s.collect.episodes, s.collect.steps, s.data.validation_split) == ("ppo", 100, 300, 0.2)
    p = s.collect.ppo
    assert (p.n_envs, p.train_steps, p.n_steps, p.batch_size, p.n_epochs, p.gamma, p.gae_lambda, p.clip_range) == (10, 10_000_000, 128, 256, 5, 0.99, 0.95, 0.3)


def test_no_pickle_and_no_download():
    unsafe = re.compile(r"\bpickle\.loads?\(|allow_pickle\s*=\s*True|weights_only\s*=\s*False|urllib|requests\.get")
    assert [name for name, text in sources(ROOT).items() if unsafe.search(text)] == []


def test_importing_everything_is_quiet_and_offline():
    modules = [m for m in sorted(name.removesuffix(".py").replace("/", ".") for name in sources(ROOT)) if not m.endswith("_modidx")]
    code = ("import socket\ndef closed(*a, **k): raise OSError('no network at import')\nsocket.socket.connect = closed\n"
            + "\n".join(f"import {m.removesuffix('.__init__')}" for m in modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
