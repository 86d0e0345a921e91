"""The page of graft serve in a real browser, headless, against a real server: chat, label probabilities, free text,
keyboard, colours, width, and hostile text. The engine is a fake, so that a test decides how fast it answers; one
conversation is with a real model.

Needs Debian's chromium. Where there is none these tests do not run, and pytest's summary says so; in CI they fail.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from graftlm.errors import GraftError, Overloaded
from graftlm.exchange.load import load
from graftlm.inference.engine import Engine
from graftlm.serving.service import ServedModel, Service
from graftlm.text.template import load_template
from serving.fakes import FakeEngine, eventually, service, serving
from tiny import TEMPLATE, chat_model_folder

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b> **`<i>`**"
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
EMPTY = "The answer is empty: the model ended it at once. Retry, say it in other words, or choose another model."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, FakeEngine]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "chat_template.jinja").write_text(CHAT)
    return service(folder, "lora", "prefix", room=300)


@pytest.fixture(scope="module")
def url(made: tuple[Service, FakeEngine]) -> Iterator[str]:
    with serving(made[0]) as url:
        yield url


@pytest.fixture
def engine(made: tuple[Service, FakeEngine]) -> FakeEngine:
    made[1].reset()
    return made[1]


class Visit:
    """The page, what it requested, and what it logged."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.urls: list[str] = []
        self.log: list[str] = []
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("console", lambda message: self.log.append(message.text))
        self.page.on("pageerror", lambda error: self.log.append(str(error)))
        self.page.on("dialog", lambda dialog: self.log.append(dialog.message))
        self.page.goto(url)


@pytest.fixture
def page(browser: Browser, url: str, engine: FakeEngine) -> Iterator[Page]:
    visit = Visit(browser, url)
    expect(visit.page.locator("#intro")).to_have_text("Serving base and its adapters lora, prefix.")
    yield visit.page
    assert all(requested.startswith(f"{url}/") for requested in visit.urls)
    assert [line for line in visit.log if not line.startswith("Failed to load resource")] == []
    visit.context.close()


def live(page: Page) -> Any:
    return expect(page.locator("#live"))


def problem(page: Page) -> Any:
    return expect(page.locator(".problem:visible"))


def box(page: Page, label: str) -> Locator:
    """The field of a label, in the tab that it is in."""
    tab = {"Text to classify": "Label probabilities", "Text to continue": "Free text"}.get(label)
    if tab:
        page.get_by_role("tab", name=tab).click()
    return page.get_by_label(label, exact=True)


def say(page: Page, text: str) -> None:
    """Send a message in the chat."""
    box(page, "Message").fill(text)
    box(page, "Message").press("Enter")


def prompt(engine: FakeEngine, number: int = -1) -> str:
    """What the engine read, in CHAT's form."""
    return engine.tokenizer.decode(list(engine.requests[number].prompt))


# Chat


def test_five_turns_with_a_real_model_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    folder = chat_model_folder(tmp_path / "model", CHAT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    loaded = load(str(folder), tmp_path, device="cpu", dtype="float32")
    engine = Engine(loaded, {})
    models = {"tiny": ServedModel("tiny", None, load_template(TEMPLATE), engine.max_seq_len)}
    with serving(Service(engine, loaded.tokenizer, models, 8)) as url:
        visit = Visit(browser, url)
        posts: list[Any] = []
        visit.page.on("request", lambda request: posts.append(request))
        box(visit.page, "Temperature 0: always the most likely token").fill("0")
        box(visit.page, "Message").focus()
        for turn in range(5):
            visit.page.keyboard.type(f"{turn}?")
            visit.page.keyboard.press("Enter")
            live(visit.page).to_contain_text("8 tokens in")
            expect(visit.page.locator(".turns > li")).to_have_count(turn + 1)
            live(visit.page).to_contain_text("stopped at the limit of Max tokens")
            visit.page.evaluate("live.textContent = ''")
        sent = [request.post_data_json for request in posts if request.method == "POST"]
        texts = visit.page.locator(".turns .text").evaluate_all("all => all.map((p) => p.lastChild.textContent)")
        assert all(texts) and len(set(texts)) > 1 and [len(body["messages"]) for body in sent] == [1, 3, 5, 7, 9]
        pairs = [(m["role"], m["content"]) for m in sent[-1]["messages"]]
        assert pairs[1::2] == [("assistant", text) for text in texts[:4]]
        assert pairs[::2] == [("user", f"{turn}?") for turn in range(5)]
        for body, text in zip(sent, texts, strict=True):
            whole = {name: value for name, value in body.items() if not name.startswith("stream")}
            answer = httpx.post(f"{url}/v1/chat/completions", json=whole, timeout=60).json()
            assert answer["choices"][0]["message"]["content"] == text
        assert visit.log == []
        visit.context.close()
    engine.close()


def test_a_request_has_the_model_and_the_settings(page: Page, engine: FakeEngine) -> None:
    page.get_by_label("Model", exact=True).select_option("prefix")
    settings = {"temperature": 1.5, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3}
    for name, value in {**settings, "max_tokens": 4, "system": "Be kind."}.items():
        page.locator(f"#{name}").fill(str(value))
    say(page, " <hello> ")
    live(page).to_contain_text("prefix: fine (4 tokens in")
    (request,) = engine.requests
    assert request.adapter == "prefix" and prompt(engine) == "s:Be kind.\nu: <hello> \n"
    assert {name: getattr(request.params, name) for name in settings} == settings
    assert request.params.max_new_tokens == 4
    page.locator("#top_p").fill("2")
    say(page, "more")
    problem(page).to_contain_text("Settings, Top p: ")
    expect(page.locator("#top_p")).to_be_focused()
    page.locator("#top_p").fill("0")  # which only the server refuses
    box(page, "Message").press("Enter")
    problem(page).to_contain_text("top_p: must be a number above 0")
    assert len(engine.requests) == 1


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_and_retry(page: Page, engine: FakeEngine, how: str) -> None:
    engine.hold = 1
    stop = page.locator("#chat .stop")
    assert stop.is_disabled()
    say(page, "one")
    text, turns = page.locator(".turns .text"), page.locator(".turns > li")
    expect(text).to_have_text("f")
    say(page, "two")
    problem(page).to_have_text("An answer is being generated: stop it first, or wait for its end.")
    if how == "button":
        stop.click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".turns .note")).to_have_text("stopped")
    assert stop.is_disabled() and page.evaluate("document.activeElement.id") == "message"
    assert eventually(lambda: len(engine.tickets) == 1 and engine.tickets[0].cancelled.is_set())
    engine.hold = 100
    box(page, "Message").press("Enter")  # two
    live(page).to_contain_text("fine film (9 tokens in")
    assert prompt(engine) == "u:one\na:f\nu:two\n"  # a stopped answer is part of the conversation
    expect(page.get_by_role("button", name="Retry")).to_have_count(1)
    engine.answer = "better"
    page.get_by_label("Model", exact=True).select_option("lora")
    page.get_by_role("button", name="Retry").click()
    live(page).to_contain_text("lora: better")
    expect(turns).to_have_count(2)
    assert turns.nth(1).locator("h3").all_text_contents() == ["You", "lora"]
    assert text.all_inner_texts() == ["f", "better"] and prompt(engine) == "u:one\na:f\nu:two\n"


def test_examples_copy_and_clear(page: Page, engine: FakeEngine) -> None:
    page.get_by_role("button", name="What is the capital of France?").click()
    live(page).to_contain_text("fine film")
    expect(page.locator("#examples")).to_be_hidden()
    assert prompt(engine) == "u:What is the capital of France?\n"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    live(page).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "fine film"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over plain HTTP elsewhere
    page.get_by_role("button", name="Copied").click()
    expect(page.get_by_role("button", name="Selected: press Ctrl+C")).to_be_visible()
    assert page.evaluate("getSelection().toString()") == "fine film"
    for tab in ("Label probabilities", "Free text", "Chat"):  # and back: the conversation is still there
        page.get_by_role("tab", name=tab).click()
    expect(page.locator(".turns .text")).to_have_text("fine film")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#examples")).to_be_visible()
    say(page, "anew")
    live(page).to_contain_text("fine film (")
    assert prompt(engine) == "u:anew\n" and page.locator(".turns > li").count() == 1


def test_the_conversation_scrolls_with_the_answer_unless_it_was_scrolled_up(page: Page, engine: FakeEngine) -> None:
    engine.answer, engine.hold = "x\n" * 32, 40
    say(page, "one")
    turns, text = page.locator(".turns"), page.locator(".turns .text")
    expect(text).to_contain_text("x\n" * 20, use_inner_text=True)
    rest = "e => e.scrollHeight - e.clientHeight - e.scrollTop"
    assert turns.evaluate("e => e.scrollHeight > e.clientHeight") and turns.evaluate(rest) < 50
    turns.evaluate("e => e.scrollTop = 0")
    engine.hold = 100
    live(page).to_contain_text("64 tokens in")
    assert turns.evaluate("e => e.scrollTop") == 0 and turns.evaluate(rest) > 200
    engine.hold = 1
    page.get_by_role("button", name="Retry").click()
    live(page).to_have_text("generating")
    engine.hold = 100
    live(page).to_contain_text("64 tokens in")
    assert turns.evaluate(rest) < 2


def test_errors_are_shown_where_the_answer_would_be(page: Page, engine: FakeEngine) -> None:
    engine.refuse = Overloaded("too many requests are waiting: try again later")
    say(page, "one")
    problem(page).to_have_text("too many requests are waiting: try again later")
    engine.refuse, engine.fails = None, GraftError("the logits are NaN")
    say(page, "two")
    expect(page.locator(".turns .problem").nth(1)).to_have_text("the logits are NaN")
    assert page.locator(".turns .text").all_inner_texts() == ["", "f"]
    assert prompt(engine) == "u:two\n"  # what was not answered is not part of the conversation
    box(page, "Text to continue").fill("x")
    page.get_by_role("button", name="Generate").click()
    problem(page).to_have_text(["the logits are NaN"] * 3)
    engine.refuse = Overloaded("too many requests are waiting: try again later")
    box(page, "Text to classify").fill("a")
    page.get_by_role("button", name="Classify").click()
    problem(page).to_have_text("too many requests are waiting: try again later")
    page.context.set_offline(True)
    page.get_by_role("button", name="Classify").click()
    problem(page).to_have_text("the server cannot be reached: is graft serve running?")


def test_where_nothing_comes_back_a_line_says_what_to_try(page: Page, engine: FakeEngine) -> None:
    engine.answer = "\n"
    say(page, "hello")
    expect(page.locator(".turns .note")).to_have_text(EMPTY)
    engine.answer = "\n" * 99
    page.get_by_role("button", name="Retry").click()
    live(page).to_contain_text(EMPTY)
    box(page, "Text to continue").fill("What is the capital of France?")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#continuations .note").first).to_contain_text("No text: the model ended at once. Leave the")


def test_an_empty_submit_says_so(page: Page, engine: FakeEngine) -> None:
    for label, button, what in (
        ("Message", "Send", "message"),
        ("Text to classify", "Classify", "text"),
        ("Text to continue", "Generate", "text"),
    ):
        box(page, label).fill(" \n")
        page.get_by_role("button", name=button).click()
        problem(page).to_have_text(f"Nothing was sent: the {what} is empty.")
    assert not engine.scored and not engine.requests


def test_a_model_without_a_chat_template_starts_with_free_text(browser: Browser, tmp_path: Path) -> None:
    with serving(service(tmp_path / "model")[0]) as url:
        visit = Visit(browser, url)
        expect(visit.page.get_by_role("tab", name="Free text")).to_have_attribute("aria-selected", "true")
        expect(visit.page.get_by_label("Text to continue")).to_be_visible()
        visit.page.get_by_role("tab", name="Chat").click()
        expect(visit.page.locator("#chat")).to_contain_text("base has no chat template, so it cannot chat.")
        expect(visit.page.get_by_label("Message")).to_be_hidden()
        visit.context.close()


# Label probabilities


def test_label_probabilities_of_base_and_adapters_side_by_side(page: Page, engine: FakeEngine) -> None:
    box(page, "Text to classify").fill("a joy from start to end")
    page.get_by_role("button", name="Classify").click()
    tiles = page.locator("#readings > li")
    expect(tiles).to_have_count(3)
    assert tiles.locator("h3").all_text_contents() == ["base", "lora", "prefix"]
    assert tiles.nth(0).locator("li").all_inner_texts() == ["negative\n73.1%", "positive\n26.9%"]
    assert tiles.nth(1).locator("li").all_inner_texts() == ["negative\n88.1%", "positive\n11.9%"]
    assert tiles.nth(1).locator(".likeliest").count() == 1
    bars = tiles.nth(1).locator(".bar")
    whole, filled = bars.first.bounding_box(), bars.first.locator("span").bounding_box()
    assert whole is not None and filled is not None
    assert filled["width"] / whole["width"] == pytest.approx(0.88, abs=0.02)
    live(page).to_have_text("base: negative 73.1%, lora: negative 88.1%, prefix: negative 88.1%")
    assert len(engine.scored) == 3 and not page.locator("#readings").get_attribute("aria-busy")
    box(page, "Text to classify").fill("long " * 200)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#readings .note").first).to_have_text("Truncated: the text is too long for this model.")


# Free text


def test_continuations_are_streamed_for_all_models_at_once(page: Page, engine: FakeEngine) -> None:
    engine.hold = 2
    box(page, "Text to continue").fill("The film was ")
    page.locator("#max_tokens").fill("8")
    page.locator("#temperature").fill("0")
    box(page, "Text to continue").press("Control+Enter")
    texts = page.locator("#continuations .text")
    expect(texts).to_have_text(["The film was fi"] * 3)
    live(page).to_have_text("generating")
    engine.hold = 100
    expect(texts).to_have_text(["The film was fine fil"] * 3)
    live(page).to_contain_text("base: 8 tokens in")
    live(page).to_contain_text("prefix: 8 tokens in")
    # Three connections, whose order is the browser's affair.
    assert {request.adapter for request in engine.requests} == {None, "lora", "prefix"}
    assert {(r.params.max_new_tokens, r.params.temperature) for r in engine.requests} == {(8, 0)}
    assert len({request.params.seed for request in engine.requests}) == 1


def test_stop_ends_all_continuations_on_the_server_too(page: Page, engine: FakeEngine) -> None:
    engine.hold = 1
    box(page, "Text to continue").fill("x")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#continuations .text")).to_have_text(["xf"] * 3)
    page.locator("#texts .stop").click()
    live(page).to_have_text("base: stopped, lora: stopped, prefix: stopped")
    assert eventually(lambda: len(engine.tickets) == 3 and all(t.cancelled.is_set() for t in engine.tickets))
    assert page.locator("#continuations .text").all_inner_texts() == ["xf"] * 3


# Keyboard


def test_nothing_but_the_keyboard_is_needed(page: Page, engine: FakeEngine) -> None:
    expect(page.locator("#message")).to_be_visible()
    reached = []
    for _ in range(11):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached
    assert reached[:4] == ["Skip to the tabs", "chat-tab", "model", "clear"] and reached[5].startswith("What is the")
    assert reached[8:] == ["message", "Send", "Settings"]
    page.locator("#message").focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#message").input_value() == "one\ntwo" and engine.requests == []
    page.keyboard.press("Enter")
    live(page).to_contain_text("base: fine film")
    assert prompt(engine) == "u:one\ntwo\n"
    page.locator("#chat-tab").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#prompt")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="Label probabilities")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("good fun")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#readings > li")).to_have_count(3)
    page.keyboard.press("Enter")  # in this text it begins a line
    assert page.locator("#review").input_value() == "good fun\n" and len(engine.scored) == 3
    assert page.evaluate("getComputedStyle(document.querySelector('#settings')).display") == "none"


# The key


def test_a_key_is_asked_for_once_and_kept_nowhere(browser: Browser, made: Any, engine: FakeEngine) -> None:
    with serving(made[0], api_key="s3cret") as url:
        visit = Visit(browser, url)
        field = visit.page.get_by_label("API key", exact=True)
        expect(visit.page.locator("#work")).to_be_hidden()
        field.fill("wrong")
        field.press("Enter")
        problem(visit.page).to_have_text("the key is wrong")
        field.fill("s3cret")
        field.press("Enter")
        expect(field).to_be_hidden()
        expect(visit.page.locator("#chat-tab")).to_be_focused()
        say(visit.page, "a")
        live(visit.page).to_contain_text("fine film")
        assert not any("s3cret" in requested for requested in visit.urls) and "s3cret" not in visit.page.content()
        assert visit.page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert visit.context.cookies() == []
        visit.page.reload()
        expect(visit.page.get_by_label("API key", exact=True)).to_be_visible()
        visit.context.close()


# Everyone


def fill_all(page: Page) -> None:
    """Content in all tabs; ends in the chat's."""
    box(page, "Text to classify").fill("a" * 100)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#readings > li")).to_have_count(3)
    box(page, "Text to continue").fill("x" * 100)
    page.get_by_role("button", name="Generate").click()
    live(page).to_contain_text("prefix: 9 tokens")
    page.get_by_role("tab", name="Chat").click()
    say(page, "y" * 100)
    live(page).to_contain_text("base: wwwwwwwww (9 tokens")
    page.get_by_role("button", name="Send").click()
    problem(page).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, url: str, engine: FakeEngine, scheme: Any) -> None:
    engine.answer = "w" * 9
    visit = Visit(browser, url, color_scheme=scheme, bypass_csp=True)  # or axe itself could not run
    fill_all(visit.page)
    visit.page.evaluate("document.getElementById('key-form').hidden = false")
    visit.page.add_script_tag(path=AXE)
    for tab in ("Chat", "Label probabilities", "Free text"):
        visit.page.get_by_role("tab", name=tab).click()
        found = visit.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        assert [(v["id"], v["impact"], [node["html"][:100] for node in v["nodes"]]) for v in found] == []
    visit.context.close()


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


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_need_not_scroll_sideways(browser: Browser, url: str, engine: FakeEngine, width: int) -> None:
    engine.answer = "w" * 9
    visit = Visit(browser, url, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True)
    fill_all(visit.page)
    engine.answer = "w" * 60
    visit.page.get_by_role("button", name="Retry").tap()
    live(visit.page).to_contain_text("60 tokens")
    visit.page.get_by_text("Settings", exact=True).tap()
    for tab in ("Label probabilities", "Free text", "Chat"):
        visit.page.get_by_role("tab", name=tab).tap()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    assert visit.page.locator(".turns").evaluate("e => e.scrollWidth <= e.clientWidth") and visit.log == []
    visit.context.close()


# What it must not do


def test_markup_in_names_texts_and_answers_does_nothing(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text(CHAT)
    made, engine = service(tmp_path / "model", NASTY, room=500, max_tokens=200)
    engine.answer = NASTY
    with serving(made) as url:
        visit = Visit(browser, url)
        expect(visit.page.locator("#intro")).to_have_text(f"Serving base and its adapter {NASTY}.")
        visit.page.get_by_label("Model", exact=True).select_option(NASTY)
        say(visit.page, NASTY)
        live(visit.page).to_contain_text(f"{NASTY}: {NASTY} (")
        expect(visit.page.locator(".turns .user, .turns .text")).to_have_text([NASTY] * 2)
        box(visit.page, "Text to classify").fill(NASTY)
        visit.page.get_by_role("button", name="Classify").click()
        expect(visit.page.locator("#readings h3")).to_have_text(["base", NASTY])
        live(visit.page).to_contain_text(f"{NASTY}: negative")
        box(visit.page, "Text to continue").fill(NASTY)
        visit.page.get_by_role("button", name="Generate").click()
        expect(visit.page.locator("#continuations .text")).to_have_text([NASTY + NASTY] * 2)
        assert visit.page.evaluate("window.hacked") is None
        assert visit.page.locator("img, b").count() == 0 and visit.page.locator("script").count() == 1
        assert all(requested.startswith(f"{url}/") for requested in visit.urls) and visit.log == []
        visit.context.close()


def test_the_policy_refuses_a_script_that_came_in_all_the_same(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    visit.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked = 1'}))")
    assert visit.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in visit.log)
    visit.context.close()


def test_without_scripts_it_says_so(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, java_script_enabled=False)
    assert visit.page.locator("noscript").is_visible()
    visit.context.close()
