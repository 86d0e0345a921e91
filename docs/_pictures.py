"""Make the pictures of the docs from a real run: `make pictures`, about ten minutes on two busy cores.

    python docs/_pictures.py [--out docs/pictures] [--max_iters 200] [--work FOLDER]

- session.svg: a recording of graft train and evaluate; the lines appear as they were printed, with pauses shortened to
  PAUSE seconds.
- report.png: the page of `graft report`. chat.png and labels.png: the page of `graft serve`.

Needs Debian's chromium and the extra dev.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

from playwright.sync_api import FloatRect, Locator, Page, expect, sync_playwright
from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 80, 26
PAUSE, HOLD = 1.2, 12.0
LINE, CHARACTER, MARGIN, GAP = 19, 8.4, 16, 4  # pixels
TYPED = ' class="typed"'
RUN = "runs/mine"
MESSAGES = ("What makes a film worth watching? Answer in two sentences.", "Write one sentence about the sea.")
Line = tuple[float, str]


def record(command: str, folder: Path) -> list[Line]:
    """The lines of a command as a terminal shows them, each with the seconds after the one before.

    They are kept in the folder: the same command there is not run twice.
    """
    kept = folder / "session.json"
    session: dict[str, list[Line]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if command in session:
        return session[command]
    lines = [(PAUSE, f"$ {command}")]
    words = [sys.executable, "-m", "graftlm", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONUNBUFFERED": "1"}
    before = time.perf_counter()
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append((time.perf_counter() - before, line.rstrip()))
            before = time.perf_counter()
    if child.returncode:
        raise SystemExit(f"{command}: exit status {child.returncode}: {lines[-1][1]}")
    session[command] = [*lines, (0.0, "")]
    kept.write_text(json.dumps(session, ensure_ascii=False, indent=1), encoding="utf-8")
    return session[command]


def animate(lines: list[Line]) -> str:
    """An SVG of a terminal of COLUMNS × ROWS that scrolls, again and again. Where nothing may move it shows the end."""
    shown: list[tuple[float, str, bool]] = []
    now = -min(lines[0][0], PAUSE)
    for pause, line in lines:
        now += min(pause, PAUSE)
        wrapped = Text(line).wrap(Console(width=COLUMNS), COLUMNS)
        shown += [(now, part.plain.rstrip(), line.startswith("$ ")) for part in wrapped]
    end = now + HOLD
    scroll, curtain = [], []
    for number, (start, *_) in enumerate(shown, 1):
        scroll.append(f"{100 * start / end:.2f}% {{ transform: translateY({LINE * min(0, ROWS - number)}px) }}")
        curtain.append(f"{100 * start / end:.2f}% {{ transform: translateY({LINE * (number - len(shown))}px) }}")
    texts = "\n".join(
        f'<text{TYPED * typed} y="{LINE * n + 14}" textLength="{CHARACTER * len(line):.1f}">{escape(line)}</text>'
        for n, (_, line, typed) in enumerate(shown)
        if line
    )
    width, height = round(COLUMNS * CHARACTER) + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    last = LINE * min(0, ROWS - len(shown))
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>
text {{ fill: #d0d7de; font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre }}
.typed {{ fill: #7ee787; font-weight: bold }}
.scroll {{ transform: translateY({last}px) }}
@media (prefers-reduced-motion: no-preference) {{
  .scroll {{ animation: scroll {end:.1f}s step-end infinite }}
  .curtain {{ animation: curtain {end:.1f}s step-end infinite }}
}}
@keyframes scroll {{ {" ".join(scroll)} }}
@keyframes curtain {{ {" ".join(curtain)} }}
</style>
<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="8" fill="#161b22" stroke="#57606a"/>
<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN}" height="{ROWS * LINE}">
<g class="scroll">
{texts}
<rect class="curtain" y="{LINE * len(shown)}" width="{width}" height="{LINE * len(shown)}" fill="#161b22"/>
</g>
</svg>
</svg>
"""


def session(out: Path, folder: Path, max_iters: int, limit: int) -> None:
    """Train, and evaluate after and before."""
    settings = f"--rank 16 --alpha 64 --lr 5e-4 --batch_size 5 --max_iters {max_iters} --eval_every {max_iters // 4}"
    shortened = f" --limit {limit}" if limit else ""
    commands = [
        f"graft train {settings} --val_limit 64 --out_dir {RUN}",
        f"graft evaluate {RUN} --mode score{shortened}",
        f"graft evaluate {RUN} --mode score{shortened} --checkpoint base",
    ]
    lines = [line for command in commands for line in record(command, folder)]
    (out / "session.svg").write_text(animate(lines), encoding="utf-8")


def shoot(page: Page, path: Path, first: Locator, last: Locator) -> None:
    """A screenshot from the top of an element to the bottom of another one."""
    top, bottom = first.bounding_box(), last.bounding_box()
    assert top and bottom and page.viewport_size
    y, end = top["y"] - GAP, bottom["y"] + bottom["height"] + GAP
    clip = FloatRect(x=0, y=y, width=page.viewport_size["width"], height=end - y)
    page.screenshot(path=path, full_page=True, clip=clip)


def report(out: Path, folder: Path, page: Page) -> None:
    """The report of the run."""
    subprocess.run([sys.executable, "-m", "graftlm", "report", RUN, "--out", "report.html"], cwd=folder, check=True)
    page.goto((folder / "report.html").as_uri())
    shoot(page, out / "report.png", page.locator("#results"), page.locator("[data-chart=train_loss] .plot"))


def serve(out: Path, folder: Path, page: Page) -> None:
    """A chat with the base model, and the label probabilities of a review by the base and by the run."""
    command = [sys.executable, "-m", "graftlm", "serve", RUN, "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            page.goto(json.loads(server.stdout.readline())["url"])
            page.get_by_role("tab", name="Chat").click()
            page.locator("#temperature").fill("0")
            for number, message in enumerate(MESSAGES):
                page.locator("#message").fill(message)
                page.get_by_role("button", name="Send").click()
                foot = page.locator(".turns .foot").nth(number)
                expect(foot).to_contain_text(" tokens in ", timeout=300_000)
            shoot(page, out / "chat.png", page.locator("h1"), page.locator("#settings"))
            page.get_by_role("tab", name="Label probabilities").click()
            page.locator("#review").fill("Two hours that nobody will give me back.")
            page.get_by_role("button", name="Classify").click()
            page.locator("#readings li").nth(1).wait_for(timeout=300_000)
            shoot(page, out / "labels.png", page.locator("h1"), page.locator("#readings"))
        finally:
            server.terminate()


@contextlib.contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is removed in the end."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--max_iters", type=int, default=200)
    parser.add_argument("--limit", type=int, default=400, help="test reviews; 0: all")
    parser.add_argument("--work", type=Path, help="a folder that keeps the run, so that it is not made again")
    flags = parser.parse_args()
    out = flags.out.resolve()
    out.mkdir(exist_ok=True)
    with work_folder(flags.work) as folder, sync_playwright() as playwright:
        session(out, folder, flags.max_iters, flags.limit)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        report(out, folder, page)
        serve(out, folder, page)
        browser.close()


if __name__ == "__main__":
    main()
