"""Runs `python -m graftlm …` many times: libraries are imported once, every command is a fork of this process.

Reads one JSON line a job from standard input and answers each with a line:

    words, environment [a dict for each rank], folder, stop_at   ->   status [of each rank], out, err

`out` is the output of rank 0. stop_at: [file, lines]: SIGTERM once the file has that many lines. graftlm is
imported in the fork only, so each command starts as a new process would, but for the libraries.
"""

import json
import os
import runpy
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "tokenizers", "rich.progress")
"""What takes a command a second or two to import, which torch does itself as soon as an optimizer is made."""
TIMEOUT_S, AFTER_FAILURE_S, POLL_S = 240.0, 10.0, 0.002


def child(words: list[str], environment: dict[str, str], folder: Path, number: int) -> None:
    """Run the command in this fork; never returns."""
    for target, name in ((1, f"out-{number}"), (2, f"err-{number}")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 - the process's own
    os.environ.update(environment)
    sys.argv = ["graft", *words]
    status = 1
    try:
        runpy.run_module("graftlm", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def lines_in(path: Path) -> int:
    """Lines of a file that may not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait(pids: list[int], stop_at: list[Any] | None) -> list[int]:
    """Exit statuses; all are killed after a timeout, or soon after one has failed."""
    status: dict[int, int] = {}
    end = time.monotonic() + TIMEOUT_S
    while len(status) < len(pids):
        for pid in [pid for pid in pids if pid not in status]:
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                status[pid] = os.waitstatus_to_exitcode(code)
                if status[pid]:
                    end = min(end, time.monotonic() + AFTER_FAILURE_S)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            elif stop_at and lines_in(Path(stop_at[0])) >= stop_at[1]:
                os.kill(pid, signal.SIGTERM)
                stop_at = None
        time.sleep(POLL_S)
    return [status[pid] for pid in pids]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in one fork, or in several."""
    folder, pids = Path(job["folder"]), []
    for number, environment in enumerate(job["environment"]):
        pid = os.fork()
        if not pid:
            child(job["words"], environment, folder, number)
        pids.append(pid)
    status = wait(pids, job["stop_at"])
    out, err = ((folder / f"{name}-0").read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))
    return {"status": status, "out": out, "err": err}


def main() -> None:
    """Answer jobs until standard input ends."""
    for name in PRELOADED:
        import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
