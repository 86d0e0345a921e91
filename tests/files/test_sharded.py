"""Files that several writers make beside each other: what is whose, the index, and the one file they come to."""

from pathlib import Path

import pytest
import torch

from graftlm.errors import InputError
from graftlm.files import formats
from graftlm.files.formats import (
    LazyTensor,
    consolidate,
    load_safetensors,
    partition_by_size,
    read_json,
    read_weights,
    remove_weights,
    save_safetensors,
    save_sharded,
)

TENSORS = {
    "embed": torch.arange(60.0).view(20, 3),
    "a": torch.arange(12, dtype=torch.bfloat16).view(4, 3),
    "b": torch.arange(7, dtype=torch.int64),
    "c": torch.arange(30.0).view(2, 15),
    "scalar": torch.tensor(2.5),
}
LATER = {name: LazyTensor.of(t) for name, t in TENSORS.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_files_of_several_writers_are_read_as_one_and_joined_to_it(size: int, tmp_path: Path) -> None:
    for rank in range(size):
        save_sharded(tmp_path, "model", LATER, rank, size)
    parts = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    count = min(size, len(TENSORS))
    assert parts == [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in TENSORS.values())}
    assert index["weight_map"].keys() == TENSORS.keys() and set(index["weight_map"].values()) == set(parts)
    stored = read_weights(tmp_path)
    assert all(torch.equal(stored[name], t) and stored.shape(name) == t.shape for name, t in TENSORS.items())
    assert torch.equal(stored.part("embed", slice(3, 8), slice(1, 2)), TENSORS["embed"][3:8, 1:2])
    save_safetensors(tmp_path / "one", TENSORS)
    consolidate(tmp_path, "model")
    consolidate(tmp_path, "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "one"]
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "one").read_bytes()
    remove_weights(tmp_path, "model")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_joining_that_was_killed_can_be_read_and_ends_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        save_sharded(tmp_path, "model", LATER, rank, 2)

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(formats.Path, "unlink", killed)
        consolidate(tmp_path, "model")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()  # it was killed behind this one
    assert load_safetensors(tmp_path / "model.safetensors").keys() == TENSORS.keys() == set(read_weights(tmp_path))
    consolidate(tmp_path, "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_shares_have_about_as_many_bytes() -> None:
    sizes = [4096, *[1024, 1024, 64, 640] * 9]
    given = partition_by_size({f"t{i}": LazyTensor.of(torch.empty(size)) for i, size in enumerate(sizes)}, 4)
    held = [sum(sizes[int(name[1:])] for name in names) for names in given]
    assert sorted(name for names in given for name in names) == sorted(f"t{i}" for i in range(len(sizes)))
    assert max(held) - min(held) <= 640


def test_a_writer_that_fails_takes_part_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is gathered by all, also behind an error of one: else the others would wait for ever."""
    asked: list[str] = []

    def later(name: str) -> LazyTensor:
        def make() -> torch.Tensor:
            asked.append(name)
            return TENSORS[name]

        return LazyTensor(TENSORS[name].dtype, tuple(TENSORS[name].shape), make)

    tensors = {name: later(name) for name in TENSORS}
    save_sharded(tmp_path, "model", tensors, 0, 2)
    order, asked[:] = list(asked), []

    def full(*_: object) -> None:
        raise InputError("disk full")

    monkeypatch.setattr(formats, "write_safetensors", full)
    with pytest.raises(InputError, match="disk full"):
        save_sharded(tmp_path, "model", tensors, 1, 2)
    assert asked == order and sorted(order) == sorted(TENSORS)
