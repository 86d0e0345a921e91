"""One table of spellings: the jobs use the newest; each checkout is asked what it understands.

A checkout's subcommands and flags are read from its help pages, one by one, so a checkout with only a part of the
renames can be recorded too. Keys of JSON objects and columns of files are mapped to the newest spelling before they are
saved. To follow another rename, add a line here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SUBCOMMANDS = {"pairs": ("prefer",), "estimate": ("account",), "download": ("fetch",)}
"""Newest -> older."""

FLAGS = {
    "mode": ("read",),
    "val_data": ("val",),
    "test_data": ("test",),
    "grad_clip": ("clip",),
    "warmup_steps": ("warmup",),
    "kernels": ("cpp_kernels", "compile"),
    "microbatch_tokens": ("micro_tokens",),
    "group_by_length": ("buckets",),
    "activation_cache_gb": ("frozen_cache_gb",),
    "method_args": ("settings",),
    "adapter_placement": ("placement",),
    "demo_selection": ("choose",),
    "num_permutations": ("orders",),
    "num_samples": ("samples", "n"),
    "show_prompts": ("show",),
    "prompt_words": ("opening",),
    "reward_model": ("judge",),
    "target_label": ("want",),
    "pairing": ("pairs",),
    "min_margin": ("margin",),
    "mlp_widths": ("ffn",),
    "device_gflops": ("gflops",),
    "bandwidth_gbs": ("link_gbs",),
    "world_size": ("processes",),
}
"""Newest -> older, newest of them first."""

VALUES = {
    "compile": {"cpp": "on", "torch": "off"},
    "cpp_kernels": {"cpp": "on", "torch": "off"},
}
"""Older flag -> newest value -> its value there."""

KEYS = {
    "read": "mode",
    "low": "ci_low",
    "high": "ci_high",
    "no_answer_rate": "unparsed_rate",
    "said": "prediction",
    "right": "correct",
    "share": "trainable_fraction",
    "share_trained": "trainable_fraction",
    "share_of_base": "trainable_vs_base",
    "rows_of_each": "per_device_batch_size",
    "sent_per_step": "comm_bytes_per_step",
    "link_seconds": "comm_seconds",
    "cut": "sharding",
    "number": "world_size",
    "processes": "distributed",
    "needed_tflop": "model_tflop",
    "pair_weight": "dpo_gradient_weight",
    "retokenised": "retokenized",
    "ended": "finished",
    "choose": "demo_selection",
    "samples": "num_samples",
    "order": "permutation",
    "gflops": "device_gflops",
    "moments": "optimizer_state",
    "optimizer": "optimizer_state",
    "optimiser": "optimizer_state",
}
"""Older key -> newest, of every JSON object and file."""

NUMBERS = {"cut": "truncated"}
"""Older key -> newest, where its value is a number and that of KEYS is not."""

KEY_VALUES = {"sharding": {"nothing": "none", "all": "full"}}
"""Newest key -> older value -> newest."""

DROPPED = {
    "examples_per_s",
    "tokens_per_s",
    "peak_rss_mb",
    "peak_cuda_mb",
    "seconds",
    "seconds_per_answer",
    "formulas",
    "note",
    "model",
    "method_args",
    "out",
    "path",
    "out_dir",
}
"""Keys that hold times, memory, prose and paths."""


class Spelling:
    """How one checkout spells subcommands and flags.

    help_page: the text of `graft --help` for "", of `graft SUBCOMMAND --help` for a subcommand.
    """

    def __init__(self, help_page: Callable[[str], str]) -> None:
        self._help_page = help_page
        self._subcommands = set(re.findall(r"^  (\w+)  ", help_page(""), re.MULTILINE))
        self._flags: dict[str, set[str]] = {}

    def subcommand(self, name: str) -> str:
        """The checkout's word for a subcommand."""
        return next((word for word in (name, *SUBCOMMANDS.get(name, ())) if word in self._subcommands), name)

    def words(self, subcommand: str, options: Mapping[str, Any], positional: Sequence[str] = ()) -> list[str]:
        """The words of a command. A value of True or False is a switch."""
        subcommand = self.subcommand(subcommand)
        words = [subcommand, *positional]
        for flag, value in options.items():
            words += self._option(subcommand, flag, value)
        return [*words, "--json"]

    def _option(self, subcommand: str, flag: str, value: Any) -> list[str]:
        if subcommand not in self._flags:
            page = self._help_page(subcommand)
            self._flags[subcommand] = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z0-9_-]*)", page)}
        known = self._flags[subcommand]
        if (flag, value) == ("format", "merged") and flag not in known:
            flag, value = "merged", True
        flag = next((word for word in (flag, *FLAGS.get(flag, ())) if word in known), flag)
        if isinstance(value, bool):
            return [f"--{flag}" if value else f"--no_{flag}"]
        return [f"--{flag}={VALUES.get(flag, {}).get(value, value)}"]


def renamed(data: Any) -> Any:
    """JSON data with the newest keys, without what differs from run to run."""
    if isinstance(data, list):
        return [renamed(value) for value in data]
    if not isinstance(data, dict):
        return data
    found: dict[str, Any] = {}
    for old, value in data.items():
        table = {**KEYS, **NUMBERS} if isinstance(value, int) else KEYS
        key = table.get(str(old), str(old))
        if key in DROPPED:
            continue
        value = renamed(value)
        found[key] = KEY_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    return found


def flat(prefix: str, data: Any) -> dict[str, Any]:
    """{"a/b": value} of nested objects; lists stay whole, lists of objects become lists by key."""
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        keys = dict.fromkeys(key for row in data for key in row)
        return flat(prefix, {key: [row.get(key) for row in data] for key in keys})
    if not isinstance(data, dict):
        return {prefix: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= flat(f"{prefix}/{key}", value)
    return found
