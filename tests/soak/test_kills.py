"""The short form of kills.py: a few kills of every verb that writes."""

import pytest

from soak.kills import CASES, Soak

KILLS = {"train": 6, "train-layers": 3, "compare": 1}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_it_ends_with_the_same_bits(name: str, soak: Soak) -> None:
    soak.soak(name, KILLS.get(name, 2), say=False)
    assert soak.tally[name]["failed"] == []
    assert soak.tally[name]["kills"] == soak.tally[name]["identical"] >= KILLS.get(name, 2)


def test_the_calls_that_are_counted_are_those_that_change_the_disk(soak: Soak) -> None:
    """A fault that meets nothing would prove nothing."""
    found = set(soak.reference("train").calls)
    assert {"open", "write", "fsync", "replace", "rename", "mkdir", "symlink", "unlink", "rmdir"} <= found
    assert soak.reference("train").calls.count("fsync") >= 3 * 6  # of three checkpoints each file and folder
    assert "store" in soak.reference("train-layers").calls
