"""`graft serve` under load, beside a plain transformers + FastAPI server: the same prompts, this machine, in turn.

    python benchmarks/serve_load.py [--clients 1,2,4,8,16,32,64] [--seconds 20] [--long 60] [--json-out FILE]

    graft           `graft serve`, every request to the base
    graft adapters  the same server: base and two LoRA adapters (r=16) asked in turn, in the same batches
    plain           `_plain_server.py`: `model.generate` behind a lock, as tutorials write it

Each client sends its next request as soon as the last is answered: a test review in the classification prompt, to be
continued greedily by `--new-tokens` tokens at most. For each number of clients the contenders take turns of `--seconds`
(requests that begin in it are heard out, and count with the time they took); then `graft adapters` stands `--long`
seconds of the most clients while its memory is watched. Both servers run all the time; the one that is not asked hardly
uses the processor.
A turn during which others used more than 3% of the cores is repeated. The load comes from this process, which shares
the cores. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from _machine import busy_seconds, describe, others_share, worth_trying
from _rounds import Run, accepted_run
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

DATA = "rotten-tomatoes-pypi"
FORMATS = ("float32", "bfloat16")
CONTENDERS = ("graft", "graft adapters", "plain")
ADAPTERS = ("one", "two")
TRIAL_SECONDS = 5.0
START_SECONDS = 180
SAME_MEMORY = 1.01
SAME_TEXTS = 8
"""Prompts that all contenders must continue alike, in float32."""


# ------------------------------------------------------------------------------------------------------- the servers


@dataclass
class Server:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    host: str
    port: int

    def cpu_seconds(self) -> float:
        """What all its threads have used so far."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Its resident memory now, in MB (10^6 bytes)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[Server]:
    """Run a server that prints its url in a JSON object when it listens; it is told to stop in the end."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / f"{time.time_ns()}.stderr", "w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise BenchmarkError(f"{' '.join(command[:4])} did not start: {errors.read()[-1000:]}")
            host, _, port = json.loads(line)["url"].removeprefix("http://").partition(":")
            yield Server(process, host, int(port))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def graft_command(model: str, dtype: str, runs: Sequence[Path], new_tokens: int, clients: int) -> list[str]:
    """`graft serve` as its user types it, but for the port; as many rows as there are clients."""
    names = [f"{name}={run}" for name, run in zip(ADAPTERS, runs, strict=True)]
    flags = ["--init_from", model, "--dtype", dtype, "--port", "0", "--json", "--max_tokens", str(new_tokens)]
    return [sys.executable, "-m", "graftlm", "serve", *names, *flags, "--max_rows", str(clients)]


def adapter_runs(model: str, work: Path) -> list[Path]:
    """Two LoRA runs of two steps: what they have learned does not matter to the speed."""
    runs = []
    for number, name in enumerate(ADAPTERS):
        flags = ["--init_from", model, "--data", DATA, "--out_dir", str(work / name), "--rank", "16", "--alpha", "64"]
        # So little is learned that all answers are as long as the base's: else tokens would not compare.
        flags += ["--max_iters", "2", "--lr", "1e-9", "--val_limit", "8", "--compile", "off", "--seed", str(number)]
        paths = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "graftlm", "train", *flags]
        done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"the adapter could not be trained: {done.stderr[-1000:]}")
        runs.append(work / name)
    return runs


# ---------------------------------------------------------------------------------------------------------- the load


@dataclass
class Answers:
    """What came of the requests of one turn."""

    seconds: list[float] = field(default_factory=list)
    """Of each answered request, from its first byte sent to its last byte read."""
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    """Prompt's number -> its continuation."""


async def load(
    server: Server, bodies: Sequence[bytes], clients: int, seconds: float, most: int | None = None
) -> tuple[Answers, float]:
    """`clients` clients for `seconds`, or until `most` requests have begun; the answers, and how long it all took."""
    answers, begin = Answers(), time.perf_counter()
    work = cycle(enumerate(bodies))
    left = most if most is not None else 10**9

    async def client() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection(server.host, server.port)
        try:
            while time.perf_counter() - begin < seconds and left > 0:
                left -= 1
                number, body = next(work)
                began = time.perf_counter()
                found = await _post(reader, writer, server, body)
                answers.seconds.append(time.perf_counter() - began)
                answers.tokens += found["usage"]["completion_tokens"]
                answers.texts[number] = found["choices"][0]["text"]
        except (OSError, ValueError, LookupError, asyncio.IncompleteReadError) as error:
            answers.errors.append(f"{type(error).__name__}: {error}"[:200])
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - begin


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: Server, body: bytes) -> Any:
    """One request by hand, since a library's client would use a good part of the cores that the servers need."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    content = await reader.readexactly(int(headers["content-length"]))
    if first.split()[1] != "200":
        raise ValueError(f"{first}: {content[:150]!r}")
    return json.loads(content)


def turn(server: Server, bodies: Sequence[bytes], clients: int, seconds: float) -> Run:
    """One turn's figures."""
    machine, own, theirs = _busy(), time.process_time(), server.cpu_seconds()
    answers, took = asyncio.run(load(server, bodies, clients, seconds))
    other = _busy() - machine - (time.process_time() - own) - (server.cpu_seconds() - theirs)
    return {
        **figures(answers, took),
        "clients": clients,
        "errors": answers.errors,
        "rss_mb": server.rss_mb(),
        "other_cpu_share": others_share(max(0.0, other), took, os.cpu_count() or 1),
    }


def _busy() -> float:
    return busy_seconds(Path("/proc/stat").read_text(encoding="utf-8"), os.sysconf("SC_CLK_TCK"))


def figures(answers: Answers, took: float) -> dict[str, float]:
    """Throughput over the whole turn, and the latency of its requests."""
    latencies = sorted(answers.seconds)
    return {
        "requests": len(latencies),
        "requests_per_s": len(latencies) / took,
        "tokens_per_s": answers.tokens / took,
        "p50_s": quantile(latencies, 0.5),
        "p95_s": quantile(latencies, 0.95),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that at least this share of them does not exceed; 0 of none."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, max(0, -int(-share * len(values) // 1) - 1))]


def endurance(server: Server, bodies: Sequence[bytes], clients: int, seconds: float) -> Run:
    """A long turn, with the server's memory once a second."""
    memory: list[float] = []

    async def both() -> tuple[Answers, float]:
        async def watch() -> None:
            while True:
                memory.append(server.rss_mb())
                await asyncio.sleep(1)

        watcher = asyncio.create_task(watch())
        try:
            return await load(server, bodies, clients, seconds)
        finally:
            watcher.cancel()

    answers, took = asyncio.run(both())
    return {**figures(answers, took), "clients": clients, "errors": answers.errors, "memory_mb": memory}


def growth(memory: Sequence[float]) -> float:
    """Mean memory of the last quarter over that of the second one; the first fills caches and counts for nothing."""
    quarter = len(memory) // 4
    if not quarter:
        return 1.0
    return mean(memory[-quarter:]) / mean(memory[quarter : 2 * quarter])


# ---------------------------------------------------------------------------------------------------- what it says


def summarise(turns: Mapping[str, Sequence[Run]], long: Run, same: bool | None) -> dict[str, Any]:
    """Figures by contender and clients, curves, ratios, and whether the claims hold (null: not measured)."""
    keys = ("tokens_per_s", "requests_per_s", "p50_s", "p95_s", "rss_mb")
    medians = {
        f"{name}, {run['clients']} client{'s' * (run['clients'] > 1)}": {key: run[key] for key in keys}
        for name, runs in turns.items()
        for run in runs
    }
    curves = {
        key: {name: [[run["clients"], run[key]] for run in runs] for name, runs in turns.items()}
        for key in ("tokens_per_s", "p95_s")
    }
    gains = {name: runs[-1]["tokens_per_s"] / runs[0]["tokens_per_s"] for name, runs in turns.items()}
    most = turns["graft"][-1]["clients"]
    ratios = {f"tokens_per_s {name}, {most} clients/one": {"rounds": [x], "median": x} for name, x in gains.items()}
    if "plain" in turns:
        for name in ("graft", "graft adapters"):
            for ours, theirs in zip(turns.get(name, ()), turns["plain"], strict=False):
                ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
                ratios[f"tokens_per_s {name}/plain, {ours['clients']} clients"] = {"rounds": [ratio], "median": ratio}
    errors = [line for runs in turns.values() for run in runs for line in run["errors"]] + long["errors"]
    return {
        "medians": medians,
        "curves": curves,
        "ratios": ratios,
        "memory_growth": growth(long["memory_mb"]),
        "claims": {
            f"{most} clients get at least 3 times the throughput of one": gains["graft"] >= 3,
            "the same with two adapters in the same batches": (
                gains["graft adapters"] >= 3 if "graft adapters" in gains else None
            ),
            "no request failed": not errors,
            f"{most} clients for a long time: memory grows by less than 1%": growth(long["memory_mb"]) <= SAME_MEMORY,
            "the plain server's texts in float32": same,
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':28}{'tokens/s':>10}{'requests/s':>12}{'p50 s':>8}{'p95 s':>8}{'RSS MB':>9}"]
    for name, m in summary["medians"].items():
        lines.append(
            f"{name:28}{m['tokens_per_s']:10.1f}{m['requests_per_s']:12.2f}{m['p50_s']:8.2f}{m['p95_s']:8.2f}"
            f"{m['rss_mb']:9.0f}"
        )
    lines += [f"{name:46}{ratio['median']:7.2f}" for name, ratio in summary["ratios"].items()]
    lines.append(f"memory, last quarter over second: {summary['memory_growth']:.4f}")
    words = {True: "yes", False: "NO", None: "not measured"}
    lines += [f"{claim + '?':72}{words[holds]}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- the run


def prompts(limit: int) -> list[str]:
    """The classification prompts of test reviews, a fixed, label-blind sample."""
    from graftlm.text.collate import load_dataset, subset
    from graftlm.text.template import DEFAULT, load_template

    template = load_template(DEFAULT)
    rows = subset(load_dataset(DATA, labels=template.labels).splits["test"], limit)
    return [template.prompt(row.text) for row in rows]


def bodies_of(texts: Sequence[str], models: Sequence[str], new_tokens: int) -> list[bytes]:
    """A request's body for each prompt, the models in turn."""
    settings = {"max_tokens": new_tokens, "temperature": 0}
    pairs = zip(texts, cycle(models), strict=False)
    return [json.dumps({"model": model, "prompt": text, **settings}).encode() for text, model in pairs]


def plain_format(
    model: str, texts: Sequence[str], args: argparse.Namespace, work: Path
) -> tuple[str, dict[str, float]]:
    """The number format in which the plain server is fastest here."""
    formats = worth_trying(FORMATS)
    if len(formats) == 1:
        return formats[0], {}
    tried = {}
    for name in formats:
        with started(plain_command(model, name), work) as server:
            bodies = bodies_of(texts, ["plain"], args.new_tokens)
            asyncio.run(load(server, bodies, 1, 60, most=2))
            tried[name] = turn(server, bodies, 1, TRIAL_SECONDS)["tokens_per_s"]
    return max(tried, key=tried.__getitem__), tried


def plain_command(model: str, dtype: str) -> list[str]:
    """The peer in a process of its own."""
    script = Path(__file__).resolve().with_name("_plain_server.py")
    return [sys.executable, str(script), "--model", model, "--dtype", dtype]


def measure(args: argparse.Namespace, model: str, work: Path) -> dict[str, Any]:
    """All turns; the report but for the machine."""
    texts = prompts(args.prompts)
    dtype, trials = plain_format(model, texts, args, work) if "plain" in args.only else ("float32", {})
    runs = adapter_runs(model, work)
    base = Path(model).name
    with ExitStack() as stack:
        words = graft_command(model, args.dtype, runs, args.new_tokens, max(args.clients))
        graft = stack.enter_context(started(words, work))
        servers = {"graft": graft, "graft adapters": graft}
        if "plain" in args.only:
            servers["plain"] = stack.enter_context(started(plain_command(model, dtype), work))
        models = {"graft": [base], "graft adapters": [base, *ADAPTERS], "plain": ["plain"]}
        bodies = {name: bodies_of(texts, models[name], args.new_tokens) for name in CONTENDERS}
        first = {}
        for name in args.only:  # warm, and what they say
            found, _ = asyncio.run(load(servers[name], bodies[name][:SAME_TEXTS], 2, 600, most=SAME_TEXTS))
            first[name] = found.texts
        exact = args.dtype == dtype == "float32" and {"graft", "plain"} <= set(args.only)
        same = first["graft"] == first["plain"] if exact else None
        turns, rejected = _turns(args, servers, bodies)
        long = endurance(graft, bodies["graft adapters"], max(args.clients), args.long)
    summary = summarise(turns, long, same)
    print(table(summary), file=sys.stderr)
    return {"trials": trials, "plain_dtype": dtype, **summary, "long": long, "runs": turns, "rejected": rejected}


def _turns(
    args: argparse.Namespace, servers: Mapping[str, Server], bodies: Mapping[str, Sequence[bytes]]
) -> tuple[dict[str, list[Run]], list[Run]]:
    """Contender -> its turns by clients, and those that were disturbed. A turn without a quiet attempt is an error."""
    turns: dict[str, list[Run]] = {name: [] for name in args.only}
    disturbed: list[Run] = []
    for clients in args.clients:
        for name in args.only:

            def once(name: str = name, clients: int = clients) -> Run:
                return turn(servers[name], bodies[name], clients, args.seconds)

            run, rejected = accepted_run(once, args.max_other, args.attempts)
            disturbed += [{"contender": name, **each} for each in rejected]
            if run is None:
                raise BenchmarkError(f"{name}, {clients} clients: no quiet turn in {args.attempts}; stop other work")
            print(f"  {name:16}{clients:4} clients{run['tokens_per_s']:9.1f} tokens/s", file=sys.stderr)
            turns[name].append(run)
    return turns, disturbed


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,2,4,8,16,32,64", help="numbers of clients, the fewest first")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each turn (default 20)")
    parser.add_argument("--long", type=float, default=60.0, help="seconds of the last turn (default 60)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer, at most (default 32)")
    parser.add_argument("--prompts", type=int, default=256, help="different prompts (default 256)")
    parser.add_argument("--only", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}; graft is always one")
    parser.add_argument("--dtype", default="float32", help="graft's number format (default float32; auto)")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="turns until one is quiet enough (default 3)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    args.clients = [int(number) for number in args.clients.split(",")]
    if args.clients != sorted(set(args.clients)) or args.clients[0] < 1:
        parser.error("--clients: numbers that grow, as in 1,8,64")
    args.only = args.only.split(",")
    if not set(args.only) <= set(CONTENDERS) or "graft" not in args.only:
        parser.error(f"--only: of {', '.join(CONTENDERS)}, graft among them")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    args = parse(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.files.assets import model_folder

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            found = measure(args, str(model_folder(args.model)), Path(name))
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    config = {key: getattr(args, key) for key in ("model", "clients", "seconds", "long", "new_tokens", "dtype")}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **found}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
