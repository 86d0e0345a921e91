"""Golden values: what a checkout computes, to the last bit, so that a restructuring can prove that nothing moved.

    python tests/golden/record.py --checkout DIR --out FILE.json     run everything against DIR/src, save the values
    python tests/golden/record.py --compare OLD.json NEW.json        exit status 1 if a value differs or is missing

Recorded, in float32 on the CPU with one thread and fixed seeds: every method on every model family (losses of 20 steps,
the adapter's bytes, scores and generated labels of 100 reviews, greedy texts), preferences with every loss, variants of
a run (accumulation, kernels, activation cache, sharding), two processes, resumed runs, sampling, few-shot prompts,
pairs, a server, estimates, exports, imports, and a few steps of the real SmolLM2-135M. The command is the only
interface: `python -m graftlm` runs in forks of one process that has imported torch (`worker.py`); two processes get the
variables that torchrun sets. Where subcommands, flags and keys were renamed, `spelling.py` has both spellings.

    --only 'train/lora/*'    only the jobs whose key matches (some jobs use the runs of train/*/llama/sft)
    --no_real_model          leave out SmolLM2-135M
    --work DIR               an empty folder for models and runs, which stays; else a temporary one
    --tolerance 1e-6         allowed relative difference of numbers; above 0, hashes of tensors are not compared, only
                             their norms and sums. Default 0: to the bit

Bits depend on the processor, the compiler and the version of torch: compare recordings of one machine, and commit none.
Record a checkout that does not change meanwhile (git worktree add --detach). A recording takes 3 minutes of one core.
Needs the network or a filled cache for SmolLM2-135M and the reviews, and Linux.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
SHOWN = 60
Values = dict[str, Any]


# Compare --------------------------------------------------------------------------------------------------------------


def differences(old: Values, new: Values, tolerance: float = 0.0) -> Iterator[str]:
    """A line for each key that is missing on one side, differs beyond the tolerance, or whose command failed."""
    for key in sorted(old.keys() | new.keys()):
        if key.endswith("/failed"):
            yield f"{key}: {new.get(key, old.get(key))}"
        elif key not in new:
            yield f"{key}: missing in the new recording"
        elif key not in old:
            yield f"{key}: missing in the old recording"
        elif not (tolerance and key.endswith("sha256")) and (line := difference(old[key], new[key], tolerance)):
            yield f"{key}: {line}"


def difference(old: Any, new: Any, tolerance: float = 0.0) -> str:
    """How two values differ, in a line; empty if they do not, beyond the tolerance."""
    if not (isinstance(old, list) and isinstance(new, list)):
        old, new = [old], [new]
    if len(old) != len(new):
        return f"{len(old)} values, now {len(new)}"
    worst, where, count = 0.0, 0, 0
    for n, (one, two) in enumerate(zip(old, new, strict=True)):
        by = relative(one, two)
        count += by > tolerance
        if by > worst:
            worst, where = by, n
    if not count:
        return ""
    far = "not comparable" if math.isinf(worst) else f"largest relative difference {worst:.3g}"
    place = f" at {where}" if len(old) > 1 else ""
    return f"{count} of {len(old)} differ, {far}{place}: {_short(old[where])}, now {_short(new[where])}"


def relative(old: Any, new: Any) -> float:
    """The relative difference of two numbers; of anything else 0 if they are equal, else infinity."""
    if type(old) is type(new) is list:
        return max(map(relative, old, new), default=0.0) if len(old) == len(new) else math.inf
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    if not numbers:
        return 0.0 if type(old) is type(new) and old == new else math.inf
    if old == new or (math.isnan(old) and math.isnan(new)):
        return 0.0
    by = abs(old - new) / max(abs(old), abs(new))
    return math.inf if math.isnan(by) else by


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def compare(old: Path, new: Path, tolerance: float) -> int:
    """Print what differs between two recordings; the exit status."""
    one, two = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    if one["machine"] != two["machine"]:
        print(f"note: recorded on other machines: {one['machine']}, now {two['machine']}", file=sys.stderr)
    lines = list(differences(one["values"], two["values"], tolerance))
    print("".join(f"{line}\n" for line in lines), end="")
    print(f"{len(one['values'])} and {len(two['values'])} values, {len(lines)} differ", file=sys.stderr)
    return 1 if lines or not one["values"] else 0


# Record ---------------------------------------------------------------------------------------------------------------


def record(checkout: Path, out: Path, work: Path, only: str, *, real_model: bool) -> int:
    """Run all jobs in the empty folder `work` and write `out`; the exit status: 1 if a command failed."""
    from golden.jobs import Jobs
    from golden.session import Session

    began = time.monotonic()
    session = Session(checkout, work.resolve(), only)
    jobs = Jobs(session)
    jobs.all(jobs.prepare(real_model=real_model))
    session.close()
    values = dict(sorted(session.values.items()))
    out.write_text(json.dumps({"machine": machine(), "values": values}, indent=0) + "\n", encoding="utf-8")
    failed = sum(key.endswith("/failed") for key in values)
    print(f"{len(values)} values, {failed} jobs failed, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if failed or not values else 0


def machine() -> dict[str, str]:
    """What the bits depend on, besides the code."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": processor,
        "torch": torch.__version__,
        "vectors": capability,
        "python": platform.python_version(),
    }


def main() -> int:
    """Parse the words and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="the folder of a checkout, with src/graftlm in it")
    parser.add_argument("--out", type=Path, help="the file to write")
    parser.add_argument("--work", type=Path, help="an empty folder for models and runs")
    parser.add_argument("--only", default="*", help="a pattern of jobs, as in 'train/lora/*'")
    parser.add_argument("--no_real_model", action="store_true", help="leave out SmolLM2-135M")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two recordings to compare")
    parser.add_argument("--tolerance", type=float, default=0.0, help="allowed relative difference of numbers")
    words = parser.parse_args()
    if words.compare:
        old, new = words.compare
        return compare(old, new, words.tolerance)
    if not (words.checkout and words.out):
        parser.error("give --checkout and --out, or --compare")
    if not (words.checkout / "src" / "graftlm").is_dir():
        parser.error(f"--checkout {words.checkout}: has no src/graftlm")
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        work = words.work or Path(scratch)
        if words.work and work.exists() and any(work.iterdir()):
            parser.error(f"--work {work}: is not empty")
        work.mkdir(parents=True, exist_ok=True)
        return record(words.checkout, words.out, work, words.only, real_model=not words.no_real_model)


if __name__ == "__main__":
    sys.exit(main())
