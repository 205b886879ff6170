"The site that `make docs` builds, in a real browser: every page, every link, search, mathematics, figures."

import functools
import html
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser_tools import NEEDS, ROOT

from worldmodels_nb.reference.site import build_site

pytestmark = NEEDS
PHONE, DESK = dict(width=390, height=844), dict(width=1440, height=900)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words): pass


@pytest.fixture(scope="module")
def folder():
    "The site, built where `make docs` builds it; what has not changed since is not built again."
    pytest.importorskip("sphinx", reason="no sphinx: pip install .[docs]")
    assert build_site(ROOT) == []
    return ROOT / "_docs"


@pytest.fixture(scope="module")
def site(folder):
    "Its address, on loopback."
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def pages_of(folder):
    "Page → its text; static files are no pages."
    paths = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def is_chapter(path, folder):
    return path.relative_to(folder).parts[0] not in ("source", "search.html", "genindex.html")


def broken(path, link, places):
    "Whether a link of a page leads to no file, or to no place in it."
    if re.match(r"(https?|mailto|data|javascript):", link) or link == "#": return False
    target, _, anchor = html.unescape(link).partition("#")
    file = (path.parent / target.partition("?")[0]).resolve() if target else path
    if not file.is_file(): return True
    return bool(anchor) and file in places and anchor not in places[file]


def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(folder):
    texts = pages_of(folder)
    places = {path: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for path, text in texts.items()}
    wrong = []
    for path, text in texts.items():
        text = re.sub(r"<script\b.*?</script>", lambda m: m[0].partition(">")[0], text, flags=re.S)
        links = re.findall(r'<[a-z][^<>]*?\b(?:href|src)="([^"]*)"', text)
        name = path.relative_to(folder).as_posix()
        wrong += [(name, link) for link in sorted(set(links)) if broken(path, link, places)]
        loaded = re.findall(r'<(?:script|link|img|video|iframe)\b[^<>]*?(?:href|src)="(https?:[^"]*)"', text)
        wrong += [(name, link) for link in loaded if "canonical" not in link]
    assert wrong == []


def test_every_chapter_has_a_page_and_a_place_in_the_sidebar(folder):
    from nbdev.config import nbpath2html

    chapters = [p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb")
                if ".ipynb_checkpoints" not in p.parts]
    index = (folder / "index.html").read_text(encoding="utf-8")
    pages = [nbpath2html(path).as_posix() for path in chapters]
    assert [page for page in pages if not (folder / page).is_file()] == []
    assert [page for page in pages if page != "index.html" and f'href="{page}"' not in index] == []


def test_what_is_hidden_in_a_notebook_is_not_in_the_docs(folder):
    shown = [path.name for path, text in pages_of(folder).items()
             if is_chapter(path, folder) and re.search(r"#\|\s*(hide|export|default_exp)\b", text)]
    assert [name for name in shown if name not in ("docs.html", "site.html")] == []


def test_a_visit_to_every_page_on_a_phone(folder, site, page):
    page.set_viewport_size(PHONE)
    wide = {}
    for path in pages_of(folder):
        if not is_chapter(path, folder): continue
        name = path.relative_to(folder).as_posix()
        page.goto(f"{site}/{name}")
        over = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        if over > 0: wide[name] = over
    assert wide == {}
    assert page.complaints == []
    assert {url for url in page.asked if not url.startswith((site, "data:", "blob:"))} == set()


def test_search_finds_a_phrase(site, page):
    page.goto(f"{site}/search.html?q=variance+term")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    assert any("regularizer" in link or "losses" in link for link in
               found.evaluate_all("links => links.map(link => link.getAttribute('href'))"))


def test_mathematics_and_a_live_figure_are_visible(site, page):
    from playwright.sync_api import expect

    page.set_viewport_size(DESK)
    page.goto(f"{site}/1_nn/losses.html")
    formula = page.locator("math").first
    expect(formula).to_be_visible()
    assert formula.bounding_box()["height"] > 10
    page.goto(f"{site}/9_reference/docs.html")
    figure = page.locator(".plotly-figure .main-svg").first
    expect(figure).to_be_visible()
    assert page.locator(".plotly-figure .bars .point").count() > 10


def test_a_documented_name_has_its_types_and_leads_to_its_source(site, page):
    page.goto(f"{site}/3_models/jepa.html#JEPA")
    assert page.locator("h3", has_text="JEPA").first.is_visible()
    page.locator("a.source").first.click()
    assert page.url.partition("#")[0].endswith("source/worldmodels_nb/models/jepa.py.html")
    line = page.url.rpartition("#")[2]
    assert page.locator(f"[id='{line}'], [name='{line}']").count() == 1


def test_the_next_page_and_the_one_before(site, page):
    page.goto(f"{site}/1_nn/losses.html")
    page.locator(".prev-next-footer a.right-next").click()
    assert page.url.endswith("1_nn/regularizer.html")
    page.locator(".prev-next-footer a.left-prev").click()
    assert page.url.endswith("1_nn/losses.html")
