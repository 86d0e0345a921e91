"""mkdocs hooks: what a code host shows and mkdocs alone does not.

- Links out of docs/ go to the repository's URL, of pyproject.toml: the site has no source. Other links stay, so mkdocs
  still reports broken ones. (The theme's own repo_url would ask the code host for stars whenever a page is read.)
- A list may follow a paragraph without a blank line.
- Mathematics becomes MathML, which browsers show without a script.
- A flag in the text is not broken between its dashes.
"""

import html
import re
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
FENCE = re.compile(r"^ *(```|~~~)")
FLAG = re.compile(r"(?<![\w-])--[\w-]+")
ITEM = re.compile(r"^ *([-*+]|\d+\.) ")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its outward links rewritten, and a blank line before each list."""
    return _separate_lists(_rewrite_links(markdown, page, config))


def _separate_lists(markdown: str) -> str:
    lines: list[str] = []
    in_code = False
    for line in markdown.split("\n"):
        in_code ^= bool(FENCE.match(line))
        before = lines[-1] if lines else ""
        if ITEM.match(line) and not in_code and before.strip() and before[0] != " " and not ITEM.match(before):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its mathematics rendered, and flags that stay whole."""
    content = re.sub(r"<code>[^<]+</code>", lambda m: FLAG.sub(r'<span class="flag">\g<0></span>', m[0]), content)
    content = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _math(m[1], "inline"), content, flags=re.S
    )
    return re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _math(m[1], "block"), content, flags=re.S)


def _math(source: str, display: str) -> str:
    """A formula as MathML; the number of an equation follows it."""
    source = html.unescape(source).strip()
    tag = re.search(r"\\tag\{(.*?)\}", source)
    formula = convert(source.replace(tag[0], "") if tag else source, display=display)
    if display == "inline":
        return formula
    number = f"<span>({tag[1]})</span>" if tag else ""
    return f'<div class="equation">{formula}{number}</div>'


def _rewrite_links(markdown: str, page: Any, config: Any) -> str:
    here = Path(config["docs_dir"]) / page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        text, target = match.groups()
        name, sep, anchor = target.partition("#")
        there = (here.parent / name).resolve()
        inside = there.is_relative_to(Path(config["docs_dir"])) and there.suffix in (".md", ".svg", ".png")
        if re.match(r"[a-z]+:|#", target) or inside or not there.exists():
            return match[0]
        return f"[{text}]({REPOSITORY}/blob/main/{there.relative_to(ROOT)}{sep}{anchor})"

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", rewritten, markdown)
