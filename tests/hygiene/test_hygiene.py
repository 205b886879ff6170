"The repository keeps its promises: package in sync, notebooks clean and small, README fresh, nothing unsafe."
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from worldmodels_nb.settings import (
    Settings,
    _read_ini,
    load_settings,
    read_presets,
    repo_root,
    section_keys,
    sections,
)

ROOT = repo_root(Path(__file__).parent)
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent
DECADES = ("0_data", "1_nn", "2_training", "3_models", "4_eval", "5_runs", "6_widgets", "7_run", "8_explore",
           "9_reference")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what nbdev reads and writes, to run its commands on."
    folder = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "worldmodels_nb"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT / name, folder / name)
    return folder


def sources(folder):
    files = (folder / "worldmodels_nb").rglob("*.py")
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in files}


def cells_of(path, kind="code"):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_package_is_what_the_notebooks_export(copy):
    subprocess.run([BIN / "nbdev-export"], cwd=copy, check=True)
    made, kept = sources(copy), sources(ROOT)
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev-clean"], cwd=copy, check=True)
    cleaned = {p: (copy / p.relative_to(ROOT)).read_text(encoding="utf-8") for p in NOTEBOOKS}
    assert [p.name for p, text in cleaned.items() if p.read_text(encoding="utf-8") != text] == []


def test_readme_is_what_index_says(tmp_path):
    made = tmp_path / "README.md"
    command = ["make", "--silent", "readme", f"README={made}", f"BIN={BIN}", "--old-file=.venv/core"]
    subprocess.run(command, cwd=ROOT, check=True)
    fresh = made.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    assert fresh, "README.md is stale: make readme"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_a_chapter(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.match(r"# .+\n+> .+", notebook.cells[0].source), "first cell: '# title' and '> what it is for'"
    assert path.stat().st_size <= 300_000
    outputs = [output for cell in cells_of(path) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not [cell for cell in notebook.cells if "nbdev_export()" in cell.source]


def exports(path):
    return [m[1] for cell in cells_of(path) if (m := re.search(r"#\| default_exp (\S+)", cell.source))]


def test_folders_are_decades_and_modules_are_named_after_their_chapters():
    for path in NOTEBOOKS:
        if path.stem == "index": continue
        digit, package = path.parent.name.split("_", 1)
        assert path.parent.name in DECADES and re.match(rf"{digit}\d_", path.name), path
        stem = path.stem.split("_", 1)[1]
        own = [f"{package}.{stem}"]
        assert exports(path) in ([], own, [stem] if package == "data" else own), path


def test_chapters_import_only_lower_numbers():
    number = {module: path.stem for path in NOTEBOOKS for module in exports(path)}
    wrong = []
    for path in NOTEBOOKS:
        if not path.stem[0].isdigit(): continue
        code = "\n".join(c.source for c in cells_of(path) if re.search(r"#\|\s*exporti?\b", c.source))
        for module in re.findall(r"^\s*from worldmodels_nb\.([\w.]+) import", code, re.M):
            if module in number and number[module][:2] >= path.stem[:2]: wrong.append((path.stem, module))
    assert wrong == []


def imports_of(path):
    "Modules of ours that a module imports, with dots resolved."
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level] if node.level else ()
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from (f"{name}.{alias.name}" for alias in node.names)
            yield name


def graph():
    files = [p for p in (ROOT / "worldmodels_nb").rglob("*.py") if p.stem not in ("__init__", "_modidx")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}
    return {name: {m for m in imports_of(path) if m in modules} - {name} for name, path in modules.items()}


def test_the_import_graph_has_no_circle():
    edges, order = graph(), []
    left = dict(edges)
    while left:
        free = [name for name, needs in left.items() if not needs - set(order)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            order.append(name)
            del left[name]


def test_no_arrow_goes_up_the_decades():
    rank = {package.split("_", 1)[1]: int(package[0]) for package in DECADES}
    def decade(module): return rank.get(module.split(".")[1], 0)   # settings and viz are of the first
    assert [(a, b) for a, needs in graph().items() for b in needs if decade(b) > decade(a)] == []


def test_no_name_is_exported_twice():
    seen, twice = {}, []
    for name, text in sources(ROOT).items():
        if m := re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S):
            for exported in ast.literal_eval(m[1]):
                if exported in seen: twice.append((exported, seen[exported], name))
                seen[exported] = name
    assert twice == []


def test_every_chapter_that_is_named_exists_and_is_a_link():
    stems = {path.stem: path for path in NOTEBOOKS}
    wrong = []
    for path in NOTEBOOKS:
        prose = "\n".join(cell.source for cell in cells_of(path, "markdown"))
        prose = re.sub(r"```.*?```", "", prose, flags=re.S)
        for link, stem, target in re.findall(r"(\[?)`(\d\d_[a-z_0-9]+)`(?:\]\(([^)]*)\))?", prose):
            if stem not in stems: wrong.append((path.stem, stem, "is not there"))
            elif not link or (path.parent / target).resolve() != stems[stem]:
                wrong.append((path.stem, stem, target))
    assert wrong == []


def test_parameters_cells_are_tagged():
    for name in ("70_run_experiment", "71_run_report"):
        cells = cells_of(ROOT / "nbs" / "7_run" / f"{name}.ipynb")
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def test_the_settings_file_holds_what_is_known_at_its_default_and_every_preset_loads():
    raw, known = _read_ini(ROOT / "settings.ini"), sections()
    for name, values in raw.items():
        section = name.partition("/")[2] or name
        assert set(values) <= set(section_keys(known[section])), name
        assert None not in values.values() or "/" in name, f"null in [{name}] says nothing"
    assert load_settings(ROOT / "settings.ini") == Settings()
    presets = ["atari", "demo", "sample", "seed", "smoke", "study", "walls"]
    assert sorted(read_presets(ROOT / "settings.ini")) == presets
    for preset in read_presets(ROOT / "settings.ini"): load_settings(ROOT / "settings.ini", preset)


def test_seed_preset_holds_the_seed_projects_defaults():
    s = load_settings(ROOT / "settings.ini", "seed")
    assert (s.env.id, s.env.color, s.env.size) == ("ALE/Assault-v5", "grey", 64)
    assert (s.model.frame_stack, s.model.latent_dim, s.model.patch_size) == (4, 64, 4)
    assert (s.collect.policy, s.collect.episodes, s.collect.steps) == ("ppo", 100, 300)
    assert s.data.validation_split == 0.2
    p = s.collect.ppo
    assert (p.n_envs, p.train_steps, p.n_steps, p.batch_size, p.n_epochs) == (10, 10_000_000, 128, 256, 5)
    assert (p.gamma, p.gae_lambda, p.clip_range) == (0.99, 0.95, 0.3)


def test_stored_outputs_of_run_notebooks_name_the_models_they_claim():
    "The study's committed outputs come from the committed file: every model of that file is named in them."
    rows = (ROOT / "data" / "study" / "rewards.csv").read_text(encoding="utf-8").splitlines()
    column = rows[0].split(",").index("model")
    models = {row.split(",")[column] for row in rows[1:]} - {""}
    path = ROOT / "nbs" / "7_run" / "72_reward_study.ipynb"
    shown = json.dumps([cell.outputs for cell in cells_of(path)])
    assert models and [model for model in models if model not in shown] == []


def test_no_pickle_and_no_download():
    words = (r"\bpickle\.loads?\(", r"allow_pickle\s*=\s*True", r"weights_only\s*=\s*False",
             r"urllib\.request", r"requests\.get")
    unsafe = re.compile("|".join(words))
    assert [name for name, text in sources(ROOT).items() if unsafe.search(text)] == []


def test_importing_everything_is_quiet_and_offline():
    names = sorted(name.removesuffix(".py").replace("/", ".") for name in sources(ROOT))
    modules = [name.removesuffix(".__init__") for name in names if not name.endswith("_modidx")]
    code = ("import socket\ndef closed(*a, **k): raise OSError('no network at import')\n"
            "socket.socket.connect = closed\n" + "\n".join(f"import {name}" for name in modules))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
