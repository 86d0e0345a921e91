"""Mutation testing: is there a test that fails when the code is wrong?

    python tests/mutation/run.py --work DIR [--mutants 300] [--seed 0] [--minutes 30] [--only training]

Draws mutants of the parts that compute (`mutants.py`), runs the tests of their module against each, and prints how many
were killed, with Wilson's interval, and each one that survived. What is done stands in DIR/results.jsonl, so a run may
be stopped and goes on where it was; the draw is a function of the seed and of the source.

What is unusual here: this process has imported torch and pytest, and each mutant is a fork of it, in which the import
of one module gives the mutant's code. A mutant costs seconds and nothing of it is ever on the disk. Its time is bounded
in CPU seconds, so that a busy machine kills nothing. A mutant counts as killed where a test fails, an import fails or
the time is up.
"""

import argparse
import ast
import importlib.machinery
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SRC = ROOT / "src"
sys.path[:0] = [str(TESTS), str(SRC)]
os.environ["OMP_NUM_THREADS"] = "1"

from mutation.mutants import Mutant, mutants, mutated  # noqa: E402

UNIT, CONTRACT = "tests/methods/test_", "tests/contracts/test_methods.py"
EQUATIONS, PEFT = "tests/methods/test_equations.py", "tests/exchange/test_peft.py"
REGISTRY = f"{UNIT}registry.py"
FOLDERS = [
    PEFT,
    "-k",
    "not real_weights and (gpt2 or refused or understood or files_hold or fused or once or block or none or pattern)",
]
TRAIN, FLOAT16 = "tests/training/test_train.py", "tests/training/test_float16.py"
EXAMPLES = [
    "tests/text/test_data.py",
    "tests/text/test_chat.py",
    "tests/training/test_conversations.py",
    "-k",
    "not real and not no_torch",
]


def contract(words: str, *more: str, also: str = "") -> list[str]:
    """The contract and the equation for the methods named, in float64 on GPT-2; `more`: files that count whole."""
    names = "".join(f" or {Path(file).name}" for file in more)
    chosen = f"(gpt2 and ({words})){names}{also}"
    return [*more, CONTRACT, EQUATIONS, "-k", f"not real_weights and not bfloat16 and not float32 and ({chosen})"]


CHOSEN: dict[str, list[str]] = {
    "methods/__init__": contract("lora or adapter", REGISTRY, "tests/fuzz/test_fuzz.py", also=" and not inputs_give"),
    "methods/accounting": [f"{UNIT}accounting.py", "-k", "not dora or gpt2"],
    "methods/adapter": contract("adapter", REGISTRY),
    "methods/base": contract("lora or full or bitfit", f"{UNIT}lora.py", REGISTRY),
    "methods/bitfit": contract("bitfit", REGISTRY),
    "methods/dora": contract("dora", PEFT, also=" and dora and gpt2"),
    "methods/folding": contract("lora", f"{UNIT}lora.py"),
    "methods/full": contract("full", REGISTRY),
    "methods/ia3": contract("ia3", PEFT, also=" and ia3"),
    "methods/lora": contract("lora", f"{UNIT}lora.py"),
    "methods/lora_peft": FOLDERS,
    "methods/peft_folders": FOLDERS,
    "methods/prefix": contract("prefix", f"{UNIT}prefix.py", PEFT, also=" and prefix"),
    "methods/stack": [f"{UNIT}stack.py", "-k", "not real_weights"],
    "training/objectives": [
        "tests/training/test_objectives.py",
        "tests/training/test_preferences.py",
        "-k",
        "test_objectives or fork or parts",
    ],
    "training/preferences": ["tests/training/test_preferences.py", "-k", "fork or parts or each_loss or hinge"],
    "training/checkpoint": [
        "tests/training/test_checkpoint.py",
        TRAIN,
        FLOAT16,
        "-k",
        "test_checkpoint or test_float16 or run_folder or every_checkpoint or longer or (same_end and (lora or full))",
    ],
    "text/data": EXAMPLES,
    "text/preflight": EXAMPLES,
}
"""Module -> what pytest is given: its unit tests and what of the contracts concerns it, some seconds each."""

CPU_SECONDS, WALL_SECONDS = 120, 900
"""Without a mutant. With one, four times the seconds that its tests took without, and ten more."""


def fork(
    file: str | None, tree: ast.Module | None, words: list[str], cpu_seconds: int = CPU_SECONDS
) -> tuple[int | None, float, str]:
    """Run tests in a fork where `file` is `tree`: pytest's status, None where the time was up; seconds; last lines."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as heard:
        child = os.fork()
        if child == 0:
            os.dup2(heard.fileno(), 1)
            os.dup2(heard.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
            signal.alarm(WALL_SECONDS)
            status = tests_with(file, tree, words)
            sys.stdout.flush()
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        heard.seek(0)
        last = heard.read()[-600:]
    return os.WEXITSTATUS(ended) if os.WIFEXITED(ended) else None, time.monotonic() - began, last


def tests_with(file: str | None, tree: ast.Module | None, words: list[str]) -> int:
    import pytest

    if file is not None:
        before = importlib.machinery.SourceFileLoader.get_code

        def get_code(self: Any, name: str) -> Any:
            path = self.get_filename(name)
            return compile(tree, path, "exec") if path == str(SRC / "graftlm" / file) else before(self, name)

        importlib.machinery.SourceFileLoader.get_code = get_code
    sys.dont_write_bytecode = True
    try:
        calm = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "--rootdir", str(ROOT)]
        return int(pytest.main(["-x", "-q", *calm, *words]))
    except BaseException:  # of pytest itself, since a test's own is a failure to it
        traceback.print_exc()
        return 3


def source_of(name: str) -> str:
    return (SRC / "graftlm" / f"{name}.py").read_text(encoding="utf-8")


def drawn(count: int, seed: int, only: str) -> list[tuple[Mutant, str]]:
    """The mutants of this run and their modules, by module."""
    every = [(mutant, name) for name in CHOSEN for mutant in mutants(f"{name}.py", source_of(name))]
    picked = random.Random(seed).sample(range(len(every)), min(count, len(every)))
    print(f"{len(every)} mutants, {len(picked)} drawn")
    return [every[n] for n in sorted(picked) if every[n][1].startswith(only)]


def table(results: list[dict[str, Any]]) -> None:
    from graftlm.inference.statistics import wilson

    print(f"\n{'module':24} {'mutants':>7} {'killed':>6} {'survived':>8}")
    for name in [*CHOSEN, ""]:
        of = [each for each in results if each["file"] == f"{name}.py" or not name]
        killed = sum(each["killed"] for each in of)
        if of:
            print(f"{name or 'all':24} {len(of):7} {killed:6} {len(of) - killed:8}")
    low, high = wilson(sum(each["killed"] for each in results), len(results))
    print(f"killed: {sum(each['killed'] for each in results) / len(results):.1%}, 95% from {low:.1%} to {high:.1%}\n")
    for each in results:
        if not each["killed"]:
            print(f"src/graftlm/{each['file']}:{each['line']}: {each['was']}  ->  {each['becomes']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no mutant behind these")
    parser.add_argument("--only", default="", help="of the modules whose name begins so")
    parser.add_argument("--again", action="store_true", help="run what survived once more, as behind a new test")
    given = parser.parse_args()
    os.chdir(ROOT)
    given.work.mkdir(parents=True, exist_ok=True)
    import numpy  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    chosen = drawn(given.mutants, given.seed, given.only)
    log = given.work / "results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    done = {each["key"]: each for each in map(json.loads, lines)}
    begun, plain = time.monotonic(), dict[str, float]()
    for mutant, name in chosen:
        old = done.get(mutant.key)
        if old is not None and old["was"] == mutant.was and (old["killed"] or not given.again):
            continue
        if time.monotonic() - begun > given.minutes * 60:
            break
        if name not in plain:
            status, seconds, last = fork(None, None, CHOSEN[name])
            print(f"{name}: {seconds:.0f} s without a mutant", flush=True)
            if status != 0:
                print(last, f"\n{name}: its tests fail without a mutant", file=sys.stderr)
                return 1
            plain[name] = seconds
        status, seconds, last = fork(
            mutant.file, mutated(source_of(name), mutant), CHOSEN[name], int(10 + 4 * plain[name])
        )
        assert status not in (4, 5), last
        row = {"key": mutant.key, **asdict(mutant), "killed": status != 0, "seconds": round(seconds, 1)}
        done[mutant.key] = row
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    results = [done[mutant.key] for mutant, _ in chosen if mutant.key in done]
    if results:
        table(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
