"""The comparison of two recordings finds what differs, and a spelling is the one a checkout's help page shows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from golden.record import compare, differences, record
from golden.session import fingerprint
from golden.spelling import Spelling, flat, renamed

VALUES: dict[str, Any] = {
    "train/lora/train_loss": [0.5, 0.25, 1e-3],
    "train/lora/last/sha256": "ab",
    "train/lora/last/norm": 2.0,
    "generate/lora": ["a text"],
    "train/lora/val_loss": [None, 0.5],
    "evaluate/confusion": [[1, 2], [3, 4]],
}
MACHINE = {"processor": "one"}


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"machine": MACHINE, "values": values}))
    return path


def compared(folder: Path, new: dict[str, Any], tolerance: float = 0.0) -> int:
    return compare(written(folder / "old.json", VALUES), written(folder / "new.json", new), tolerance)


def test_equal_recordings_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, dict(VALUES)) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        (
            "train/lora/train_loss",
            [0.5, math.nextafter(0.25, 1), 1e-3],
            "1 of 3 differ, largest relative difference 2.",
        ),
        ("train/lora/train_loss", [0.5, 0.25], "3 values, now 2"),
        ("train/lora/train_loss", [0.5, None, 1e-3], "1 of 3 differ, not comparable at 1: 0.25, now None"),
        ("train/lora/train_loss", [0.5, float("nan"), 1e-3], "1 of 3 differ, not comparable at 1: 0.25, now nan"),
        ("train/lora/last/sha256", "ac", "1 of 1 differ, not comparable: 'ab', now 'ac'"),
        ("generate/lora", ["a test"], "1 of 1 differ, not comparable: 'a text', now 'a test'"),
        (
            "evaluate/confusion",
            [[1, 2], [3, 5]],
            "1 of 2 differ, largest relative difference 0.2 at 1: [3, 4], now [3, 5]",
        ),
        ("train/lora/last/norm", True, "1 of 1 differ, not comparable: 2.0, now True"),
    ],
)
def test_a_planted_difference_is_found(
    key: str, value: Any, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(tmp_path, {**VALUES, key: value}) == 1
    [found] = capsys.readouterr().out.splitlines()
    assert found.startswith(f"{key}: {line}")


def test_a_missing_key_is_found_on_either_side() -> None:
    fewer = {key: value for key, value in VALUES.items() if key != "generate/lora"}
    assert list(differences(VALUES, fewer)) == ["generate/lora: missing in the new recording"]
    assert list(differences(fewer, VALUES)) == ["generate/lora: missing in the old recording"]


def test_a_job_that_failed_in_both_is_no_success() -> None:
    failed = {"train/ia3/failed": "status 1"}
    assert list(differences(failed, failed)) == ["train/ia3/failed: status 1"]


def test_nothing_recorded_is_no_success(tmp_path: Path) -> None:
    empty = written(tmp_path / "empty.json", {})
    assert compare(empty, empty, 0.0) == 1


def test_a_tolerance_is_for_numbers_and_leaves_hashes_to_their_norms(tmp_path: Path) -> None:
    near = {**VALUES, "train/lora/last/norm": 2.0 + 1e-9, "train/lora/last/sha256": "ac"}
    assert compared(tmp_path, near, 1e-6) == 0
    assert compared(tmp_path, near, 1e-12) == 1
    assert compared(tmp_path, {**VALUES, "generate/lora": ["a test"]}, 1e-6) == 1


def test_a_fingerprint_is_blind_to_names_and_order_and_to_nothing_else() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(3)
    one, renamed_, swapped = fingerprint({"a": a, "b": b}), fingerprint({"z": a, "y": b}), fingerprint({"b": b, "a": a})
    assert one == swapped and one["sha256"] == renamed_["sha256"] and one["names_sha256"] != renamed_["names_sha256"]
    reshaped, changed = (
        fingerprint({"a": a.reshape(3, 2), "b": b}),
        fingerprint({"a": a, "b": b.nextafter(torch.zeros(()))}),
    )
    assert len({one["sha256"], reshaped["sha256"], changed["sha256"]}) == 3


HELP = {
    "": "  train     learn\n  prefer    pairs\n",
    "train": "--compile {auto,on,off} --buckets, --no_buckets --max_iters INT",
    "export": "--merged, --no_merged --out_dir STR",
}
NEW = {
    "": "  train     learn\n  pairs     pairs\n",
    "train": "--kernels {auto,cpp,torch} --group-by-length, --no-group-by-length --max-iters INT",
    "export": "--format {peft,merged} --out-dir STR",
}


def test_each_checkout_is_asked_in_its_own_words() -> None:
    old, new = Spelling(HELP.__getitem__), Spelling(NEW.__getitem__)
    options = {"kernels": "cpp", "group_by_length": False, "max_iters": 3}
    assert old.words("train", options) == ["train", "--compile=on", "--no_buckets", "--max_iters=3", "--json"]
    assert new.words("train", options) == ["train", "--kernels=cpp", "--no_group_by_length", "--max_iters=3", "--json"]
    assert (old.subcommand("pairs"), new.subcommand("pairs")) == ("prefer", "pairs")
    assert old.words("export", {"format": "merged"}, ["run"]) == ["export", "run", "--merged", "--json"]
    assert new.words("export", {"format": "merged"}) == ["export", "--format=merged", "--json"]


def test_keys_get_the_newest_name_and_times_are_dropped() -> None:
    old: dict[str, Any] = {
        "low": 0.1,
        "seconds": 3.5,
        "cut": "all",
        "rows": [{"read": "score"}, {"read": "score", "said": "x"}],
    }
    old["pairs"] = {"cut": 3}
    kept: dict[str, Any] = {
        "ci_low": 0.1,
        "sharding": "full",
        "rows": [{"mode": "score"}, {"mode": "score", "prediction": "x"}],
    }
    kept["pairs"] = {"truncated": 3}
    assert renamed(old) == renamed(kept) == kept
    assert flat("a", kept) == {
        "a/ci_low": 0.1,
        "a/sharding": "full",
        "a/pairs/truncated": 3,
        "a/rows/mode": ["score", "score"],
        "a/rows/prediction": [None, "x"],
    }


def test_a_recording_of_this_checkout_has_its_values(tmp_path: Path) -> None:
    """One job, from the help pages to the file."""
    (tmp_path / "work").mkdir()
    out = tmp_path / "out.json"
    checkout = Path(__file__).parents[2]
    assert record(checkout, out, tmp_path / "work", "train/lora/llama/truncated", real_model=False) == 0
    values = json.loads(out.read_text())["values"]
    key = "train/lora/llama/truncated"
    assert len(values[f"{key}/train_loss"]) == 20 and values[f"{key}/last/norm"] > 0
    assert compare(out, out, 0.0) == 0
