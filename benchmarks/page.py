"""Make all pages that show measured results: benchmarks.md, dpo_frontier.md, handout.md, lora_without_regret.md,
methods.md and prompting.md in docs/.

    python benchmarks/page.py

The rows of docs/benchmarks.md are listed in claims.toml. The same results always give the same pages.
"""

import argparse
import sys
import tomllib
from pathlib import Path

import frontier_page
import handout
import lora_without_regret
import peft_anchor
import prompting
from harness import ROOT
from render import DOCS, WORDS, all_results, fill, machine, markdown, results

PROCESSORS = {
    "6/167/1": "Intel 6/167, amx_bf16",
    "6/207/2": "Intel 6/207, avx512_bf16",
    "25/1/1": "AMD Zen 3, avx2",
    "25/17/1": "AMD Zen 4, avx512_bf16",
    "26/2/1": "AMD Zen 5, avx512_bf16",
}


CLAIMS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))


def rows(kind: str, text: str, figures: str, ratio: str, goals: str) -> list[list[str]]:
    """The cells of one claim, for each processor that has such a result and, where one is named, the ratio."""
    found = []
    for result in results(kind):
        measured = result.get("ratios", {}).get(ratio)
        if ratio and measured is None:
            continue
        goal = next((goal for goal in goals.split(" | ") if goal in result["claims"]), "")
        rounds = ", ".join(f"{x:.2f}" for x in measured["rounds"]) if measured else ""
        found.append(
            [
                text,
                figures.format(m=result.get("medians", {}), **result),
                f"**{measured['median']:.2f}** ({rounds})" if measured else "",
                f"{goal}: {WORDS[result['claims'][goal]]}" if goal else "",
                PROCESSORS[result["machine"]["family_model_stepping"]],
                f"[{result['date']}](../benchmarks/results/{result['file']})",
                f"`{CLAIMS[kind]['command']}`",
            ]
        )
    return found


def pages() -> dict[Path, str]:
    """docs/benchmarks.md from the committed results."""
    head = ("this / that", "figures", "ratio (rounds)", "goal", "machine", "date", "command")
    cells = [row for kind, about in CLAIMS.items() for claim in about["rows"] for row in rows(kind, *claim)]
    every = {result["machine"]["family_model_stepping"]: result for kind in CLAIMS for result in results(kind)}
    machines = "\n".join(f"- {PROCESSORS[key]}: {machine(every[key]).partition('; ')[0]}." for key in sorted(every))
    table = markdown(head, cells, left=len(head))
    anchor = {"anchor": peft_anchor.block(all_results("peft-anchor"))}
    page = DOCS / "benchmarks.md"
    return {page: fill(page.read_text(encoding="utf-8"), {"claims": table, **anchor, "machines": machines})}


def all_pages() -> dict[Path, str]:
    """Every page and picture that is made from results."""
    makers = (pages, handout.pages, frontier_page.pages, lora_without_regret.pages, prompting.pages)
    return {path: text for make in makers for path, text in make().items()}


def main() -> int:
    """Write what has changed."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    for path, text in all_pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
