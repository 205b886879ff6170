"One bar for three who may look on: a person in Lab, one at a terminal, and a file that keeps every word."
import io
import sys
from types import SimpleNamespace

import IPython
import pytest
from tqdm.notebook import tqdm as WidgetBar
from tqdm.std import tqdm as TextBar

from worldmodels_nb.data import progress
from worldmodels_nb.data.progress import LineBar, onlooker, progress_bar


class Screen(io.StringIO):
    "What is written to, and whether a person sees it."
    def __init__(self, person):
        super().__init__()
        self.person = person
    def isatty(self): return self.person


def kernel(**content):
    "A shell in a kernel, which answers this request."
    return SimpleNamespace(kernel=object(), get_parent=lambda: {"content": content})


SEEN = {  # shell, whether standard error is a terminal, who looks on
    "Lab": (kernel(code="1", allow_stdin=True), False, "live"),
    "a button in Lab": (kernel(comm_id="a"), False, "live"),
    "papermill": (kernel(code="1", allow_stdin=False), False, "log"),
    "papermill at a terminal": (kernel(code="1", allow_stdin=False), True, "log"),
    "IPython": (object(), True, "terminal"),
    "python": (None, True, "terminal"),
    "a pipe": (None, False, "log"),
}


@pytest.mark.parametrize("case", SEEN)
def test_who_looks_on(monkeypatch, case):
    shell, person, who = SEEN[case]
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(sys, "stderr", Screen(person))
    assert onlooker() == who


def test_without_a_standard_error_there_is_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert onlooker() == "log"


@pytest.mark.parametrize("who, kind", [("live", WidgetBar), ("terminal", TextBar), ("log", LineBar)])
def test_each_gets_a_bar_of_its_own_kind_that_counts(monkeypatch, capsys, who, kind):
    monkeypatch.setattr(progress, "onlooker", lambda: who)
    with progress_bar(range(9), "part", done=2) as bar: bar.update(3)
    assert type(bar) is kind and (bar.n, bar.total) == (5, 9)
    if who == "log": assert capsys.readouterr().err.startswith("part: step 5 of 9 in 00:00, ")


def test_without_a_label_nothing_is_seen(monkeypatch, capsys):
    for who in ("live", "terminal", "log"):
        monkeypatch.setattr(progress, "onlooker", lambda who=who: who)
        assert list(progress_bar(range(4), "")) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end():
    now, log = [0.0], io.StringIO()
    bar = progress_bar(range(1000), "jepa, 3 of 4", file=log)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = 0.0
    for _ in range(1000):
        now[0] += .05
        bar.update()
    bar.close()
    bar.close()
    lines = log.getvalue().splitlines()
    assert [line.split(" in ")[0].split(": ")[1] for line in lines[-1:]] == ["step 1000 of 1000"]
    assert len(lines) == 4 and all("jepa, 3 of 4: " in line for line in lines)


def test_of_nothing_done_there_is_nothing_to_say():
    log = io.StringIO()
    progress_bar(range(5), "again", done=5, file=log).close()
    assert log.getvalue() == ""
