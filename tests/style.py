"How densely the book is written. `make style` prints it; tests/hygiene/test_style.py holds the marks."
import ast
import json
import re
import statistics
from dataclasses import dataclass, field

WIDTH = 110
GENERATED = re.compile(r"^# %% (?!auto)", re.M)  # nbdev's header stands before the first cell


def is_exported(source):
    return re.search(r"^#\|\s*exporti?\b", source, re.M) is not None


def is_hidden(source):
    return re.search(r"^#\|\s*hide\b", source, re.M) is not None


def code_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def own_lines(path):
    "The lines of a module that somebody wrote: nbdev's header is left out."
    text = path.read_text(encoding="utf-8")
    begin = GENERATED.search(text)
    return text[begin.start():].splitlines() if begin else text.splitlines()


@dataclass
class Figures:
    "What was counted."
    wide: dict[str, int] = field(default_factory=dict)          # file → lines over 110
    lines: int = 0                                              # of package and tests
    hidden: dict[str, list[int]] = field(default_factory=dict)  # notebook → lines of each hidden cell
    open_hidden: list[str] = field(default_factory=list)        # hidden cells that Lab does not collapse
    exported: list[int] = field(default_factory=list)           # lines of each exported cell
    functions: dict[str, int] = field(default_factory=dict)     # function → lines, the long ones
    modules: dict[str, int] = field(default_factory=dict)       # module → lines
    words: dict[str, int] = field(default_factory=dict)         # notebook → words of prose

    @property
    def hidden_total(self):
        return sum(map(sum, self.hidden.values()))


def count_cell(figures, name, index, cell):
    source = "".join(cell["source"])
    lines = code_lines(source)
    if is_hidden(source):
        figures.hidden.setdefault(name, []).append(len(lines))
        collapsed = cell["metadata"].get("jupyter", {}).get("source_hidden")
        if not collapsed: figures.open_hidden.append(f"{name} {index}")
    if not is_exported(source): return
    figures.exported.append(len(lines))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef): continue
        figures.functions[f"{name} {node.name}"] = node.end_lineno - node.lineno + 1


def count(root):
    "All figures of a repository."
    figures = Figures()
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = [cell for cell in cells if cell["cell_type"] == "markdown"]
        figures.words[path.stem] = sum(len("".join(cell["source"]).split()) for cell in prose)
        for index, cell in enumerate(cells):
            if cell["cell_type"] == "code": count_cell(figures, path.stem, index, cell)
    files = [path for path in (root / "worldmodels_nb").rglob("*.py") if path.name != "_modidx.py"]
    for path in [*files, *(root / "tests").rglob("*.py")]:
        name, lines = path.relative_to(root).as_posix(), own_lines(path)
        figures.lines += len(lines)
        if wide := sum(len(line) > WIDTH for line in lines): figures.wide[name] = wide
        if path in files: figures.modules[name] = len(path.read_text(encoding="utf-8").splitlines())
    return figures


def main():
    from worldmodels_nb.settings import Settings, repo_root
    root = repo_root()
    f = count(root)
    cells = [lines for own in f.hidden.values() for lines in own]
    longest = max(f.modules, key=f.modules.get)
    others = {name: lines for name, lines in f.modules.items() if not name.endswith("/settings.py")}
    print(f"lines over {WIDTH} in package and tests: {sum(f.wide.values())} of {f.lines}", f.wide or "")
    print(f"hidden code lines: {f.hidden_total}, at most {max(cells, default=0)} a cell, "
          f"{len(f.open_hidden)} cells not collapsed")
    functions = f.functions.values()
    print(f"functions: at most {max(functions)} lines, {statistics.median(functions):g} in the median")
    print(f"exported cells: at most {max(f.exported)} lines, {statistics.median(f.exported):g} in the median")
    print(f"modules: at most {max(others.values())} lines; {longest} has {f.modules[longest]}")
    ini = (root / "settings.ini").read_text(encoding="utf-8").splitlines()
    print(f"settings: {len(Settings().flat())} keys; settings.ini {len(ini)} lines")
    print(f"prose: {sum(f.words.values())} words")


if __name__ == "__main__": main()
