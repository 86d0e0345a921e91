"""The site of docs/, built strictly and shown in a real browser: mathematics, lists, width, no other hosts.

Needs Debian's chromium. Where there is none these tests do not run, and pytest's summary says so; in CI they fail.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
PAGES = [str(page.relative_to(ROOT / "docs")) for page in sorted((ROOT / "docs").rglob("*.md"))]
PROBLEMS = r"""() => {
  const found = [];
  const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode;
    if (text.parentElement.closest("code, pre, script, style, math")) continue;
    if (/\$[A-Za-z\\(]|\\[a-z]{2,}|\\\(/.test(text.data)) found.push("mathematics: " + text.data);
    if (/\n\s*([-*+]|\d+\.) \S/.test(text.data)) found.push("list: " + text.data);
    if (/^ *\|.*\|/m.test(text.data)) found.push("table: " + text.data);
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) found.push(`width: ${page.scrollWidth} of ${page.clientWidth} pixels`);
  for (const image of document.querySelectorAll("article img"))
    if (!image.naturalWidth) found.push("picture: " + image.src);
  return found;
}"""
"""What a reader would stumble over."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture
def phone(browser: Browser) -> Page:
    return browser.new_page(viewport={"width": 390, "height": 800})


def test_every_page_reads_well_on_a_phone(site: Path, phone: Page) -> None:
    """Pages are narrowest there; what fits a phone fits a desk."""
    requested: set[str] = set()
    phone.on("request", lambda request: requested.add(request.url))
    problems = {}
    for page in PAGES:
        name = re.sub(r"README\.md$|index\.md$", "index.html", page).replace(".md", ".html")
        phone.goto((site / name).as_uri())
        problems[page] = phone.evaluate(PROBLEMS)
    assert {page: found for page, found in problems.items() if found} == {}
    assert {url for url in requested if not url.startswith("file:")} == set()


def test_every_formula_of_the_theory_is_shown_as_mathematics(site: Path) -> None:
    for page in (ROOT / "docs" / "theory").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        blocks, inline = (
            re.findall(r"^```math$", text, re.M),
            re.findall(r"(?<![\\$])\$[^$]+\$", re.sub(r"```.*?```", "", text, flags=re.S)),
        )
        shown = (site / "theory" / page.name.replace("README.md", "index.html").replace(".md", ".html")).read_text(
            encoding="utf-8"
        )
        assert shown.count('class="equation"') == len(blocks)
        assert shown.count("<math") == len(blocks) + len(inline), page.name


def test_the_problems_would_be_found(phone: Page) -> None:
    phone.set_content(
        r"<article>$W_0$ and \frac<p>a list:"
        "\n- one\n- two</p><p>| a | b |</p><img src='none.png'><div style='width: 600px'>wide</div></article>"
    )
    kinds = [problem.partition(":")[0] for problem in phone.evaluate(PROBLEMS)]
    assert kinds == ["mathematics", "list", "table", "width", "picture"]
