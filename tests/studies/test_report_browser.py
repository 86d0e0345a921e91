"""The page of graft report in a real browser, headless: pointer, keyboard, colours, width, paper, and hostile text.

Needs Debian's chromium. Where there is none these tests do not run, and pytest's summary says so; in CI they fail.
"""

import csv
import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Locator, Page

from fake_runs import LABELS, compared, predictions, realistic, run_folder
from graftlm import cli

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of a comparison, one of them the base as it is, and a short run without predictions."""
    folder = tmp_path_factory.mktemp("report")
    words = [str(realistic(folder / "sweep")), str(run_folder(folder / "mine")), "--out", str(folder / "page.html")]
    assert cli.run(["report", *words]) == 0
    return folder / "page.html"


class Visit:
    """A page, what it asked for and what it complained of."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(file.as_uri())


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    visit = Visit(browser, report)
    yield visit.page
    assert visit.asked == [report.as_uri()] and visit.said == []
    visit.context.close()


def chart(page: Page, name: str) -> Locator:
    return page.locator(f'figure[data-chart="{name}"] .plot')


def live(page: Page) -> str:
    return page.locator("#live").text_content() or ""


def names(page: Page) -> list[str]:
    return page.locator("table.results").first.locator("tbody th").all_text_contents()


def shown(page: Page, name: str) -> int:
    """How many runs a chart shows."""
    return chart(page, name).locator("svg svg > g[class]").count()


def ticks(page: Page, name: str) -> list[str]:
    return chart(page, name).locator('text[text-anchor="middle"]').all_text_contents()


# Charts


def test_the_pointer_reads_the_nearest_step_of_all_runs(page: Page) -> None:
    plot = chart(page, "val_loss")
    plot.hover(position={"x": 60, "y": 80})
    tip = plot.locator(".tip")
    data = json.loads(page.locator("#data").text_content() or "")
    first = {s["name"]: s["values"] for s in data["charts"]["val_loss"]}
    assert tip.locator("> strong").text_content() == "step 2" and tip.locator("div").count() == len(first) == 6
    mine = tip.locator("div", has_text="mine").locator("strong").text_content()
    assert mine == f"{first['mine'][0]:g}" and "(at 24)" in tip.locator("div").first.inner_text()
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_a_run_is_switched_off_in_all_charts_and_on_again(page: Page) -> None:
    assert [shown(page, name) for name in ("train_loss", "parameters", "calibration")] == [6, 6, 6]
    button = page.get_by_role("button", name="LoRA r=8", exact=True)
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert [shown(page, name) for name in ("train_loss", "parameters", "calibration")] == [5, 5, 5]
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true" and shown(page, "train_loss") == 6
    page.get_by_role("button", name="Hide all").click()
    assert shown(page, "minutes") == shown(page, "val_loss") == 0
    page.get_by_role("button", name="Show all").click()
    assert shown(page, "minutes") == 6


def test_dragging_zooms_all_curves_and_a_button_shows_all_again(page: Page) -> None:
    before = ticks(page, "val_loss")
    chart(page, "train_loss").scroll_into_view_if_needed()
    box = chart(page, "train_loss").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 300, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 120, steps=4)
    assert chart(page, "train_loss").locator(".chosen").count() == 1
    page.mouse.up()
    assert ticks(page, "val_loss") == ticks(page, "train_loss") != before
    first, last = live(page).removeprefix("step ").split(" to ")
    assert 40 < int(first) < int(last) < 110
    assert chart(page, "parameters").locator(".chosen").count() == 0
    page.get_by_role("button", name="Whole curve: Training loss").click()
    assert ticks(page, "val_loss") == before and live(page) == "whole curve"


def test_the_keyboard_reads_and_zooms_and_is_heard(page: Page) -> None:
    chart(page, "val_accuracy").focus()
    page.keyboard.press("Home")
    assert live(page).startswith("step 2: ") and "mine 65.0%" in live(page)
    page.keyboard.press("ArrowRight")
    assert live(page).startswith("step 4: ")
    page.keyboard.press("End")
    assert live(page).startswith("step 240: ") and "LoRA r=32 " in live(page)
    page.keyboard.press("ArrowLeft")
    assert live(page).startswith("step 216: ")
    before = ticks(page, "val_accuracy")
    page.keyboard.press("+")
    assert ticks(page, "val_accuracy") != before and live(page).startswith("step ") and " to " in live(page)
    for _ in range(20):
        page.keyboard.press("+")  # to the narrowest view, and no further
    page.keyboard.press("ArrowLeft")  # what is shown moves along
    assert live(page).startswith("step 192: ") and chart(page, "val_accuracy").locator(".cursor").count() == 1
    page.keyboard.press("0")
    assert ticks(page, "val_accuracy") == before
    page.keyboard.press("Escape")
    assert chart(page, "val_accuracy").locator(".tip").is_hidden()


def test_costs_and_reliability_are_read_by_keyboard_too(page: Page) -> None:
    chart(page, "parameters").focus()
    page.keyboard.press("Home")
    assert live(page).startswith("trainable parameters 0: as it is 7")
    page.keyboard.press("ArrowRight")
    assert live(page).startswith("trainable parameters 161,280: LoRA r=2 ") and " to " in live(page)
    chart(page, "calibration").focus()
    page.keyboard.press("End")
    assert live(page).startswith("probability 9")


def curve(page: Page, name: str, kind: str = "curve") -> list[list[float]]:
    """The points of a chart's first curve on the screen."""
    path = chart(page, name).locator(f"svg svg path.{kind}").first.get_attribute("d") or ""
    return [[float(number) for number in point.split()] for point in path.removeprefix("M").split("L")]


def roughness(points: list[list[float]]) -> float:
    return sum(abs(a[1] - b[1]) for a, b in pairwise(points))


def test_the_slider_smooths_and_the_raw_values_stay(page: Page) -> None:
    smoothed, raw = curve(page, "train_loss"), curve(page, "train_loss", "raw")
    assert len(smoothed) == len(raw) == 240
    assert smoothed[0] == raw[0] and smoothed[-1] == raw[-1]  # the window narrows, so the curve is not late
    assert roughness(smoothed) < 0.7 * roughness(raw)
    slider = page.get_by_label("Smoothing")
    slider.fill("20")
    assert roughness(curve(page, "train_loss")) < 0.7 * roughness(smoothed)
    slider.fill("0")
    assert curve(page, "train_loss") == raw and chart(page, "train_loss").locator("path.raw").count() == 0


def test_curves_over_minutes_and_on_a_logarithmic_axis(page: Page) -> None:
    linear, accuracy = curve(page, "val_loss"), curve(page, "val_accuracy")
    page.get_by_label("Logarithmic loss and norm").check()
    assert curve(page, "val_loss") != linear and curve(page, "val_accuracy") == accuracy
    chart(page, "val_loss").focus()
    page.keyboard.press("Home")
    assert live(page).startswith("step 2: ")
    page.keyboard.press("+")
    page.get_by_label("Minutes instead of steps").check()
    assert ticks(page, "val_loss")[-1] == "minutes" and chart(page, "val_loss").locator(".cursor").count() == 0
    chart(page, "val_loss").focus()
    page.keyboard.press("End")
    assert live(page).startswith("minutes 8: ") and "at " in live(page)  # 240 steps of 2 seconds
    page.keyboard.press("+")
    assert live(page).startswith("minutes ") and " to " in live(page)
    assert ticks(page, "parameters")[-1] == "trainable parameters"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_saved_with_a_legend_and_in_light_colours(browser: Browser, report: Path, scheme: Any) -> None:
    visit = Visit(browser, report, color_scheme=scheme)
    with visit.page.expect_download() as svg:
        visit.page.get_by_role("button", name="Save as SVG: Validation loss").click()
    assert svg.value.suggested_filename == "validation-loss.svg" and live(visit.page) == "saved validation-loss.svg"
    root = ElementTree.parse(svg.value.path()).getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "LoRA r=2", "LoRA r=32", "mine"} <= set(texts)
    paper = root.find("{http://www.w3.org/2000/svg}rect")
    assert paper is not None and paper.get("fill") == "rgb(255, 255, 255)"
    lines = [e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "curve"]
    assert {line.get("stroke") for line in lines} >= {"rgb(213, 94, 0)", "rgb(27, 31, 36)"} and len(lines) == 12
    with visit.page.expect_download() as png:
        visit.page.get_by_role("button", name="Save as PNG: Accuracy against minutes of training").click()
    assert png.value.path().read_bytes().startswith(b"\x89PNG") and png.value.path().stat().st_size > 10_000
    assert visit.said == [] and visit.page.locator(":root.light").count() == 0
    visit.context.close()


# Tables


def test_tables_are_saved_as_csv_and_latex(page: Page) -> None:
    with page.expect_download() as table:
        page.get_by_role("button", name="Save as csv: Results on 400 test examples").click()
    lines = list(csv.reader(io.StringIO(table.value.path().read_text())))
    assert lines[0][:4] == ["run", "accuracy", "95% interval", "macro F1"] and len(lines) == 8
    assert lines[1][:3] == ["as it is", "0.7125", "66.6 to 75.5"] and lines[-1][:2] == ["mine", ""]
    with page.expect_download() as latex:
        page.get_by_role("button", name="Save as tex: Results on 400 test examples").click()
    text = latex.value.path().read_text().splitlines()
    assert text[:2] == ["% Results on 400 test examples", r"\begin{tabular}{lrrrrrrrrr}"]
    assert text[3].startswith(r"run & accuracy & 95\% interval & macro F1 &") and text[3].endswith(r" \\")
    assert text[5].startswith(r"as it is & 71.2\% & 66.6 to 75.5 & 0.712 & -- & 0 (0.00\%) &")
    assert text[-1] == r"\end{tabular}"
    with page.expect_download() as confusion:
        page.get_by_role("button", name="Save as csv: Confusion of as it is").click()
    assert confusion.value.path().read_text().splitlines()[:2] == [
        "true ↓ predicted →,negative,positive",
        "negative,141,59",
    ]


def test_the_table_is_sorted_by_pointer_and_keyboard_and_what_is_missing_stays_last(page: Page) -> None:
    head = page.get_by_role("columnheader", name="accuracy").first
    given = names(page)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(page)[0] == "as it is" and names(page)[-1] == "mine" and sorted(names(page)) == sorted(given)
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending" and live(page) == "sorted by accuracy, descending"
    assert names(page)[0] == "LoRA r=32" and names(page)[-1] == "mine"
    other = page.get_by_role("columnheader", name="run").first
    other.get_by_role("button").click()
    assert names(page) == ["as it is", *(f"LoRA r={r}" for r in (2, 4, 8, 16, 32)), "mine"]
    assert head.get_attribute("aria-sort") == "none" and other.get_attribute("aria-sort") == "ascending"


def test_reviews_are_filtered_by_their_words(page: Page) -> None:
    rows = page.locator("table.reviews tbody tr")
    every = rows.count()
    page.get_by_label("Filter reviews by words").fill("TIRED genre")
    left = page.locator("table.reviews tbody tr:visible").all_inner_texts()
    assert 0 < len(left) < every and all("a tired" in text for text in left)
    assert live(page) == f"{len(left)} of {every} shown"
    page.get_by_label("Filter reviews by words").fill("")
    assert page.locator("table.reviews tbody tr:visible").count() == every


# Everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, report: Path, scheme: Any) -> None:
    visit = Visit(browser, report, color_scheme=scheme, bypass_csp=True)  # or axe itself could not run
    visit.page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    visit.page.get_by_role("button", name="LoRA r=8", exact=True).click()
    visit.page.add_script_tag(path=AXE)
    found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    visit.context.close()
    assert [(v["id"], v["impact"], [node["html"][:100] for node in v["nodes"]]) for v in found] == []


def test_the_keyboard_reaches_all_and_shows_where_it_is(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    seen: set[str] = set()
    for _ in range(160):
        page.keyboard.press("Tab")
        what = page.evaluate("(e => e.className || e.id || e.tagName)(document.activeElement)")
        assert what == "BODY" or page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", what
        seen.add(what)
    assert {"scroll", "plot", "filter-0", "SUMMARY", "BUTTON", "INPUT"} <= seen


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_is_as_dark_as_the_reader_wishes_but_not_on_paper(
    browser: Browser, report: Path, scheme: Any, dark: bool
) -> None:
    visit = Visit(browser, report, color_scheme=scheme)
    back, text = (f"getComputedStyle(document.body).{name}" for name in ("backgroundColor", "color"))
    assert (brightness(visit.page.evaluate(back)) < brightness(visit.page.evaluate(text))) == dark
    visit.page.emulate_media(media="print", color_scheme=scheme)
    assert visit.page.evaluate(back) == "rgb(255, 255, 255)"
    visit.context.close()


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_phone_need_not_scroll_sideways_and_a_finger_can_read(browser: Browser, report: Path, width: int) -> None:
    visit = Visit(browser, report, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    plot = chart(visit.page, "val_loss")
    plot.tap(position={"x": 200, "y": 100})
    tip = plot.locator(".tip")
    assert tip.is_visible()
    box = tip.bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width and visit.said == []
    visit.context.close()


def test_paper_shows_what_is_folded(page: Page) -> None:
    closed = page.locator("details:not([open])")
    before = closed.count()
    assert before >= 4
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert closed.count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert closed.count() == before
    assert page.pdf().startswith(b"%PDF") and closed.count() == before


def test_without_scripts_all_figures_can_be_read(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, java_script_enabled=False)
    assert visit.page.locator("noscript").is_visible() and len(names(visit.page)) == 7
    assert visit.page.locator("table.confusion").count() == 6
    visit.context.close()


# What it must not do


def test_markup_in_names_and_reviews_does_nothing(browser: Browser, tmp_path: Path) -> None:
    cells = [
        {"row": f"{NASTY}{n}", "flags": {}, "losses": [0.6, 0.5], "predictions": predictions([bool(n)], [NASTY])}
        for n in range(2)
    ]
    for cell in cells:
        for row in cell["predictions"]:
            row["scores"] = {NASTY: row["scores"][LABELS[0]], "b": row["scores"][LABELS[1]]}
    out = tmp_path / "page.html"
    words = [str(compared(tmp_path / "sweep", cells)), "--out", str(out), "--title", NASTY]
    assert cli.run(["report", *words]) == 0
    visit = Visit(browser, out)
    for name in ("train_loss", "parameters", "calibration"):
        chart(visit.page, name).focus()
        visit.page.keyboard.press("Home")
        assert NASTY in chart(visit.page, name).locator(".tip").inner_text()
    visit.page.get_by_role("columnheader", name="accuracy").first.get_by_role("button").click()
    assert visit.page.locator("h1").text_content() == visit.page.title() == NASTY
    assert visit.page.locator("table.reviews tbody th").text_content() == NASTY
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("img, b").count() == 0 and visit.page.locator("script").count() == 2
    assert visit.asked == [out.as_uri()] and visit.said == []
    visit.context.close()


def test_the_policy_refuses_a_script_that_came_in_all_the_same(browser: Browser, report: Path, tmp_path: Path) -> None:
    broken = report.read_text(encoding="utf-8").replace("<h1>", "<script>window.hacked = 1</script><h1>")
    (tmp_path / "page.html").write_text(broken, encoding="utf-8")
    visit = Visit(browser, tmp_path / "page.html")
    assert visit.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in visit.said)
    visit.context.close()
