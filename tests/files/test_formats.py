"""A reader never trusts a file, a writer never leaves half of one: json, safetensors, folders, links, full disks."""

import errno
import hashlib
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import UNCOUNTED
from graftlm.errors import InputError
from graftlm.files import atomic, formats


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "z": torch.randn(3, 4),
        "a": torch.arange(5),
        "b": torch.randn(2, 3).bfloat16(),
        "flag": torch.tensor(True),
        "é": torch.empty(0, 3),
        "half": torch.randn(3).half(),
        "double": torch.randn(2).double(),
        "view": torch.randn(4, 6).t()[1:],
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_safetensors_are_the_package_s_own_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    formats.save_safetensors(tmp_path / "ours.safetensors", tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_safetensors_come_back_bit_for_bit(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    formats.save_safetensors(path, tensors)
    lazy, loaded = formats.open_safetensors(path), formats.load_safetensors(path)
    assert set(lazy) == set(loaded) == set(tensors) and len(lazy) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(lazy[name], tensor) and lazy[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor) and lazy.shape(name) == tuple(tensor.shape)
    assert formats.tensors_sha256(lazy) == formats.tensors_sha256(dict(reversed(tensors.items())))


def test_the_hash_of_tensors_sees_names_shapes_dtypes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].int(), "b": base["b"]},
        {"a": base["a"] + torch.eye(2, 3) * 1e-30, "b": base["b"]},
        {"a": base["a"]},
    ]
    hashes = {formats.tensors_sha256(weights) for weights in [base, *others]}
    assert len(hashes) == len(others) + 1


def test_damaged_safetensors_are_one_line(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    formats.save_safetensors(path, tensors)
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "short": whole[:5],
        "cut in the header": whole[:40],
        "cut in the data": whole[:-1],
        "more than it says": whole + b"\0",
        "header length": b"\xff" * 8 + whole[8:],
        "header text": whole[:20] + b"\xff{" + whole[22:],
        "html": b"<html>not found</html>" * 20,
    }
    for what, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.safetensors: corrupted or truncated safetensors file") as caught:
            formats.load_safetensors(path)
        assert "\n" not in str(caught.value), what
    with pytest.raises(InputError, match="no such file"):
        formats.open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(InputError):
        formats.open_safetensors(tmp_path)


def test_sharded_weights_read_as_one(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    shards = {"model-1.safetensors": ["a", "z"], "model-2.safetensors": [n for n in tensors if n not in "az"]}
    for file, members in shards.items():
        formats.save_safetensors(tmp_path / file, {name: tensors[name] for name in members})
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    atomic.write_json(tmp_path / "model.safetensors.index.json", index)
    weights = formats.read_weights(tmp_path)
    assert set(weights) == set(tensors) and torch.equal(weights["z"], tensors["z"])
    assert [path.name for path in formats.weight_files(tmp_path)] == list(shards)

    index["weight_map"]["ghost"] = "model-1.safetensors"
    atomic.write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(InputError, match="no tensor 'ghost'"):
        formats.read_weights(tmp_path)
    index["weight_map"]["ghost"] = "../model-1.safetensors"
    atomic.write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(InputError, match="is not a safetensors file of this folder"):
        formats.read_weights(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    del index["weight_map"]["ghost"]
    atomic.write_json(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(InputError, match=r"shard model-2\.safetensors is missing"):
        formats.read_weights(tmp_path)
    atomic.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(InputError, match="has no weight_map"):
        formats.read_weights(tmp_path)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(tmp_path: Path, pickled: str) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / pickled)
    with pytest.raises(InputError, match="only safetensors and gguf are read"):
        formats.read_weights(tmp_path)


def test_a_folder_without_weights_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        formats.read_weights(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"name the file itself, .*m\.gguf"):
        formats.read_weights(tmp_path)


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(InputError, match=r"x\.json, line 2: broken JSON"):
        formats.read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"x\.json:1: byte 8 is not UTF-8"):
        formats.read_json(path)
    with pytest.raises(InputError, match="cannot read it: No such file"):
        formats.read_json(tmp_path / "none.json")
    atomic.write_json(path, {"é": [1.5, None]})
    assert formats.read_json(path) == {"é": [1.5, None]} and names(tmp_path) == {"x.json"}


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(path, {"new": float("nan")})
    with pytest.raises(ZeroDivisionError), atomic.atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert formats.read_json(path) == {"old": 1} and names(tmp_path) == {"x.json"}
    assert formats.sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with pytest.raises(ZeroDivisionError), atomic.atomic_directory(target) as folder:
        (folder / "a").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set(), "neither the folder nor the one that was made for it"
    with atomic.atomic_directory(target) as folder:
        assert folder.parent == target.parent and folder.name.startswith(".folder.tmp-")
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("one")
        assert not target.exists()
    with atomic.atomic_directory(target) as folder:  # an existing folder is replaced as a whole
        (folder / "b").write_text("two")
    assert names(target) == {"b"} and names(tmp_path / "deep") == {"folder"}


def test_leftovers_of_a_killed_process_go_and_a_moved_folder_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "step-[1]"
    for name in (".step-[1].tmp-1-ab", ".step-[1].old-cd", ".step-1.tmp-1-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    (tmp_path / ".step-[1].tmp-2-ef").write_text("a file")
    atomic.cleanup_tmp(target)
    assert names(tmp_path) == {"step-[1]", ".step-1.tmp-1-ab"} and (target / "a").read_text() == ".step-[1].old-cd"
    (tmp_path / ".step-[1].old-cd").mkdir()
    atomic.cleanup_tmp(target)
    assert names(tmp_path) == {"step-[1]", ".step-1.tmp-1-ab"}
    atomic.cleanup_tmp(tmp_path / "none" / "x")


def test_links_are_relative_and_swapped(tmp_path: Path) -> None:
    for step in ("step-1", "step-2"):
        (tmp_path / step).mkdir()
        atomic.atomic_symlink(tmp_path / "last", step)
        assert os.readlink(tmp_path / "last") == step
    assert names(tmp_path) == {"step-1", "step-2", "last"}


FULL = """
import resource, sys
from pathlib import Path
import torch
from graftlm.errors import InputError
from graftlm.files import atomic, formats
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder = Path(sys.argv[1])
def whole():
    with atomic.atomic_directory(folder / "new") as new:
        formats.save_safetensors(new / "model.safetensors", {"a": torch.zeros(100_000)})
for write in (lambda: formats.save_safetensors(folder / "x", {"a": torch.zeros(100_000)}), whole,
              lambda: atomic.write_text(folder / "x", "a" * 10_000)):
    try:
        write()
        print("written")
    except InputError as error:
        print(error)
"""


def test_a_file_too_large_for_the_disk_is_one_line_and_no_file(tmp_path: Path, child: Callable[..., Any]) -> None:
    output, errors = child(FULL, tmp_path, **UNCOUNTED).communicate()
    lines = output.splitlines()
    assert errors == ""
    assert len(lines) == 3 and all(line.startswith(f"disk full: cannot write {tmp_path}/") for line in lines)
    assert names(tmp_path) == set() and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_disk_that_is_full_only_when_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "os", SimpleNamespace(**{**vars(os), "fsync": fsync}))
    with pytest.raises(InputError, match=r"disk full: cannot write .*x\.json \(No space left on device\)"):
        atomic.write_json(tmp_path / "x.json", {})
    with pytest.raises(InputError, match="disk full"), atomic.atomic_directory(tmp_path / "folder") as folder:
        (folder / "a").touch()
    assert names(tmp_path) == set()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*: File exists: choose a folder"):
        atomic.write_text(tmp_path / "file" / "x", "")
    with pytest.raises(FileNotFoundError), atomic.disk_errors(tmp_path):  # other errors stay what they are
        (tmp_path / "none").read_bytes()


def test_importing_the_files_is_light(child: Callable[..., Any]) -> None:
    heavy = ("torch", "numpy", "gguf", "tokenizers", "huggingface_hub", "safetensors")
    code = (
        "import sys, graftlm.files.assets, graftlm.files.gguf, graftlm.text.tokenizer; "
        f"import json; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    assert child(code).communicate() == ("[]\n", "")


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "REMAP_AFTER", 10)  # so that the file is opened again for the second tensor
    path = tmp_path / "x.safetensors"
    formats.save_safetensors(path, {"a": torch.ones(4), "b": torch.ones(4)})
    lazy = formats.open_safetensors(path)
    assert torch.equal(lazy["a"], torch.ones(4)) and torch.equal(lazy["b"], torch.ones(4))
    formats.save_safetensors(path, {"a": torch.zeros(4), "b": torch.zeros(4)})
    with pytest.raises(InputError, match="was changed while it was being read: try again"):
        _ = lazy["a"]
