"""The page of graft serve in a real browser, headless, against a real server: typing, streams, keyboard, colours,
width, and hostile text. The engine is a fake, so that a test decides how fast it answers.

Needs Debian's chromium. Where there is none these tests do not run, and pytest's summary says so; in CI they fail.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from conftest import CHROMIUM
from graftlm.errors import GraftError, Overloaded
from graftlm.serving.app import Service
from serving.fakes import FakeEngine, eventually, service, serving

MISSING = "there is no chromium: apt-get install chromium"
if CHROMIUM is None and os.environ.get("CI") != "true":
    pytest.skip(MISSING, allow_module_level=True)

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail(MISSING, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, FakeEngine]:
    return service(tmp_path_factory.mktemp("model"), "lora", "prefix", room=300)


@pytest.fixture(scope="module")
def url(made: tuple[Service, FakeEngine]) -> Iterator[str]:
    with serving(made[0]) as url:
        yield url


@pytest.fixture
def engine(made: tuple[Service, FakeEngine]) -> FakeEngine:
    made[1].reset()
    return made[1]


class Visit:
    """The page, what it asked for and what it complained of."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(url)


@pytest.fixture
def page(browser: Browser, url: str, engine: FakeEngine) -> Iterator[Page]:
    visit = Visit(browser, url)
    expect(visit.page.locator("#intro")).to_have_text("base and its adapters lora, prefix, side by side.")
    yield visit.page
    assert all(asked.startswith(f"{url}/") for asked in visit.asked) and visit.said == []
    visit.context.close()


def live(page: Page) -> Any:
    return expect(page.locator("#live"))


# A review


def test_a_review_is_read_by_base_and_adapters_side_by_side(page: Page, engine: FakeEngine) -> None:
    page.get_by_label("Review", exact=True).fill("a joy from start to end")
    page.get_by_role("button", name="Classify").click()
    tiles = page.locator("#readings > li")
    expect(tiles).to_have_count(3)
    assert tiles.locator("h3").all_text_contents() == ["base", "lora", "prefix"]
    assert tiles.nth(0).locator("li").all_inner_texts() == ["negative\n73.1%", "positive\n26.9%"]
    assert tiles.nth(1).locator("li").all_inner_texts() == ["negative\n88.1%", "positive\n11.9%"]
    assert tiles.nth(1).locator(".likeliest").count() == 1
    bars = tiles.nth(1).locator(".bar")
    box, filled = bars.first.bounding_box(), bars.first.locator("span").bounding_box()
    assert box is not None and filled is not None and filled["width"] / box["width"] == pytest.approx(0.88, abs=0.02)
    live(page).to_have_text("base: negative 73.1%, lora: negative 88.1%, prefix: negative 88.1%")
    assert len(engine.scored) == 3 and not page.locator("#readings").get_attribute("aria-busy")


def test_nothing_but_the_keyboard_is_needed(page: Page, engine: FakeEngine) -> None:
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    assert reached == ["Skip to the form", "review", "Classify", "prompt", "tokens", "temperature", "Generate"]
    page.get_by_label("Review", exact=True).focus()
    page.keyboard.type("good fun")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#readings > li")).to_have_count(3)
    page.keyboard.press("Enter")  # in the text it only begins a line
    assert page.get_by_label("Review", exact=True).input_value() == "good fun\n" and len(engine.scored) == 3


def test_a_long_review_says_that_only_its_beginning_was_read(page: Page) -> None:
    page.get_by_label("Review", exact=True).fill("long " * 200)
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#readings .note").first).to_have_text("Truncated: the text is too long for this model.")


def test_an_empty_review_is_not_sent(page: Page, engine: FakeEngine) -> None:
    page.get_by_role("button", name="Classify").click()
    live(page).to_have_text("enter a review first")
    assert engine.scored == []


def test_what_the_server_refuses_is_told(browser: Browser, url: str, engine: FakeEngine) -> None:
    visit = Visit(browser, url)
    engine.refuse = Overloaded("too many requests are waiting: try again later")
    visit.page.get_by_label("Review", exact=True).fill("a")
    visit.page.get_by_role("button", name="Classify").click()
    live(visit.page).to_have_text("too many requests are waiting: try again later")
    expect(visit.page.locator("#readings .wrong")).to_have_text("too many requests are waiting: try again later")
    visit.page.get_by_label("Prompt", exact=True).fill("a")
    visit.page.get_by_role("button", name="Generate").click()
    expect(visit.page.locator("#continuations .wrong")).to_have_count(3)
    visit.context.close()


# Free text


def test_continuations_are_streamed_for_all_models_at_once(page: Page, engine: FakeEngine) -> None:
    engine.hold = 2
    page.get_by_label("Prompt", exact=True).fill("The film was ")
    page.get_by_label("Maximum new tokens").fill("8")
    page.keyboard.press("Control+Enter")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")  # begun anew: the first ones end
    texts = page.locator("#continuations .text")
    expect(texts).to_have_text(["The film was fi"] * 3)
    live(page).to_have_text("generating")
    engine.hold = 100
    expect(texts).to_have_text(["The film was fine fil"] * 3)
    live(page).to_contain_text("base: 8 tokens in")
    live(page).to_contain_text("prefix: 8 tokens in")
    # Three connections, whose order is the browser's affair.
    assert {asked.adapter for asked in engine.requests[-3:]} == {None, "lora", "prefix"}
    assert engine.requests[-1].params.max_new_tokens == 8 and engine.requests[-1].params.temperature == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping_ends_all_of_them_on_the_server_too(page: Page, engine: FakeEngine, how: str) -> None:
    engine.hold = 1
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_disabled()
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#continuations .text")).to_have_text(["xf"] * 3)
    if how == "button":
        stop.click()
    else:
        page.keyboard.press("Escape")
    live(page).to_have_text("base: stopped, lora: stopped, prefix: stopped")
    assert stop.is_disabled() and page.evaluate("document.activeElement !== document.body")
    assert eventually(lambda: len(engine.tickets) == 3 and all(t.cancelled.is_set() for t in engine.tickets))
    assert page.locator("#continuations .text").all_inner_texts() == ["xf"] * 3


def test_an_answer_that_fails_midway_is_told(page: Page, engine: FakeEngine) -> None:
    engine.fails = GraftError("the logits are NaN")
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#continuations .wrong")).to_have_text(["the logits are NaN"] * 3)
    assert page.locator("#continuations .text").all_inner_texts() == ["xf"] * 3


# The key


def test_a_key_is_asked_for_once_and_kept_nowhere(browser: Browser, made: Any, engine: FakeEngine) -> None:
    with serving(made[0], api_key="s3cret") as url:
        visit = Visit(browser, url)
        field = visit.page.get_by_label("API key", exact=True)
        field.fill("wrong")
        field.press("Enter")
        expect(visit.page.locator("#intro")).to_contain_text("the key is wrong")
        field.fill("s3cret")
        field.press("Enter")
        expect(field).to_be_hidden()
        expect(visit.page.locator("#review")).to_be_focused()
        visit.page.keyboard.type("a")
        visit.page.keyboard.press("Control+Enter")
        expect(visit.page.locator("#readings > li")).to_have_count(3)
        assert not any("s3cret" in asked for asked in visit.asked) and "s3cret" not in visit.page.content()
        assert visit.page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert visit.context.cookies() == []
        visit.page.reload()
        expect(visit.page.get_by_label("API key", exact=True)).to_be_visible()
        visit.context.close()


# Everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, url: str, engine: FakeEngine, scheme: Any) -> None:
    visit = Visit(browser, url, color_scheme=scheme, bypass_csp=True)  # or axe itself could not run
    visit.page.get_by_label("Review", exact=True).fill("a")
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#readings > li")).to_have_count(3)
    visit.page.get_by_label("Prompt", exact=True).fill("x")
    visit.page.get_by_role("button", name="Generate").click()
    live(visit.page).to_contain_text("prefix: 9 tokens")
    visit.page.evaluate("document.getElementById('key-form').hidden = false")
    visit.page.add_script_tag(path=AXE)
    found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    visit.context.close()
    assert [(v["id"], v["impact"], [node["html"][:100] for node in v["nodes"]]) for v in found] == []


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_it_is_as_dark_as_the_reader_wishes(browser: Browser, url: str, scheme: Any, dark: bool) -> None:
    visit = Visit(browser, url, color_scheme=scheme)
    for where in ("body", "textarea", "button"):
        style = f"getComputedStyle(document.querySelector('{where}'))"
        back, text = (visit.page.evaluate(f"{style}.{name}") for name in ("backgroundColor", "color"))
        assert (brightness(back) < brightness(text)) == dark
    visit.context.close()


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_phone_need_not_scroll_sideways(browser: Browser, url: str, engine: FakeEngine, width: int) -> None:
    engine.answer = "w" * 60
    visit = Visit(browser, url, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    visit.page.get_by_label("Review", exact=True).fill("a")
    visit.page.get_by_role("button", name="Classify").tap()
    expect(visit.page.locator("#readings > li")).to_have_count(3)
    visit.page.get_by_label("Prompt", exact=True).fill("x" * 100)
    visit.page.get_by_role("button", name="Generate").tap()
    live(visit.page).to_contain_text("prefix: 48 tokens")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width and visit.said == []
    visit.context.close()


# What it must not do


def test_markup_in_names_reviews_and_answers_does_nothing(browser: Browser, tmp_path: Path) -> None:
    made, engine = service(tmp_path / "model", NASTY, room=500, max_tokens=200)
    engine.answer = NASTY
    with serving(made) as url:
        visit = Visit(browser, url)
        expect(visit.page.locator("#intro")).to_have_text(f"base and its adapters {NASTY}, side by side.")
        visit.page.get_by_label("Review", exact=True).fill(NASTY)
        visit.page.get_by_role("button", name="Classify").click()
        expect(visit.page.locator("#readings h3")).to_have_text(["base", NASTY])
        live(visit.page).to_contain_text(f"{NASTY}: negative")
        visit.page.get_by_label("Prompt", exact=True).fill(NASTY)
        visit.page.get_by_label("Maximum new tokens").fill("150")
        visit.page.get_by_role("button", name="Generate").click()
        expect(visit.page.locator("#continuations .text")).to_have_text([NASTY + NASTY] * 2)
        assert visit.page.evaluate("window.hacked") is None
        assert visit.page.locator("img, b").count() == 0 and visit.page.locator("script").count() == 1
        assert all(asked.startswith(f"{url}/") for asked in visit.asked) and visit.said == []
        visit.context.close()


def test_the_policy_refuses_a_script_that_came_in_all_the_same(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    visit.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
    assert visit.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in visit.said)
    visit.context.close()


def test_without_scripts_it_says_so(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, java_script_enabled=False)
    assert visit.page.locator("noscript").is_visible()
    visit.context.close()
