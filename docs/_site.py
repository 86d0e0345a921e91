"""mkdocs hook: rewrite links out of docs/ to the repository's URL, or to plain text if it has none.

On a code host, pages link to the source next to them; the site has no source. Other links stay, so mkdocs still reports
broken ones.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its outward links rewritten."""
    here = Path(config["docs_dir"]) / page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        text, target = match.groups()
        name, sep, anchor = target.partition("#")
        there = (here.parent / name).resolve()
        inside = there.is_relative_to(Path(config["docs_dir"])) and there.suffix in (".md", ".svg", ".png")
        if re.match(r"[a-z]+:|#", target) or inside or not there.exists():
            return match[0]
        if not config["repo_url"]:
            return text
        return f"[{text}]({config['repo_url'].rstrip('/')}/blob/main/{there.relative_to(ROOT)}{sep}{anchor})"

    return re.sub(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", rewritten, markdown)
