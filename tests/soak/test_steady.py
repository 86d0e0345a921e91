"""The short form of steady.py, and that it would see what it looks for."""

from pathlib import Path

from soak.steady import run, tenths, verdicts


def test_a_run_holds_its_loss_speed_and_memory(tmp_path: Path) -> None:
    """`steady.py` takes 100,000 steps; in 600 the speed is that of a busy machine, and little of it can be asked."""
    found = tenths(run(tmp_path, 600))
    assert len(found) == 10 and found[-1]["loss"] < found[0]["loss"]
    assert verdicts(found, speed=0.25, megabytes=16.0) == {"loss": True, "speed": True, "memory": True}


def test_what_does_not_hold_is_found() -> None:
    plain = {"loss": 0.1, "examples_per_s": 100.0, "peak_rss_mb": 300.0}
    for name, worse, row in (
        ("loss", 0.2, "loss"),
        ("speed", 70.0, "examples_per_s"),
        ("memory", 320.0, "peak_rss_mb"),
    ):
        held = verdicts([plain] * 9 + [{**plain, row: worse}], speed=0.8, megabytes=8.0)
        assert [key for key, value in held.items() if not value] == [name]
