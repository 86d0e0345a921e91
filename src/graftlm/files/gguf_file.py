"""A .gguf file: its settings, and its tensors as float32. The `gguf` package reads the container and dequantises.

A model in several files (`x-00001-of-00003.gguf`, …) is read from its first file: the settings are there, the tensors
in all of them.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import InputError

if TYPE_CHECKING:
    import gguf
    import numpy as np

ROWS = 2048  # rows dequantised at a time: 2048 x 576 values are 5 MB
BROKEN = (ValueError, IndexError, KeyError, OverflowError, TypeError, struct.error, EOFError)
KEPT = {
    **{"F16": None, "BF16": None, "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}
"""Formats whose blocks a model can keep -> the bytes of a block at which it has a float16; None: all values are."""
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn any error of reading a damaged file into one line."""
    try:
        yield
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: corrupted or truncated gguf file ({reason[:120]}): fetch it again") from error


def gguf_parts(path: Path) -> list[Path]:
    """The files of the model that `path` is the first file of: `path` alone in most cases."""
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    stem, number, count, suffix = found.groups()
    parts = [path.with_name(f"{stem}-{i + 1:05}-of-{count}{suffix}") for i in range(int(count))]
    if missing := [part for part in parts if not part.is_file()]:
        raise InputError(f"{path}: the model has {int(count)} files; {missing[0].name} is missing: fetch it too")
    if int(number) != 1:
        raise InputError(f"{path}: is a later file of a model: name the first, {parts[0]}")
    return parts


class GGUFFile:
    """The settings and tensors of a model's files.

    Settings that were read are remembered: `ignored` names the others.
    """

    def __init__(self, path: Path) -> None:
        readers = [_open(part) for part in gguf_parts(path)]
        self.set_contents(path, readers[0].fields, {t.name: t for reader in readers for t in reader.tensors})

    def set_contents(self, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """The fields and tensors as the `gguf` package gives them."""
        self.path, self._fields, self.tensors, self._read = path, fields, tensors, set[str]()
        self.architecture: str = self.require("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        """A setting. A key that begins with a dot is the architecture's own (`.block_count`)."""
        key = self.architecture + key if key.startswith(".") else key
        self._read.add(key)
        return self._fields[key].contents() if key in self._fields else default

    def require(self, key: str) -> Any:
        """A setting that every file has."""
        if (value := self.get(key)) is None:
            name = self.architecture + key if key.startswith(".") else key
            raise InputError(f"{self.path}: has no {name}: not a complete gguf file, fetch or convert it again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float: the shortest decimal of the same float32 (9.999999747378752e-06 in a file was written as 1e-05)."""
        import numpy as np

        return float(str(np.float32(self.require(key) if default is None else self.get(key, default))))

    def text(self, key: str, index: int) -> str:
        """One element of an array of texts."""
        found: str = self._fields[key].contents(index)
        return found

    def length(self, key: str) -> int:
        """The length of an array of texts, which are not decoded."""
        return len(self._fields[key].data) if key in self._fields else len(self.require(key))

    def ignored(self, prefix: str) -> dict[str, Any]:
        """The settings with this prefix that have not been read."""
        names = [key for key in self._fields if key.startswith(prefix) and key not in self._read]
        return {key: self._fields[key].contents() for key in names}

    def has(self, short: str, part: str) -> bool:
        """Whether the model, or its first layer, has this weight or bias."""
        return f"{short}.{part}" in self.tensors or f"blk.0.{short}.{part}" in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return tuple(int(side) for side in reversed(self.tensors[name].shape.tolist()))

    def values(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        import numpy as np

        parts = [np.frombuffer(part, "<f4") for part in self.float32(name)]
        return np.concatenate(parts).reshape(self.shape(name))

    def kept_format(self, name: str) -> str:
        """The format of a matrix whose blocks a model can keep, in lower case; empty for any other tensor."""
        kind = self.tensors[name].tensor_type.name
        return kind.lower() if kind in KEPT and len(self.shape(name)) == 2 else ""

    def blocks(self, name: str, order: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """The blocks of such a matrix as they are in the file, uint8 [rows, bytes]; order: as in `float32`."""
        import numpy as np
        from gguf import GGML_QUANT_SIZES

        tensor = self.tensors[name]
        data = np.ascontiguousarray(tensor.data if order is None else order(tensor.data)).view(np.uint8)
        size, scales = GGML_QUANT_SIZES[tensor.tensor_type][1], KEPT[tensor.tensor_type.name]
        for rows in np.array_split(data, max(1, len(data) // ROWS)):
            blocks = rows.reshape(-1, size)
            ends = [blocks[:, 1]] if scales is None else [blocks[:, at + 1] for at in scales]
            infinite = [(end & 0x7F) >= 0x7C for end in ends]  # float16's exponent has the five bits after the sign
            if scales is None and tensor.tensor_type.name == "BF16":
                infinite = [((blocks[:, 1] & 0x7F) == 0x7F) & (blocks[:, 0] >= 0x80)]
            if any(flags.any() for flags in infinite):
                raise self._infinite(name)
        return data

    def _infinite(self, name: str) -> InputError:
        return InputError(f"{self.path}: tensor {name} holds infinite values: corrupted, fetch it again")

    def transposed(self, name: str) -> Iterator[memoryview]:
        """A matrix's values in column-major order; all of them are in memory."""
        import numpy as np

        yield np.ascontiguousarray(self.values(name).T).data.cast("B")

    def float32(
        self, name: str, order: Callable[[np.ndarray], np.ndarray] | None = None, offset: float = 0.0
    ) -> Iterator[memoryview]:
        """A tensor's values plus `offset` as float32 in row-major order, a slice of rows at a time.

        order: applied to the rows as they are stored. Rows are quantised separately.
        """
        import numpy as np
        from gguf import dequantize

        tensor = self.tensors[name]
        data = tensor.data if order is None else order(tensor.data)
        for start in range(0, data.shape[0], ROWS):
            try:
                with np.errstate(all="ignore"):  # a corrupted scale gives values that are not finite: checked below
                    values = dequantize(data[start : start + ROWS], tensor.tensor_type)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise InputError(f"{self.path}: quantisation {kind} is not supported: use another file") from error
            if not np.isfinite(values).all():
                raise self._infinite(name)
            yield np.ascontiguousarray(values + np.float32(offset) if offset else values, dtype="<f4").data.cast("B")


def _open(path: Path) -> gguf.GGUFReader:
    """Read the file's header.

    Unlike the package's reader, this one raises an error at the end of a truncated file, and reads a whole array at
    once: a vocabulary of 262,144 tokens takes it a second, the package's twenty.
    """
    from gguf import GGUFReader, GGUFValueType

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            part = super()._get(offset, dtype, count, override_order)
            if len(part) != int(count):
                raise ValueError(f"the file ends at byte {len(self.data)}, before the end of its header")
            return part

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, length = self._get(orig_offs, "<u4"), self._get(orig_offs + 4, "<u8")
            of, start = GGUFValueType(kind[0]), orig_offs + 12
            if of == GGUFValueType.STRING:
                size, parts = self._strings(start, int(length[0]))
            elif of in self.gguf_scalar_to_np:
                whole = self._get(start, self.gguf_scalar_to_np[of], int(length[0]))
                size, parts = whole.nbytes, [whole] if len(whole) else []
            else:
                raise ValueError(f"an array of {of.name} is unknown")
            places = list(range(2, 2 + len(parts)))
            return 12 + size, [kind, length, *parts], places, [GGUFValueType.ARRAY, *([of] if parts else [])]

        def _strings(self, start: int, count: int) -> tuple[int, list[Any]]:
            view, at, parts = memoryview(self.data), start, []
            for _ in range(count):
                (size,) = struct.unpack_from("<Q", view, at)
                parts.append(view[at + 8 : at + 8 + size])
                at += 8 + size
                if at > len(view):
                    raise ValueError(f"the file ends at byte {len(view)}, before the end of its header")
            return at - start, parts

    try:
        reader = BoundedReader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error
    if reader.byte_order != "I":
        raise InputError(f"{path}: is a big-endian gguf file: convert it to little-endian")
    return reader
