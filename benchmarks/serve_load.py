"""`graft serve` under load, compared with a plain transformers + FastAPI server and llama.cpp on the same prompts.

    python benchmarks/serve_load.py [--clients 1,4,16,64] [--seconds 20] [--long 60] [--json-out FILE]

    graft           `graft serve`, every request to the base
    graft adapters  the same server: base and two LoRA adapters (r=16) in turn, in the same batches
    graft gguf      `graft serve` of the .gguf file with the same weights, which stay as they are (--base_format stored)
    plain           `model.generate` with a lock and FastAPI, as tutorials write it (`--child`)
    llama.cpp       its server (of the package xllamacpp) on the .gguf file, with a slot for each client
    before          `graft serve` of another checkout (--before FOLDER)

Each client sends its next request as soon as the last is answered: a test review in the classification prompt, to be
continued greedily by up to --new_tokens tokens. For each number of clients the contenders take turns of --seconds;
then `graft adapters` serves the most clients for --long seconds while its memory is watched. The load comes from this
process, which shares the cores. `cpu_ms` are the server's processor milliseconds for a token, which other work on the
machine changes less.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import harness
from harness import BenchmarkError, Run

CONTENDERS = ("graft", "graft adapters", "graft gguf", "plain", "llama.cpp", "before")
PAIRS = (("graft", "plain"), ("graft adapters", "plain"), ("graft gguf", "llama.cpp"), ("graft", "before"))
ADAPTERS = ("one", "two")
DTYPES = ("float32", "bfloat16")
FIGURES = ("tokens_per_s", "requests_per_s", "p50_s", "p95_s", "cpu_ms", "rss_mb")
TRIAL_SECONDS = 5.0
SAME_MEMORY = 1.01
SAME_TEXTS = 8
"""Prompts that all contenders must continue identically in float32."""


# ------------------------------------------------------------------------------------------------------- the servers


@dataclass
class Server:
    """A server in a process of its own."""

    pid: int
    host: str
    port: int
    models: Sequence[str] = ()

    def cpu_seconds(self) -> float:
        """CPU seconds of all its threads so far."""
        words = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        """Its resident memory in MB (10^6 bytes)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[Server]:
    """Run a server that prints its url in a JSON object once it listens; terminate it at the end."""
    with open(folder / f"{time.time_ns()}.stderr", "w+", encoding="utf-8") as errors:
        environment = harness.child_environment()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise BenchmarkError(f"{' '.join(command[:4])} did not start: {errors.read()[-1000:]}")
            said = json.loads(line)
            host, _, port = said["url"].removeprefix("http://").partition(":")
            yield Server(process.pid, host, int(port), said.get("models", ()))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve_plain(settings: Mapping[str, Any]) -> Run:
    """The plain server: one route, one request at a time; returns after a signal."""
    import socket

    import torch
    import uvicorn
    from fastapi import Body, FastAPI
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings["model"])
    lock, app = threading.Lock(), FastAPI()

    @app.post("/v1/completions")
    def completions(prompt: str = Body(), max_tokens: int = Body()) -> dict[str, Any]:  # runs in a thread of the pool
        inputs = tokenizer(prompt, return_tensors="pt")
        ids, mask, end = inputs["input_ids"], inputs["attention_mask"], model.generation_config.eos_token_id
        with lock, torch.no_grad():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=end
            )
        new = found[0, ids.shape[1] :]
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(new)}
        return {"choices": [{"text": tokenizer.decode(new, skip_special_tokens=True)}], "usage": usage}

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
    return {}


def serve_llama_cpp(settings: Mapping[str, Any]) -> Run:
    """llama.cpp's server; returns after a signal."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_gpu_layers, params.verbosity = settings["gguf"], 0, 0
    params.n_parallel, params.n_ctx = settings["slots"], settings["slots"] * 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    os._exit(0)  # its threads do not end by themselves


def serve(settings: Mapping[str, Any]) -> Run:
    """A peer's server, in a process of its own."""
    return serve_llama_cpp(settings) if "gguf" in settings else serve_plain(settings)


def child_command(settings: Mapping[str, Any], work: Path) -> list[str]:
    """A peer's server in a process of its own."""
    file = work / f"peer-{time.time_ns()}.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return [sys.executable, str(Path(__file__).resolve()), "--child", str(file)]


def plain_command(model: str, dtype: str, work: Path) -> list[str]:
    """The plain server in a process of its own."""
    return child_command({"model": model, "dtype": dtype}, work)


def graft_command(model: str, dtype: str, runs: Mapping[str, Path], new_tokens: int, clients: int) -> list[str]:
    """`graft serve` with batches of as many rows as there are clients."""
    flags = {"init_from": model, "dtype": dtype, "port": 0, "max_tokens": new_tokens, "max_batch_size": clients}
    verb, *words = harness.graft_words("serve", flags)
    return [sys.executable, "-m", "graftlm", verb, *(f"{name}={run}" for name, run in runs.items()), *words]


def adapter_runs(args: argparse.Namespace, model: str, work: Path) -> dict[str, Path]:
    """Two LoRA runs of two steps with a tiny learning rate, so that all answers are as long as the base's."""
    flags = {"init_from": model, "data": args.data, "rank": 16, "alpha": 64, "max_iters": 2, "lr": 1e-9}
    flags |= {"val_limit": 8, "kernels": "torch"}
    runs = {name: work / name / "run" for name in ADAPTERS}
    for seed, (name, run) in enumerate(runs.items()):
        harness.run_graft("train", {**flags, "out_dir": run, "seed": seed}, work / name)
    return runs


# ---------------------------------------------------------------------------------------------------------- the load


@dataclass
class Answers:
    """The requests of one turn."""

    seconds: list[float] = field(default_factory=list)
    """Of each answered request, from its first byte sent to its last byte read."""
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    """Prompt number -> continuation."""


def load(
    server: Server, bodies: Sequence[bytes], clients: int, seconds: float, limit: int = 10**9
) -> tuple[Answers, float]:
    """`clients` clients for `seconds`, or until `limit` requests have begun: the answers, and the seconds it took."""
    answers, begin, lock = Answers(), time.perf_counter(), threading.Lock()
    work = islice(cycle(enumerate(bodies)), limit)

    def client() -> None:
        connection = http.client.HTTPConnection(server.host, server.port)
        try:
            while time.perf_counter() - begin < seconds:
                with lock:
                    number, body = next(work, (0, b""))
                if not body:
                    return
                began = time.perf_counter()
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
                if response.status != 200:
                    raise ValueError(f"{response.status}: {content[:150]!r}")
                found = json.loads(content)
                with lock:
                    answers.seconds.append(time.perf_counter() - began)
                    answers.tokens += found["usage"]["completion_tokens"]
                    answers.texts[number] = found["choices"][0]["text"]
        except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
            answers.errors.append(f"{type(error).__name__}: {error}"[:200])
        finally:
            connection.close()

    with ThreadPoolExecutor(clients) as pool:
        for _ in range(clients):
            pool.submit(client)
    return answers, time.perf_counter() - begin


def turn(server: Server, bodies: Sequence[bytes], clients: int, seconds: float, folder: Path | None = None) -> Run:
    """One turn's figures. Keeps no files, so `folder` is not used."""
    busy, own, server_cpu = harness.busy_seconds(), time.process_time(), server.cpu_seconds()
    answers, took = load(server, bodies, clients, seconds)
    server_cpu = server.cpu_seconds() - server_cpu
    used = time.process_time() - own + server_cpu
    about: Run = {"cpu_ms": 1e3 * server_cpu / max(1, answers.tokens)}
    about |= {"clients": clients, "errors": answers.errors, "rss_mb": server.rss_mb()}
    other = harness.other_share(took, harness.busy_seconds() - busy, used)
    return {**figures(answers, took), **about, "other_cpu_share": other}


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
    """The smallest of the sorted values that at least this share of them does not exceed; 0 without values."""
    return values[min(len(values) - 1, max(0, -int(-share * len(values) // 1) - 1))] if values else 0.0


def endurance(server: Server, bodies: Sequence[bytes], clients: int, seconds: float) -> Run:
    """A long turn, with the server's memory once a second."""
    memory: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            memory.append(server.rss_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        answers, took = load(server, bodies, clients, seconds)
    finally:
        done.set()
        thread.join()
    return {**figures(answers, took), "clients": clients, "errors": answers.errors, "memory_mb": memory}


def growth(memory: Sequence[float]) -> float:
    """Mean memory of the last quarter over that of the second; the first fills caches and does not count."""
    quarter = len(memory) // 4
    return mean(memory[-quarter:]) / mean(memory[quarter : 2 * quarter]) if quarter else 1.0


# ----------------------------------------------------------------------------------------------------------- the run


def summarise(turns: Mapping[str, Sequence[Run]], long: Run, same: bool | None) -> dict[str, Any]:
    """Figures by contender and clients, ratios, and whether the claims hold (None: not measured)."""
    rows = {
        f"{name}, {run['clients']} client{'s' * (run['clients'] > 1)}": {key: run[key] for key in FIGURES}
        for name, runs in turns.items()
        for run in runs
    }
    most, speed = turns["graft"][-1]["clients"], "tokens_per_s"
    gains = {name: runs[-1][speed] / runs[0][speed] for name, runs in turns.items()}
    found = {f"{speed} {name}, {most} clients/one": gain for name, gain in gains.items()}
    for (name, other), key in product(PAIRS, (speed, "cpu_ms")):
        peers = {run["clients"]: run for run in turns.get(other, ())}
        for ours in turns.get(name, ()):
            if (peer := peers.get(ours["clients"])) and peer[key]:
                found[f"{key} {name}/{other}, {ours['clients']} clients"] = ours[key] / peer[key]
    goals = {
        "one client: at least 3 times the throughput of before": (f"{speed} graft/before, 1 clients", 3),
        "one client: at least the throughput of the plain server": (f"{speed} graft/plain, 1 clients", 1),
        "16 clients: at least the throughput of llama.cpp": (f"{speed} graft gguf/llama.cpp, 16 clients", 1),
        "64 clients: at least the throughput of llama.cpp": (f"{speed} graft gguf/llama.cpp, 64 clients", 1),
    }
    errors = [line for runs in turns.values() for run in runs for line in run["errors"]] + long["errors"]
    return {
        "medians": rows,
        "ratios": {name: {"rounds": [value], "median": value} for name, value in found.items()},
        "memory_growth": growth(long["memory_mb"]),
        "claims": {
            f"{most} clients get at least 3 times the throughput of one": gains["graft"] >= 3,
            "the same with two adapters in the same batches": (
                gains["graft adapters"] >= 3 if "graft adapters" in gains else None
            ),
            "no request failed": not errors,
            f"{most} clients for a long time: memory grows by less than 1%": growth(long["memory_mb"]) <= SAME_MEMORY,
            "the plain server's texts in float32": same,
            **{text: found[name] >= bound if name in found else None for text, (name, bound) in goals.items()},
        },
    }


def prompts(args: argparse.Namespace) -> list[str]:
    """The classification prompts of test reviews, a fixed, label-blind sample."""
    from graftlm.text.collate import subset
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    template = load_template(DEFAULT)
    rows = subset(load_dataset(args.data, labels=template.labels).splits["test"], args.prompts)
    return [template.prompt(row.text) for row in rows]


def bodies_of(texts: Sequence[str], models: Sequence[str], new_tokens: int) -> list[bytes]:
    """A request's body for each prompt, the models in turn."""
    settings = {"max_tokens": new_tokens, "temperature": 0}
    pairs = zip(texts, cycle(models), strict=False)
    return [json.dumps({"model": model, "prompt": text, **settings}).encode() for text, model in pairs]


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Servers, turns, summary."""
    from graftlm.files.assets import model_folder

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the servers; nothing is computed here
    model = str(model_folder(args.model))
    gguf = str(next(Path(model).glob("*.gguf"), model))
    name = Path(model).name
    models = {"graft": [name], "graft adapters": [name, *ADAPTERS], "graft gguf": [Path(gguf).name], "plain": ["plain"]}
    models |= {"llama.cpp": ["llama.cpp"], "before": [name]}
    texts = prompts(args)
    bodies = {name: bodies_of(texts, models[name], args.new_tokens) for name in CONTENDERS}

    def trial(dtype: str) -> float:
        with started(plain_command(model, dtype, work), work) as server:
            load(server, bodies["plain"], 1, 60, limit=2)
            return float(turn(server, bodies["plain"], 1, TRIAL_SECONDS)["tokens_per_s"])

    dtypes = harness.native_dtypes(DTYPES) if "plain" in args.only else ["float32"]
    dtype, tried = harness.fastest(dtypes, trial)
    most = max(args.clients)
    commands = {
        "graft": graft_command(model, args.dtype, adapter_runs(args, model, work), args.new_tokens, most),
        "graft gguf": [*graft_command(gguf, args.dtype, {}, args.new_tokens, most), "--base_format", "stored"],
        "plain": plain_command(model, dtype, work),
        "llama.cpp": child_command({"gguf": gguf, "slots": most, "threads": args.threads}, work),
        "before": [
            "env",
            f"PYTHONPATH={args.before}/src",
            *graft_command(model, args.dtype, {}, args.new_tokens, most),
        ],
    }
    commands["before"] = ["env", f"PYTHONPATH={args.before}/src", *commands["before"]]
    with ExitStack() as stack:
        needed = [name for name in commands if name == "graft" or name in args.only]
        servers = {name: stack.enter_context(started(commands[name], work)) for name in needed}
        graft = servers["graft adapters"] = servers["graft"]
        texts_of = {}
        for name in args.only:  # also warms the servers
            found, _ = load(servers[name], bodies[name][:SAME_TEXTS], 2, 600, limit=SAME_TEXTS)
            texts_of[name] = found.texts
        exact = args.dtype == dtype == "float32" and "plain" in args.only
        same = texts_of["graft"] == texts_of["plain"] if exact else None
        turns: dict[str, list[Run]] = {name: [] for name in args.only}
        rejected: list[Run] = []
        args.rounds = 1
        for clients in args.clients:
            contenders = {name: partial(turn, servers[name], bodies[name], clients, args.seconds) for name in args.only}
            (found_turns,), disturbed = harness.run_rounds(contenders, args, work, "tokens_per_s")
            rejected += disturbed
            for name, each in found_turns.items():
                turns[name].append(each)
        long = endurance(graft, bodies["graft adapters"], max(args.clients), args.long)
    config = {
        key: getattr(args, key) for key in ("model", "clients", "seconds", "long", "new_tokens", "dtype", "threads")
    }
    about = {"config": config, "trials": tried, "plain_dtype": dtype, **summarise(turns, long, same)}
    return {**about, "long": long, "runs": turns, "rejected": rejected}


def client_counts(text: str) -> list[int]:
    """--clients: growing numbers."""
    numbers = [int(number) for number in text.split(",")]
    if numbers != sorted(set(numbers)) or numbers[0] < 1:
        raise argparse.ArgumentTypeError("growing numbers, as in 1,8,64")
    return numbers


FLAGS: dict[str, dict[str, Any]] = {
    "clients": {"type": client_counts, "default": [1, 4, 16, 64], "help": "numbers of clients (default 1,4,16,64)"},
    "seconds": {"type": float, "default": 20.0, "help": "of each turn (default 20)"},
    "long": {"type": float, "default": 60.0, "help": "seconds of the last turn (default 60)"},
    "new_tokens": {"type": int, "default": 32, "help": "most tokens of an answer (default 32)"},
    "prompts": {"type": int, "default": 256, "help": "different prompts (default 256)"},
    "only": {"type": harness.choices(CONTENDERS), "default": list(CONTENDERS[:-1]), "help": "graft and others"},
    "before": {"default": "", "help": "the checkout of the contender before"},
    "threads": {"type": harness.at_least(1), "default": 2, "help": "threads of each server (default 2)"},
    "dtype": {"default": "float32", "help": "graft's dtype (default float32)"},
    **harness.SOURCE,
    **harness.UNDISTURBED,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=serve))
