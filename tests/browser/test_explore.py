"Each notebook to play with, in JupyterLab: run twice, its widgets moved by keys and mouse at three widths."

import statistics
import time
from urllib.parse import unquote, urlsplit

import pytest
from browser_tools import NEEDS, command, idle_kernel, open_notebook, run_all, wait_for, what_went_wrong

pytestmark = NEEDS
START = "nbs/8_explore/80_start.ipynb"
# notebook: each of its views, and what is moved: a slider, a list, or a button that starts something
VIEWS = {
    "81_data": ("EpisodeExplorer", "step"),
    "83_masks": ("MaskRunExplorer", "seed"),
    "84_rollouts": ("RolloutExplorer", "step"),
    "85_steer": ("Steer", "seed"),
    "86_latents": ("LatentExplorer", "frame"),
    "87_energy": ("EnergyExplorer", "step"),
    "88_training": ("LiveTraining", "Start"),
    "89_runs": ("RunTable", "show"),
}
LINK = ".jp-Notebook a[href*='/files/']"
SHOWN = "window.jupyterapp.shell.currentWidget.context?.path"
WIDTHS = (900, 1280, 1920)
MOVES = 9  # of the slider, to time them


def quiet(page):
    "Nothing was complained of, and nobody beyond this machine was asked."
    assert page.complaints == []
    strangers = [url for url in page.asked if not url.startswith(("http://127.0.0.1:", "blob:", "data:"))]
    assert strangers == []


def test_the_start_page_is_what_opens_and_runs_twice(lab, page):
    assert page.request.get(f"{lab[0]}/").url.rstrip("?").endswith(f"/lab/tree/{START}")
    open_notebook(page, lab, START)
    for _ in range(2):
        run_all(page, lab, START)
        assert what_went_wrong(page) == []
    quiet(page)


def test_each_link_of_the_start_page_opens_what_it_names(lab, page):
    open_notebook(page, lab, START)
    page.wait_for_function("link => document.querySelectorAll(link).length > 12", arg=LINK)
    start, links = page.evaluate("window.jupyterapp.shell.currentWidget.id"), page.locator(LINK)
    files = {link.get_attribute("href"): number for number, link in enumerate(links.all())}
    for address, number in files.items():
        path = unquote(urlsplit(address).path).split("/files/")[1]
        links.nth(number).click()
        page.wait_for_function(f"path => {SHOWN} === path", arg=path)
        page.evaluate("start => window.jupyterapp.shell.activateById(start)", start)
    quiet(page)


def test_from_the_start_page_to_a_rollout_in_three_clicks(lab, page):
    open_notebook(page, lab, START)
    began = time.monotonic()
    page.locator(".jp-Notebook a", has_text="84_rollouts").first.click()
    page.wait_for_function(f"() => {SHOWN}?.includes('84_rollouts')")
    wait_for(lambda: idle_kernel(lab[0], "84_rollouts.ipynb"), "its kernel", lab[1])
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_selector(".wm-RolloutExplorer img.wm-image")
    print(f"\nthree clicks to the rollouts: {time.monotonic() - began:.1f} s")
    names = page.locator(".wm-RolloutExplorer .wm-models").inner_text()
    assert all(name in names for name in ("encdec", "encdec_jepa", "jepa", "vjepa2"))
    quiet(page)


def image_of(view): return view.locator("img.wm-image").first


def wait_for_another(image, before):
    "Another picture, and all of it."
    image.page.wait_for_function(
        "([image, before]) => image.src !== before && image.complete && image.naturalWidth > 0",
        arg=[image.element_handle(), before])


def move_by_keys(view, name):
    image, handle = image_of(view), view.locator(f".wm-{name} .noUi-handle")
    before = image.get_attribute("src")
    handle.focus()
    at_the_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    view.page.keyboard.press("ArrowLeft" if at_the_end else "ArrowRight")
    wait_for_another(image, before)


def move_by_mouse(view, name):
    image, track = image_of(view), view.locator(f".wm-{name} .noUi-base")
    before, box = image.get_attribute("src"), track.bounding_box()
    assert box["width"] >= 60, f"the track of {name} is {box['width']} px wide"
    handle = view.locator(f".wm-{name} .noUi-handle").bounding_box()
    left = handle["x"] < box["x"] + box["width"] / 2
    view.page.mouse.click(box["x"] + box["width"] * (.85 if left else .15), box["y"] + box["height"] / 2)
    wait_for_another(image, before)


def choose_another(view, name):
    "The next choice of a list, or the one before the last."
    image, chosen = image_of(view), view.locator(f".wm-{name} select")
    before, last = image.get_attribute("src"), chosen.evaluate("one => one.selectedIndex === one.length - 1")
    chosen.focus()
    view.page.keyboard.press("ArrowUp" if last else "ArrowDown")
    wait_for_another(image, before)


def press(view, name):
    "A button, by key: what it starts draws by itself, and is stopped again."
    image, button = image_of(view), view.locator(f".wm-{name.lower()}")
    before = image.get_attribute("src")
    button.focus()
    view.page.keyboard.press("Enter")
    wait_for_another(image, before)
    view.locator(".wm-pause").click()


def fits(view, width):
    "In the window's width and in one screen's height, and not stretched."
    view.scroll_into_view_if_needed()
    box, picture = view.bounding_box(), image_of(view).bounding_box()
    assert box["height"] <= 900 and box["x"] + picture["width"] <= width
    natural = image_of(view).evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert picture["width"] <= natural[0] + 1
    assert abs(picture["width"] / picture["height"] - natural[0] / natural[1]) < .05


def milliseconds(view, name):
    "From a key on the slider, or another choice of the list, to the new picture, measured in the page."
    moved = view.locator(f".wm-{name} .noUi-handle, .wm-{name} select").element_handle()
    return view.page.evaluate("""async ([moved, image, moves]) => {
        const took = [], list = moved.localName === "select";
        moved.focus();
        for (let i = 0; i < moves; i++) {
            const began = performance.now(), shown = new Promise(done => {
                image.addEventListener("load", done, {once: true}); setTimeout(done, 5000); });
            const key = moved.ariaValueNow === moved.ariaValueMax ? "Home" : "ArrowRight";
            if (list) moved.selectedIndex = (moved.selectedIndex + 1) % moved.length;
            moved.dispatchEvent(list ? new Event("change", {bubbles: true})
                                     : new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
            await shown;
            took.push(performance.now() - began);
        }
        return took; }""", [moved, image_of(view).element_handle(), MOVES])


@pytest.mark.parametrize("name", VIEWS)
def test_a_notebook_to_play_with(lab, page, name):
    path = f"nbs/8_explore/{name}.ipynb"
    open_notebook(page, lab, path)
    for _ in range(2):
        run_all(page, lab, path)
        assert what_went_wrong(page) == []
    command(page, "application:toggle-left-area")
    kind, moved = VIEWS[name]
    view = page.locator(f".wm-{kind}").first
    assert image_of(view).get_attribute("alt")
    slides = view.locator(f".wm-{moved} .noUi-handle").count()
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=1000))
        if slides:
            move_by_keys(view, moved)
            move_by_mouse(view, moved)
        elif moved.islower(): choose_another(view, moved)
        else: press(view, moved)
        fits(view, width)
    if slides or moved.islower():
        took = statistics.median(milliseconds(view, moved))
        print(f"\n{kind}: {took:.0f} ms from {moved} to picture (median of {MOVES})")
    quiet(page)
