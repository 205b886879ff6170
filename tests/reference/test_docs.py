"How notebooks become pages: names, links, tables, outputs; and what nbdev and Quarto are told."

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from worldmodels_nb.reference.docs import (
    PLOTLY,
    WIDGET,
    Book,
    Links,
    defined_names,
    page_output,
    parameter_table,
    rewrite,
)
from worldmodels_nb.reference.site import build_site, mathml, process, read_decades
from worldmodels_nb.settings import repo_root

ROOT = repo_root(Path(__file__).parent)


def chapter(title, *codes, module="", prose="Prose."):
    cells = [new_markdown_cell(f"# {title}\n> A chapter."), new_markdown_cell(prose)]
    if module: cells.append(new_code_cell(f"#| default_exp {module}"))
    return new_notebook(cells=[*cells, *map(new_code_cell, codes)])


HELPER = """#| export
def helper(
    n: int = 3,  # how many
) -> int:  # twice as many
    "Doubles."
    return 2 * n"""


@pytest.fixture
def root(tmp_path):
    "A repository of three chapters."
    notebooks = {
        "index": chapter("The front", prose="See [`10_tools`](1_nn/10_tools.ipynb)."),
        "1_nn/10_tools": chapter("tools", HELPER, "#| hide\nassert helper() == 6", module="nn.tools",
                                 prose="A `helper`, and [the file](../../settings.ini)."),
        "1_nn/11_users": chapter("users", "1 + 1", prose="Uses `helper` of [`10_tools`](10_tools.ipynb)."),
    }
    for name, notebook in notebooks.items():
        path = tmp_path / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    for name in ("pyproject.toml", "settings.ini", "nbs/_quarto.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def links(root):
    book = Book(root)
    return Links(book, book.by_path["1_nn/11_users.ipynb"])


def test_what_a_cell_defines():
    source = "A = 1\nb: int = 2\ndef f(): ...\nclass C:\n    def m(self): ...\n@patch\ndef p(self: C): ..."
    assert sorted(defined_names(source)) == ["A", "C", "C.m", "C.p", "b", "f"]
    assert defined_names(source)["C.m"] == 5


def test_links_lead_to_pages_files_and_definitions(links):
    assert rewrite("`helper()`", links) == "[`helper()`](tools.html#helper)"
    assert rewrite("[a](10_tools.ipynb)", links) == "[a](tools.html)"
    assert rewrite("[a](../../settings.ini)", links) == "[a](../source/settings.ini.html)"
    assert rewrite("[a](https://a.org) [b](#a-b)", links) == "[a](https://a.org) [b](#a-b)"
    assert links.files == {"settings.ini"}


def test_a_link_that_leads_nowhere_is_plain_and_code_is_left_alone(links):
    assert rewrite("[gone](gone.ipynb), [up](../../../x)", links) == "gone, up"
    for kept in ("```\n`helper` [a](10_tools.ipynb)\n```", "# `helper`\n[`helper`](https://a.org)"):
        assert rewrite(kept, links) == kept
    assert rewrite('<a href="/files/x">x</a>', links).count("href") == 0


def test_a_name_that_two_chapters_define_is_no_link(root):
    other = chapter("more", HELPER, module="nn.more")
    nbformat.write(other, root / "nbs" / "1_nn" / "12_more.ipynb")
    book = Book(root)
    assert book.find("helper", "1_nn/users") is None
    assert book.find("helper", "1_nn/more") == "more.html#helper"


def test_a_table_has_types_defaults_and_comments(links):
    table = parameter_table(ast.parse(HELPER).body[0], HELPER, links)
    assert "| `n` | `int` | `3` | how many |" in table
    assert "| returns | `int` |  | twice as many |" in table


def test_a_dataclass_shows_its_fields_and_pipes_do_not_split_a_cell(links):
    source = "@dataclass\nclass Box:\n    width: int | None = None  # a|b\n    _own: int = 0"
    table = parameter_table(ast.parse(source).body[0], source, links)
    assert r"| `width` | `int \| None` | `None` | a\|b |" in table and "_own" not in table


def test_figures_are_live_and_widgets_need_a_picture(links):
    stored = {PLOTLY: {"data": [], "layout": {"title": "</script>"}}}
    figure = page_output(dict(output_type="display_data", data=stored), links)
    assert "plotly-figure" in figure["data"]["text/html"] and r"<\/script>" in figure["data"]["text/html"]
    assert page_output(dict(data={WIDGET: {}, "text/plain": "Box()"}), links) is None
    assert page_output(dict(data={WIDGET: {}, "image/png": "x"}), links)["data"] == {"image/png": "x"}


def test_a_formula_that_cannot_be_converted_is_shown_as_written():
    assert "<mfrac>" in mathml(r"\frac12", block=True)
    assert "<math" in mathml(r"\left(a") or "<code>" in mathml(r"\left(a")


def test_hidden_cells_are_left_out_and_a_failing_notebook_says_why(root, tmp_path):
    path = root / "nbs" / "1_nn" / "10_tools.ipynb"
    assert process(path, tmp_path / "made.ipynb") == ""
    assert "assert helper" not in (tmp_path / "made.ipynb").read_text(encoding="utf-8")
    nbformat.write(chapter("bad", "#| export\nA = missing", module="nn.bad"), path)
    assert "missing" in process(path, tmp_path / "made.ipynb")
    assert not (tmp_path / "made.ipynb").exists()


def test_the_site_follows_its_notebooks(root):
    pytest.importorskip("sphinx")
    (root / "nbs" / "1_nn" / "12_broken.ipynb").write_text("{", encoding="utf-8")
    bad = chapter("bad", "#| export\nA = missing", module="nn.bad")
    nbformat.write(bad, root / "nbs" / "1_nn" / "13_bad.ipynb")
    before = sorted(root.glob("nbs/**/*"))
    named = [fault.partition(":")[0] for fault in build_site(root, workers=0)]
    assert named == ["nbs/1_nn/12_broken.ipynb", "nbs/1_nn/13_bad.ipynb"]
    made = root / "_docs"
    text = (made / "1_nn" / "tools.html").read_text(encoding="utf-8")
    assert "Doubles." in text and "how many" in text and "assert helper" not in text
    assert "could not be built" in (made / "1_nn" / "bad.html").read_text(encoding="utf-8")
    assert sorted(root.glob("nbs/**/*")) == before

    for name in ("12_broken", "13_bad"): (root / "nbs" / "1_nn" / f"{name}.ipynb").unlink()
    edited = root / "nbs" / "1_nn" / "10_tools.ipynb"
    nbformat.write(chapter("tools", HELPER.replace("Doubles.", "Twice."), module="nn.tools"), edited)
    later = (root / "_proc/docs/notebooks/1_nn/10_tools.ipynb").stat().st_mtime + 1
    os.utime(edited, (later, later))
    assert build_site(root, workers=0) == []
    assert "Twice." in (made / "1_nn" / "tools.html").read_text(encoding="utf-8")
    assert not (made / "1_nn" / "bad.html").exists()


def test_quarto_is_told_of_every_decade():
    folders = {path.parent.name for path in (ROOT / "nbs").glob("*/*.ipynb")}
    assert set(read_decades(ROOT)) == folders
    quarto = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    assert quarto["metadata-files"] == ["nbdev.yml"] and quarto["project"]["type"] == "website"


FAKE = """#!{python}
import json, sys
from pathlib import Path
words = sys.argv[1:]
pages = sorted(str(p.resolve()) for p in Path(".").rglob("*.ipynb"))
config = dict(project=dict(type="website"), website={{}})
if words[0] == "inspect":
    print(json.dumps(dict(config=config, files=dict(input=pages), fileInformation={{}})))
else:
    out = Path(words[words.index("--output-dir") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text("by quarto")
"""


def test_nbdev_docs_leaves_the_notebooks_folder_as_it_is(root, tmp_path):
    "With Quarto's commands imitated: what nbdev writes for it is what is committed."
    shutil.copy(ROOT / "nbs" / "nbdev.yml", root / "nbs")
    (root / "worldmodels_nb").mkdir()
    (root / "bin").mkdir()
    (root / "bin" / "quarto").write_text(FAKE.format(python=sys.executable), encoding="utf-8")
    (root / "bin" / "quarto").chmod(0o755)
    before = {path: path.read_bytes() for path in (root / "nbs").rglob("*") if path.is_file()}
    path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([Path(sys.executable).parent / "nbdev-docs"], cwd=root, check=True, capture_output=True,
                   env=os.environ | {"PATH": path})
    assert {path: path.read_bytes() for path in (root / "nbs").rglob("*") if path.is_file()} == before
    assert (root / "_docs" / "index.html").read_text(encoding="utf-8") == "by quarto"
