"""--ray: two local nodes give the table and the scores that one process gives, also when a worker is killed midway."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SRC, child_environment
from graftlm import cli
from graftlm.config import EvaluateConfig
from graftlm.config.inference import RayFlags
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.inference.evaluate import Generation, LabelScoring, evaluate
from graftlm.inference.generate import decode_groups
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.scoring import score_batches
from graftlm.studies import ray_cluster as module
from graftlm.studies.ray_cluster import TOKEN, chunk_batches, connected, ray_predictor
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.template import load_template
from soak.forks import Forks, ask_script
from tiny import TEMPLATE, data_folder, model_folder

SWEEP = """
[train]
init_from = "{assets}/model"
data = "{assets}/data"
template = {template}
batch_size = 4
max_iters = 60
eval_every = 5
dtype = "float32"
kernels = "torch"
[grid]
rank = [1, 2]
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data", train=48, other=1000)
    (folder / "sweep.toml").write_text(SWEEP.format(assets=folder, template=json.dumps(TEMPLATE)))
    return folder


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process's memory stays as it is, and one thread computes here as on the nodes."""
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PYTHONPATH", SRC), ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1")):
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        module._import_ray("local")
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args=NODE)
        address = nodes.address
        try:
            nodes.add_node(**NODE)
            yield nodes
        finally:
            nodes.shutdown()
    assert not [line for line in processes() if address in line], "a process of the cluster is left over"


def processes() -> dict[str, int]:
    """The command lines of all processes, and their ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found[(path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")] = int(path.name)
        except OSError:  # it has ended
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def driven(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """A graft command in a process of its own, which does not outlive a test that fails."""
    command = [sys.executable, "-m", "graftlm", *words]
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True) as driver:
        try:
            yield driver
        except BaseException:
            driver.kill()
            raise


def compare(assets: Path, out: Path, *words: str) -> list[str]:
    return ["compare", "--config", str(assets / "sweep.toml"), "--out_dir", str(out), "--limit", "100", *words]


def timeless(out: Path) -> Any:
    """The table without times, memory and what was planned of them."""
    rows = json.loads((out / "table.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


TIMES = ("seconds", "examples_per_s", "peak_rss_mb", "predicted")


@pytest.fixture(scope="module")
def local(assets: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, run on this machine."""
    folder = tmp_path_factory.mktemp("local")
    out, log, ask = folder / "out", folder / "log.txt", str(ask_script(folder / "ask"))
    prelude = f"import sys; sys.executable = {ask!r}"
    assert forks.run(*compare(assets, out), cwd=folder, log=log, prelude=prelude) == 0, log.read_text()
    return out


# A comparison


def test_a_sweep_on_two_nodes_has_the_table_of_the_local_one(
    cluster: Any, assets: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(compare(assets, out, "--ray", cluster.address, "--json")) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed)["failed"] == 0
    assert timeless(out) == timeless(local)
    assert not (out / TOKEN).exists()
    # Nothing is left to do, for whoever goes on with it.
    log = next(out.glob("rank=1*/log.txt")).read_text()
    assert cli.run(compare(assets, out)) == 0 and next(out.glob("rank=1*/log.txt")).read_text() == log


def test_a_node_dies_midway_and_the_table_is_the_same(cluster: Any, assets: Path, local: Path, tmp_path: Path) -> None:
    out, node = tmp_path / "out", next(iter(cluster.worker_nodes))
    with driven(*compare(assets, out, "--ray", cluster.address)) as driver:
        raylet = node.all_processes["raylet"][0].process.pid
        victim = wait_for(lambda: trained_below(raylet, out), driver)
        cluster.remove_node(node, allow_graceful=False)
        assert driver.stderr is not None
        notes = driver.stderr.read()
    cluster.add_node(**NODE)
    assert driver.returncode == 0, notes
    assert timeless(out) == timeless(local)
    assert "a worker was lost; rank=" in notes and "resumes from its last checkpoint" in notes
    log = (out / victim / "log.txt").read_text()
    assert log.count("$ graft train") == 2 and "--resume" in log


def trained_below(raylet: int, out: Path) -> str:
    """The cell that is being trained below this raylet and has saved a checkpoint; nothing as long as there is none."""
    for line, pid in processes().items():
        for cell in out.glob("rank=*"):
            saved = "graftlm train " in line and f"{cell}/run" in line and (cell / "run" / "last").exists()
            if saved and parent(parent(pid)) == raylet:
                return cell.name
    return ""


def wait_for(found: Any, driver: "subprocess.Popen[str]") -> Any:
    until = time.monotonic() + 180
    while not (value := found()):
        assert driver.poll() is None and time.monotonic() < until, "it ended, or never began"
        time.sleep(0.02)
    return value


def test_ctrl_c_saves_every_run_and_the_same_command_goes_on_here(cluster: Any, assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = (assets / "sweep.toml").read_text().replace("max_iters = 60", "max_iters = 100000")
    (tmp_path / "sweep.toml").write_text(text.replace("eval_every = 5", "eval_every = 50000"))
    with driven(*compare(tmp_path, out, "--ray", cluster.address)) as driver:
        wait_for(lambda: len(list(out.glob("*/run/metrics.jsonl"))) == 2, driver)
        driver.send_signal(signal.SIGINT)
        assert driver.stderr is not None
        notes = driver.stderr.read()
    assert driver.returncode == 130 and "interrupted; every run has saved its last step" in notes, notes
    for cell in out.glob("rank=*"):
        assert (cell / "run" / "last" / "adapter_model.safetensors").is_file()
        assert not (cell / "failed.json").exists()
    assert not [line for line in processes() if str(out) in line]


# An evaluation


@pytest.mark.parametrize("read", ["score", "generate"])
def test_a_thousand_reviews_are_read_as_one_process_reads_them(
    read: str, cluster: Any, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", f"--init_from={assets / 'model'}", f"--data={assets / 'data'}", "--template", TEMPLATE]
    words += ["--mode", read, "--dtype=float32", "--json"]
    if read == "score":
        words += ["--shots=2", "--calibrate"]
    found = {}
    for name, more in (("here", []), ("there", ["--ray", cluster.address])):
        assert cli.run([*words, *more, f"--predictions={tmp_path / name}.jsonl"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result.pop("examples_per_s") > 0
        found[name] = result, (tmp_path / f"{name}.jsonl").read_text()
    assert found["there"] == found["here"] and found["here"][0]["n"] == 1000


def test_a_worker_dies_midway_and_its_examples_are_read_again(cluster: Any, assets: Path) -> None:
    loaded = load(str(assets / "model"), device="cpu", dtype="float32")
    template = load_template(TEMPLATE, "negative,positive")
    rows = load_dataset(str(assets / "data"), labels=template.labels).splits["test"]
    examples, _ = encode_rows(rows, template, loaded.tokenizer, loaded.model.max_seq_len)
    killed: list[int] = []

    def kill(done: int) -> None:
        if not killed:
            killed.append(wait_for_worker())
            os.kill(killed[0], signal.SIGKILL)

    config = EvaluateConfig(init_from=str(assets / "model"), ray=cluster.address)
    here = evaluate(loaded.model, loaded.tokenizer, template, examples, batch_size=8)
    with connected(config) as joined:
        reader = ray_predictor(joined, config, loaded)
        there = evaluate(
            loaded.model, loaded.tokenizer, template, examples, batch_size=8, predictor=reader, progress=kill
        )
    assert killed and there.rows == here.rows


def wait_for_worker() -> int:
    """A Ray worker at work on a piece."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        for line, pid in processes().items():
            if line.startswith("ray::_run_chunk"):
                return pid
    raise AssertionError("no worker is at work")


def test_pieces_hold_whole_batches_and_make_them_again(assets: Path) -> None:
    loaded = load(str(assets / "model"), device="cpu", dtype="float32")
    template = load_template(TEMPLATE, "negative,positive")
    rows = load_dataset(str(assets / "data"), labels=template.labels).splits["test"][:97]
    encoded, _ = encode_rows(rows, template, loaded.tokenizer, loaded.model.max_seq_len)
    examples = [replace(example, label_ids=()) for example in encoded]  # `ids` for all of them
    ids = [[5, 6], [7], [5, 8, 9]]
    batches = score_batches(examples, ids, 8)
    for most in (1, 3, 7, 100):
        pieces = chunk_batches(batches, most)
        assert sorted(row for piece in pieces for row in piece) == list(range(97))
        assert len(pieces) == min(most, len(batches))
        again = [
            [piece[i] for i in batch]
            for piece in pieces
            for batch in score_batches([examples[row] for row in piece], ids, 8)
        ]
        assert again == batches
        lengths = [len(e.prompt_ids) for e in examples]
        groups = list(decode_groups(lengths, 8))
        again = [
            [piece[i] for i in group]
            for piece in chunk_batches(groups, most)
            for group in decode_groups([lengths[row] for row in piece], 8)
        ]
        assert again == groups
    assert chunk_batches([], 4) == []
    work = LabelScoring(examples, ids, 8)
    assert work.batches() == batches
    whole = torch.tensor(work.run(loaded.model, 3, None))
    parts = [torch.tensor(work.select(piece).run(loaded.model, 3, None)) for piece in chunk_batches(batches, 3)]
    order = [row for batch in batches for row in batch]
    assert torch.equal(torch.cat(parts), whole[order])


# What goes wrong


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("graft: ")]
    assert out == "" and len(errors) == 1 and err.endswith(f"{errors[0]}\n") and "Traceback" not in err, err
    return errors[0].removeprefix("graft: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--ray=ray://host:10001"],
            "--ray 'ray://host:10001': must be auto, local, or HOST:PORT as in 127.0.0.1:6379",
        ),
        (["--ray=6379"], "--ray '6379': must be auto, local, or HOST:PORT"),
        (["--ray=local", "--cpus_per_task=0"], "--cpus_per_task 0: must be 1 or more"),
        (["--ray=local", "--gpus_per_task=1.5"], "--gpus_per_task 1.5: must be 0 to 1 or whole"),
        (["--ray=local", "--gpus_per_task=-1"], "--gpus_per_task -1.0: must be 0 to 1 or whole"),
        (["--cpus_per_task=2"], "--cpus_per_task only applies together with --ray"),
    ],
)
def test_flags_that_mean_nothing(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "evaluate", "--init_from=smollm2-135m", *words).startswith(line)


def test_no_cluster_at_the_address(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # bound, so that no one else has it, and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        line = refused(capsys, *compare(assets, tmp_path / "out", "--ray", address))
    assert line.startswith(f"--ray {address}: no cluster answers there (Connection refused): start one with ray start")


def test_without_ray_one_line_says_how_to_get_it(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused(capsys, *compare(assets, tmp_path / "out", "--ray", "auto"))
    assert line == "--ray needs the ray package: pip install 'graftlm[ray]'"


def test_more_than_a_node_has(cluster: Any, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, *compare(assets, tmp_path / "out", "--ray", cluster.address, "--cpus_per_task", "2"))
    assert line.startswith(
        "--cpus_per_task 2 --gpus_per_task 0: no node of the cluster has both; the largest has 1 CPU"
    )


def test_a_folder_that_a_node_does_not_see(
    cluster: Any, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("/proc/self/cwd/out")  # every process sees another folder under this name
    line = refused(capsys, *compare(assets, out, "--ray", cluster.address))
    assert line.startswith(f"node {socket.gethostname()}: does not see --out_dir {out}; name a folder on a file system")
    assert {path.name for path in Path("out").iterdir()} == {".lock"}


def test_a_node_without_this_version_or_with_other_weights(
    cluster: Any, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", f"--init_from={assets / 'model'}", f"--data={assets / 'data'}", "--template", TEMPLATE]
    monkeypatch.setattr(module, "_fingerprint", lambda asked, loaded: "others")
    line = refused(capsys, *words, "--limit=4", "--ray", cluster.address)
    assert line.endswith(f"{assets / 'model'}: has other weights there") and line.startswith("on node ")
    monkeypatch.setattr(module, "version", lambda name: "9.9")
    line = refused(capsys, *words, "--limit=4", "--ray", cluster.address)
    assert line.endswith("there and 9.9 here: install the same on every node")
    line = refused(capsys, *compare(assets, tmp_path / "out", "--ray", cluster.address))
    assert line.startswith(f"node {socket.gethostname()}: has graftlm ")
    assert "install 9.9, the version here, on every node" in line


def test_what_a_worker_refuses_is_refused_here(
    cluster: Any, assets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(init_from=str(assets / "model"), ray=cluster.address)
    loaded = load(config.init_from, device="cpu", dtype="float32")
    with connected(config) as joined, pytest.raises(InputError, match="the model reads at most 96"):
        ray_predictor(joined, config, loaded)(Generation([(1,) * 97], SamplingParams(max_new_tokens=1), 1))


def test_a_cluster_of_this_machine_alone(assets: Path) -> None:
    with connected(RayFlags(ray="local")) as alone:
        addresses = {node["NodeManagerAddress"] for node in alone.nodes}
        assert addresses == {"127.0.0.1"} and alone.slots >= 1
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        assert alone.ray.get(alone.task(chunk_batches, 0).remote([[0], [1]], 1)) == [[0, 1]]


def test_the_command_does_without_ray_until_it_is_asked_for() -> None:
    program = "import sys, graftlm.cli, graftlm.studies.ray_cluster\nprint('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
