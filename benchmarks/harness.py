"""What all benchmarks share: the machine, runs as child processes, interleaved rounds, medians and ratios, the report.

A *run* is one contender's figures, a *round* one run of each contender in turn. Ratios are formed within a round, so
slow drift of the machine cancels out; the median over rounds counts. A run during which other processes used more than
--max-other of the cores is repeated. Linux only (/proc). This module imports no torch: the parent must stay small.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL = "rotten-tomatoes-pypi", "smollm2-135m"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "lm_eval")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
}
Run = dict[str, Any]
Round = dict[str, Run]  # contender -> its run


class BenchmarkError(Exception):
    """A contender failed, or no run was undisturbed."""


# ------------------------------------------------------------------------------------------------------- the machine


def cpu_description(cpuinfo: str) -> dict[str, Any]:
    """The first processor of /proc/cpuinfo's text: model, family/model/stepping, and which of CPU_FLAGS it has."""
    first = cpuinfo.split("\n\n", 1)[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = set(fields.get("flags", "").split())
    family = "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
    present = [flag for flag in CPU_FLAGS if flag in flags]
    return {"cpu": fields.get("model name", platform.machine()), "family_model_stepping": family, "flags": present}


def native_dtypes(names: Sequence[str], cpuinfo: str = "") -> list[str]:
    """Those of the dtypes that this processor has instructions for; without them one step takes minutes."""
    flags = set((cpuinfo or Path("/proc/cpuinfo").read_text(encoding="utf-8")).split())
    return [name for name in names if name == "float32" or flags & {"avx512_bf16", "amx_bf16", "bf16"}]


def describe() -> dict[str, Any]:
    """Machine and software. Names no user and no host."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **cpu_description(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def git_commit(checkout: Path = ROOT) -> str:
    """A checkout's commit, with -dirty when files differ from it; "no commit" in a fresh repository."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "no commit"


def peak_rss_mb() -> float:
    """Peak resident memory of this process (VmHWM) in MB (10^6 bytes), as `graft train --json` counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def busy_seconds(stat: str | None = None) -> float:
    """CPU seconds of all cores so far, except idle and waiting for the disk, from /proc/stat.

    Fields: user nice system idle iowait irq softirq steal guest guest_nice; guest time is already in user and nice.
    """
    line = (stat or Path("/proc/stat").read_text(encoding="utf-8")).split("\n", 1)[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def other_share(seconds: float, busy: float, own: float) -> float:
    """The share of the machine's capacity that others used: `busy` less `own` CPU seconds, over `seconds` x cores."""
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


# ----------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Process:
    """A finished child process. `seconds` are wall seconds of the whole process, start-up included."""

    stdout: str
    stderr: str
    status: int
    seconds: float
    peak_rss_mb: float
    other_cpu_share: float


def run_process(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
    """Run `command` to its end in `folder`, which keeps its output; a failed process does not raise."""
    out, err = folder / "stdout", folder / "stderr"
    own, busy, began = time.process_time(), busy_seconds(), time.perf_counter()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=stderr)
        try:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:  # interrupted: leave no training run behind
                child.kill()
                child.wait()
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime + time.process_time() - own
    return Process(
        stdout=out.read_text(encoding="utf-8"),
        stderr=err.read_text(encoding="utf-8", errors="replace"),
        status=child.returncode,
        seconds=seconds,
        peak_rss_mb=usage.ru_maxrss * 1024 / 1e6,
        other_cpu_share=other_share(seconds, busy_seconds() - busy, cpu),
    )


def child_environment(checkout: Path = ROOT, /, **more: str) -> dict[str, str]:
    """The environment of a child: offline, with the package of `checkout`."""
    paths = [str(checkout / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths), **more}


def run_json(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Run:
    """The JSON object that `command` prints last, with the process's seconds, peak memory and disturbance."""
    folder.mkdir(parents=True, exist_ok=True)
    done = run_process(command, folder, environment)
    if done.status:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{' '.join(command[:5])} failed with status {done.status}; last messages:\n{tail}")
    return {
        **json.loads(done.stdout.rstrip("\n").rpartition("\n")[2]),
        "process_seconds": done.seconds,
        "process_peak_mb": done.peak_rss_mb,
        "other_cpu_share": done.other_cpu_share,
    }


def graft_words(verb: str, flags: Mapping[str, Any]) -> list[str]:
    """The words of a graft command that prints JSON: `train --rank=16 … --json`."""
    return [verb, *(f"--{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in flags.items()), "--json"]


def run_graft(verb: str, flags: Mapping[str, Any], folder: Path, **environment: str) -> Run:
    """Run `graft VERB` of this checkout in a process of its own."""
    command = [sys.executable, "-m", "graftlm", *graft_words(verb, flags)]
    return run_json(command, folder, child_environment(**environment))


def graft(*words: str) -> Any:
    """The JSON object of `graft WORDS --json`; its notes go to stderr as they come."""
    command = [sys.executable, "-m", "graftlm", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=child_environment(), check=False)
    if done.returncode:
        raise BenchmarkError(f"graft {' '.join(words)} failed with status {done.returncode}")
    return json.loads(done.stdout)


def run_peer(script: str, settings: Mapping[str, Any], folder: Path) -> Run:
    """Run a benchmark script's peer in a process of its own: `main` hands `settings` to its `child` function."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "child.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, str(Path(script).resolve()), "--child", str(folder / "child.json")]
    return run_json(command, folder, child_environment(HF_HOME=str(folder)))


def keep_memory_or_fail() -> None:
    """Make glibc keep freed memory, before torch is imported; otherwise the peer would be a weaker one."""
    from graftlm.cli.main import tune_malloc_retain

    if not tune_malloc_retain():
        raise RuntimeError("the C library refused to keep freed memory, so this peer would be slower than promised")


# ------------------------------------------------------------------------------------------------------------ rounds


def accepted_run(measure: Callable[[], Run], limit: float, attempts: int) -> tuple[Run | None, list[Run]]:
    """The first of up to `attempts` runs during which others used at most `limit` of the cores, and the rejected."""
    rejected: list[Run] = []
    for _ in range(attempts):
        run = measure()
        if run["other_cpu_share"] <= limit:
            return run, rejected
        rejected.append(run)
    return None, rejected


def run_rounds(
    contenders: Mapping[str, Callable[[Path], Run]], args: argparse.Namespace, work: Path, figure: str
) -> tuple[list[Round], list[Run]]:
    """All rounds, contenders in turn, each run in a new folder below `work`: (rounds, rejected runs).

    A contender without an undisturbed run is left out of the round. `figure` is the one that is printed.
    """
    numbers, rounds, thrown_away = count(1), list[Round](), list[Run]()
    for number in range(1, args.rounds + 1):
        rounds.append({})
        for name, measure in contenders.items():

            def once(measure: Callable[[Path], Run] = measure) -> Run:
                return measure(work / f"run-{next(numbers)}")

            run, rejected = accepted_run(once, args.max_other, args.attempts)
            thrown_away += [{"round": number, "contender": name, **each} for each in rejected]
            if run is None:
                note(f"  {name}: disturbed {args.attempts} times, left out of round {number}")
                continue
            rounds[-1][name] = run
            note(f"  round {number} {name:20} {figure} {run[figure]:.3f}, others {run['other_cpu_share']:.1%}")
    if missing := [name for name in contenders if not any(name in each for each in rounds)]:
        raise BenchmarkError(f"no undisturbed run of {', '.join(missing)}: stop other work, or raise --max-other")
    return rounds, thrown_away


def fastest(names: Sequence[str], speed: Callable[[str], float]) -> tuple[str, dict[str, float]]:
    """The name with the highest speed in a short trial, and all speeds; nothing is tried if there is no choice."""
    if len(names) == 1:
        return names[0], {}
    speeds = {name: speed(name) for name in names}
    return max(speeds, key=speeds.__getitem__), speeds


# ----------------------------------------------------------------------------------------------------------- summary


def ratios(rounds: Sequence[Round], key: str, top: str, bottom: str) -> list[float]:
    """`top`'s figure over `bottom`'s, for each round that has both."""
    return [each[top][key] / each[bottom][key] for each in rounds if top in each and bottom in each]


def medians(rounds: Sequence[Round], figures: Sequence[str]) -> dict[str, dict[str, float]]:
    """Contender -> figure -> median over the rounds."""
    names = list(dict.fromkeys(name for each in rounds for name in each))
    return {n: {key: median(each[n][key] for each in rounds if n in each) for key in figures} for n in names}


def summarise(
    rounds: Sequence[Round],
    figures: Sequence[str],
    pairs: Mapping[str, tuple[str, str, str]],
    goals: Mapping[str, tuple[str, str, float]],
) -> dict[str, Any]:
    """Medians, ratios within rounds, and whether the goals hold (None: not measured).

    pairs: name of a ratio -> (figure, numerator, denominator). goals: text -> (name of a ratio, ">=" or "<=", bound).
    """
    found = {name: each for name, pair in pairs.items() if (each := ratios(rounds, *pair))}
    summary: dict[str, dict[str, Any]] = {name: {"rounds": r, "median": median(r)} for name, r in found.items()}

    def holds(name: str, sign: str, bound: float) -> bool | None:
        if name not in summary:
            return None
        return bool(summary[name]["median"] >= bound if sign == ">=" else summary[name]["median"] <= bound)

    claims = {text: holds(*goal) for text, goal in goals.items()}
    return {"medians": medians(rounds, figures), "ratios": summary, "claims": claims}


WORDS = {True: "holds", False: "does NOT hold", None: "not measured"}


def table(summary: Mapping[str, Any]) -> str:
    """A summary as text: medians, ratios with their rounds, claims."""
    rows: Mapping[str, Mapping[str, float]] = summary.get("medians", {})
    columns = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = ["".join([" " * 28, *(f"{column[-16:]:>17}" for column in columns)])] if rows else []
    for name, figures in rows.items():
        lines.append(f"{name:28}" + "".join(f"{figures[c]:17.5g}" if c in figures else " " * 17 for c in columns))
    for name, ratio in summary.get("ratios", {}).items():
        lines.append(f"{name:44}{ratio['median']:8.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    return "\n".join([*lines, *(f"{text:66}{WORDS[holds]}" for text, holds in summary.get("claims", {}).items())])


# -------------------------------------------------------------------------------------------------- the command line


def note(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a jsonl file, row by row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def at_least(least: int) -> Callable[[str], int]:
    """A type for `add_argument`: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be {least} or more")
        return int(text)

    return parse


SOURCE: dict[str, dict[str, Any]] = {
    "model": {"default": MODEL, "help": f"base model (default {MODEL})"},
    "data": {"default": DATA, "help": f"data with train, validation and test splits (default {DATA})"},
}
UNDISTURBED: dict[str, dict[str, Any]] = {
    "max-other": {"type": float, "default": 0.03, "help": "share of the cores others may use (default 0.03)"},
    "attempts": {"type": at_least(1), "default": 3, "help": "runs until one is undisturbed (default 3)"},
}
ROUNDS = {"rounds": {"type": at_least(1), "default": 3, "help": "runs of each contender (default 3)"}, **UNDISTURBED}


def main(
    doc: str | None,
    run: Callable[[argparse.Namespace, Path], dict[str, Any]],
    flags: Mapping[str, Mapping[str, Any]],
    words: Sequence[str] | None = None,
    child: Callable[[Any], Run] | None = None,
) -> int:
    """A benchmark's main: parse, measure in a temporary folder, print the table and the JSON report; the exit status.

    flags: name -> arguments of `add_argument`. run: the report without machine and commit. child: what a process
    started by `run_peer` computes.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in flags.items():
        parser.add_argument(f"--{name}", **about)
    parser.add_argument("--json-out", type=Path, help="also write the JSON report to this file")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    if child is not None and args.child:
        print(json.dumps(child(json.loads(args.child.read_text(encoding="utf-8")))))
        return 0
    from graftlm.errors import GraftError

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as work:
        try:
            found = run(args, Path(work))
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    note(table(found))
    report = {"machine": describe(), "graftlm": git_commit(), **found}
    if args.json_out:
        write_json(args.json_out, report)
    print(json.dumps(report))
    return 0


def choices(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A type for `add_argument`: names out of `known`, separated by commas, in the given order."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}: known are {', '.join(known)}")
        return names

    return parse
