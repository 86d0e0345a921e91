"""Make the pictures of the docs from a real run: `make pictures`, about ten minutes on two cores.

    python docs/_pictures.py [--out docs/pictures] [--max_iters 200]

- session.svg: a recording of graft train, evaluate and generate; the lines appear as they were printed, with pauses
  shortened to PAUSE seconds.
- report.png: the page of `graft report`. chat.png and labels.png: the page of `graft serve`.

Needs Debian's chromium and the extra dev.
"""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console
from rich.text import Text

COLUMNS = 88
PAUSE = 1.2
RUN = "runs/mine"
Line = tuple[float, str]


def record(command: str, folder: Path) -> list[Line]:
    """The lines of a command as a terminal shows them, each with the seconds after the one before."""
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
    return [*lines, (0.0, "")]


def animate(lines: list[Line]) -> str:
    """An SVG in which the lines appear one after the other. It loads no font from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    delays, now = [], 0.0
    for pause, line in lines:
        now += min(pause, PAUSE)
        wrapped = Text(line, style="bold" if line.startswith("$ ") else "").wrap(console, COLUMNS)
        delays += [now] * len(wrapped)
        for part in wrapped:
            console.print(part)
    svg = console.export_svg(title="graft")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)

    def delayed(match: re.Match[str]) -> str:
        return f'<text style="animation: show 1ms {delays[int(match[2])]:.2f}s both" {match[1]}'

    svg = re.sub(r'<text ([^>]*clip-path="url\(#[\w-]+-line-(\d+)\)")', delayed, svg)
    return svg.replace("</style>", "@keyframes show { from { visibility: hidden } }\n</style>", 1)


def session(out: Path, folder: Path, max_iters: int, limit: int) -> None:
    """Train, evaluate before and after, and generate."""
    settings = f"--rank 16 --alpha 64 --lr 5e-4 --batch_size 5 --max_iters {max_iters} --eval_every {max_iters // 4}"
    shortened = f" --limit {limit}" if limit else ""
    commands = [
        f"graft train {settings} --val_limit 64 --out_dir {RUN}",
        f"graft evaluate {RUN} --mode score{shortened}",
        f"graft evaluate {RUN} --mode score{shortened} --checkpoint base",
    ]
    lines = [line for command in commands for line in record(command, folder)]
    (out / "session.svg").write_text(animate(lines), encoding="utf-8")


def report(out: Path, folder: Path, page: Page) -> None:
    """The report of the run."""
    record(f"graft report {RUN} --out report.html", folder)
    page.goto((folder / "report.html").as_uri())
    page.screenshot(path=out / "report.png")


def serve(out: Path, folder: Path, page: Page) -> None:
    """A chat with the base model, and the label probabilities of a review by the base and by the run."""
    command = [sys.executable, "-m", "graftlm", "serve", RUN, "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            page.goto(json.loads(server.stdout.readline())["url"])
            page.get_by_role("tab", name="Chat").click()
            page.locator("#message").fill("Write a short poem about the sea.")
            page.get_by_role("button", name="Send").click()
            page.locator("#chat-form .stop").wait_for(state="attached")
            page.wait_for_function("document.querySelector('#chat-form .stop').disabled", timeout=120_000)
            page.screenshot(path=out / "chat.png")
            page.get_by_role("tab", name="Label probabilities").click()
            page.locator("#review").fill("Two hours that nobody will give me back.")
            page.get_by_role("button", name="Classify").click()
            page.locator("#readings li").nth(1).wait_for(timeout=120_000)
            page.screenshot(path=out / "labels.png")
        finally:
            server.terminate()


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--max_iters", type=int, default=200)
    parser.add_argument("--limit", type=int, default=0, help="test reviews; 0: all")
    flags = parser.parse_args()
    out = flags.out.resolve()
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        session(out, folder, flags.max_iters, flags.limit)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        report(out, folder, page)
        serve(out, folder, page)
        browser.close()


if __name__ == "__main__":
    main()
