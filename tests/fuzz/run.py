"""All fuzzers, one command: `python tests/fuzz/run.py --inputs 10000 [--only NAME] [--seed N]`.

Prints a line a target: inputs, results, GraftErrors, tracebacks (hangs, panics and too much memory among them), the
slowest input and the memory that the inputs took at most; the last line is the same as one JSON object. A defect's
first traceback and input go to the standard error. Each target is a process of its own, a fork of the one that has
imported everything.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

from fuzz import adapters_, models_, requests_, settings_, tables, templates  # noqa: E402
from fuzz.base import Target, fuzz  # noqa: E402

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (settings_, templates, tables, models_, adapters_, requests_)
    for target in module.TARGETS
}


def one(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """A target in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(TARGETS[name], inputs, Path(folder), seed)
        os.chdir("/")
    for key, (trace, content) in tally.defects.items():
        print(f"{name}: {tally.counts[key]} times {key}\n{content}\n{trace}", file=sys.stderr)
    return {"target": name, **tally.to_json(), "defects": dict(tally.counts)}


def apart(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """A target in a fork; one that ends otherwise than by itself is a defect."""
    fork = multiprocessing.get_context("fork")
    answer, said = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: said.send(one(name, inputs, seed)))
    child.start()
    said.close()
    with answer, contextlib.suppress(EOFError):  # it ended without a word; its traceback is on the standard error
        found = dict(answer.recv())
    child.join()
    if child.exitcode == 0:
        return found
    ended = {"died": f"ended with status {child.exitcode}", "tracebacks": 1}
    return {"target": name, "inputs": 0, "results": 0, "errors": 0, "slowest_seconds": 0, "megabytes": 0, **ended}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each target")
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first input")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    print(f"{'target':22} {'inputs':>7} {'results':>8} {'errors':>7} {'tracebacks':>10} {'slowest':>9} {'memory':>9}")
    found = []
    for name in [given.only] if given.only else TARGETS:
        found.append(apart(name, given.inputs, given.seed))
        each = found[-1]
        print(
            f"{name:22} {each['inputs']:7} {each['results']:8} {each['errors']:7} {each['tracebacks']:10} "
            f"{each['slowest_seconds']:7.2f} s {each['megabytes']:6.1f} MB",
            flush=True,
        )
    print(json.dumps(found))
    return 1 if any(each["tracebacks"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
