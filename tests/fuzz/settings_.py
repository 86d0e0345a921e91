"""Recipes, sweeps and words on the command line."""

import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

from fuzz.base import ANY, Target
from graftlm.cli import COMMANDS
from graftlm.config import TrainConfig
from graftlm.config.flags import parse
from graftlm.studies.sweep import read_sweep

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(TrainConfig.__dataclass_fields__)


def read_recipe(folder: Path, content: bytes) -> object:
    (folder / "recipe.toml").write_bytes(content)
    return parse("train", TrainConfig, ["--config", "recipe.toml"])


def read_cells(folder: Path, content: bytes) -> object:
    (folder / "sweep.toml").write_bytes(content)
    return read_sweep("sweep.toml", {}, {})


def read_words(folder: Path, content: bytes) -> object:
    verb, *words = content.decode("utf-8", errors="surrogateescape").split("\0")
    found = COMMANDS.get(verb, COMMANDS["train"])
    return parse(verb if verb in COMMANDS else "train", found.config, words, found.positional)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "'none'" if value is None else json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


LINE = st.tuples(st.one_of(st.sampled_from(NAMES), st.text("abc_-.", min_size=1, max_size=6)), ANY).map(
    lambda pair: f"{pair[0]} = {toml(pair[1])}\n"
)


def made_recipe(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    return st.lists(LINE, min_size=1, max_size=5).map(lambda some: "".join(some).encode("utf-8", "surrogatepass"))


def made_cells(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    part = st.tuples(
        st.sampled_from(["[train]\n", "[grid]\n", "[[rows]]\n", "[rows]\n", ""]), st.lists(LINE, max_size=3)
    )
    whole = st.lists(part.map(lambda p: p[0] + "".join(p[1])), min_size=1, max_size=4)
    return whole.map(lambda some: "".join(some).encode("utf-8", "surrogatepass"))


def made_words(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    value = st.one_of(st.text(max_size=10), st.sampled_from(["1e999", "nan", "-1", "none", "9" * 5000, "true", "٣"]))
    flag = st.tuples(st.sampled_from(NAMES), value).map(lambda pair: f"--{pair[0]}={pair[1]}")
    words = st.lists(st.one_of(flag, flag, value, st.text("-=abc", max_size=6)), max_size=5)
    return st.tuples(st.sampled_from([*COMMANDS, "nope"]), words).map(
        lambda pair: "\0".join([pair[0], *pair[1]]).encode("utf-8", "surrogatepass")
    )


def every(*patterns: str) -> list[bytes]:
    return [path.read_bytes() for pattern in patterns for path in sorted(RECIPES.glob(pattern))]


WORDS = [
    b"train\0--rank=4\0--alpha\x0016\0--no_shared_prefix",
    b"generate\0--prompt\0hello\0--top_k=5",
    b"download\0gpt2",
]
TARGETS = [
    Target("recipes", lambda _: every("demo.toml"), read_recipe, made_recipe),
    Target("sweeps", lambda _: every("handout/*.toml", "methods/*.toml"), read_cells, made_cells),
    Target("flags", lambda _: WORDS, read_words, made_words),
]
