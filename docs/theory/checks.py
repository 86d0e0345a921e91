"""Computes both sides of every equation in these pages and writes the numbers under them.

    python docs/theory/checks.py

Text between `<!-- 3.4 -->` and `<!-- end -->` is replaced; the rest is written by hand. tests/test_theory.py computes
the same, flips every sign, and checks that the pages equal this command's output. The checks of preferences.md are in
preferences.py.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1] / "src")]

import counting  # noqa: E402, F401
import in_context  # noqa: E402, F401
import low_rank  # noqa: E402, F401
import preferences  # noqa: E402, F401
import prefix  # noqa: E402, F401
from _equation import EQUATIONS  # noqa: E402

MARK = re.compile(r"<!-- (?!end)(\S+) -->\n.*?<!-- end -->", re.DOTALL)
PAGES = ("low_rank.md", "prefix.md", "preferences.md", "counting.md", "in_context.md")


def computed() -> dict[str, str]:
    """Number -> the equation's table."""
    return {number: equation.table() for number, equation in EQUATIONS.items()}


def fill(text: str, found: Mapping[str, str]) -> str:
    """A page with each marked part replaced; KeyError for an unknown mark."""
    return MARK.sub(lambda match: f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- end -->", text)


def main(words: Sequence[str] | None = None) -> int:
    """Check everything and write the pages; status 1, and nothing written, if an equation does not hold."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    wrong = [f"({n}) {row.what}" for n, e in EQUATIONS.items() for row in e.check() if not row.holds]
    if wrong:
        print("\n".join(f"error: does not hold: {line}" for line in wrong), file=sys.stderr)
        return 1
    found = computed()
    for page in PAGES:
        path = FOLDER / page
        path.write_text(fill(path.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"docs/theory: {len(EQUATIONS)} equations hold, {len(PAGES)} pages written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
