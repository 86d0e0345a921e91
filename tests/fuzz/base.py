"""What a fuzzer is: valid files, ways to spoil them, a reader, and what may come of it.

An input is a valid file with some of its bytes changed (seeded by its number), or one that hypothesis made of the
format's own parts. The reader must give a result or a GraftError: not another exception, not a hang (an alarm ends what
takes longer than SECONDS), and not more memory than the target says.

What is unusual here: the memory that counts is what the whole process came to, above what it had before the first
input, so what C and Rust allocate counts too; and each target runs in a process of its own, so an abort is seen.
"""

import json
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from graftlm.errors import GraftError

SECONDS = 5.0
ODD = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
Reader = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Target:
    """One kind of input and its reader."""

    name: str
    valid: Callable[[Path], Sequence[bytes]]
    """Makes what the reader needs in a folder, and returns valid contents."""
    read: Reader
    """Given that folder and a content."""
    made: Callable[[Sequence[bytes]], "st.SearchStrategy[bytes]"] | None = None
    """A strategy for contents that are of the format, or nearly."""
    megabytes: int = 256
    """What reading any one of them may take at most, above what the process had."""


@dataclass
class Tally:
    """What came of a target's inputs."""

    inputs: int = 0
    results: int = 0
    errors: int = 0
    """GraftErrors."""
    defects: dict[str, list[str]] = field(default_factory=dict)
    """By the place it came from: the first traceback, and how many there were."""
    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    megabytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": self.inputs,
            "results": self.results,
            "errors": self.errors,
            "tracebacks": sum(self.counts.values()),
            "slowest_seconds": round(self.slowest, 3),
            "megabytes": round(self.megabytes, 1),
        }


class Hang(BaseException):
    """The alarm."""


def _alarm(*_: object) -> None:
    raise Hang(f"took longer than {SECONDS:g} s")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(target: Target, inputs: int, folder: Path, first: int = 0) -> Tally:
    """So many inputs, half of them (or all) spoiled bytes; `first` is the number of the first."""
    tally, valid = Tally(), [bytes(v) for v in target.valid(folder)]
    os.chdir(folder)
    for content in valid:  # they are valid indeed, and what the reader imports at its first use is no input's doing
        target.read(folder, content)
    before = peak_mb()
    signal.signal(signal.SIGALRM, _alarm)

    def attempt(content: bytes) -> None:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.read(folder, content)
            tally.results += 1
        except GraftError:
            tally.errors += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a traceback, a hang, a panic of a library
            _note(tally, error, content)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        tally.inputs += 1
        tally.slowest = max(tally.slowest, time.monotonic() - began)

    if target.made is not None:
        _by_hypothesis(target.made(valid), attempt, inputs // 2, first)
    for number in range(first, first + inputs - tally.inputs):
        attempt(spoiled(valid, random.Random(f"{target.name} {number}")))
    tally.megabytes = peak_mb() - before
    if tally.megabytes > target.megabytes:
        _note(tally, MemoryError(f"{tally.megabytes:.0f} MB, more than {target.megabytes}"), b"")
    return tally


def _by_hypothesis(strategy: "st.SearchStrategy[bytes]", attempt: Callable[[bytes], None], n: int, first: int) -> None:
    @seed(first)
    @settings(
        max_examples=max(n, 1),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(content: bytes) -> None:
        attempt(content)

    each()


def _note(tally: Tally, error: BaseException, content: bytes) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "graftlm" in f.filename] or frames
    place = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "?"
    key = f"{type(error).__name__} at {place}"
    tally.counts[key] += 1
    if key not in tally.defects:
        tally.defects[key] = ["".join(traceback.format_exception(error))[-1500:], repr(content[:600])]


# Spoiling -------------------------------------------------------------------------------------------------------------


def spoiled(valid: Sequence[bytes], chance: random.Random) -> bytes:
    """A valid content with one to eight changes of its bytes."""
    content = bytearray(chance.choice(valid))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 2, 4, 8, 16, 64))
        kind = chance.randrange(8)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = chance.randbytes(length)
        elif kind == 4:
            content[at:at] = content[at : at + length] * chance.choice((1, 2, 20))
        elif kind == 5:
            size = chance.choice((1, 2, 4, 8))
            content[at : at + size] = (chance.choice(ODD) & (256**size - 1)).to_bytes(
                size, chance.choice(("little", "big"))
            )
        elif kind == 6:
            del content[at:]
        else:
            other = chance.choice(valid)
            start = chance.randrange(len(other) + 1)
            content[at : at + length] = other[start : start + length]
    return bytes(content)


# JSON that is nearly right --------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 8, 10**9, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e300, -1e300, 1e-300]),
    st.integers(),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12))
ANY = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that stands in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, inner in list(inside)[:40] for p in places(inner, (*path, key)))]


def changed_json(value: Any) -> "st.SearchStrategy[Any]":
    """The value with one to three of its parts replaced by anything, or gone."""
    every = places(value)
    text = json.dumps(value)

    def apply(changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
        whole = json.loads(text)
        for path, new in changes:
            if not path:
                whole = None if new is GONE else new
                continue
            at = whole
            try:
                for key in path[:-1]:
                    at = at[key]
                if new is GONE:
                    del at[path[-1]]
                else:
                    at[path[-1]] = new
            except (KeyError, IndexError, TypeError):
                continue
        return whole

    change = st.tuples(st.sampled_from(every), st.one_of(st.just(GONE), ANY, ANY))
    return st.lists(change, min_size=1, max_size=3).map(apply)


def as_json(value: Any) -> bytes:
    """Bytes of a JSON value; half a character and all."""
    return json.dumps(value).encode()


def changed_files(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    """For files that are one JSON value each."""
    return st.one_of([changed_json(json.loads(content)) for content in valid]).map(as_json)
