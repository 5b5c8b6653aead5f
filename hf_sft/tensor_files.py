"""Safetensors files, read and written a few rows at a time, so that no tensor need ever be in memory whole.

The format: 8 bytes, the length of the header, little-endian; the header, a JSON object of names with dtype, shape and place;
the numbers, row by row. Larger element types come first, so that every tensor is aligned.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 18  # numbers that are read, changed and written at once
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made when it is written.

    Attributes:
        shape: the whole tensor's; a number has shape ().
        dtype: what it is written in.
        rows: ``rows(a, b)`` gives rows a to b, [b - a, *shape[1:]], in any type; a number has one row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def count(self) -> int:
        """Rows."""
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterable[tuple[int, int]]:
        """Ranges of rows of about ``PIECE`` numbers."""
        step = max(1, PIECE // max(1, math.prod(self.shape[1:])))
        return ((start, min(start + step, self.count)) for start in range(0, self.count, step))

    def whole(self) -> Tensor:
        return self.rows(0, self.count).reshape(self.shape)


def held(tensor: Tensor, dtype: torch.dtype | None = None) -> StreamedTensor:
    """A tensor that is in memory already; its rows are copies, which may be written to."""
    value = tensor.detach() if tensor.ndim else tensor.detach().reshape(1)
    return StreamedTensor(tuple(tensor.shape), dtype or tensor.dtype, lambda a, b: value[a:b].clone())


def read_tensors(path: Path) -> dict[str, StreamedTensor]:
    """What a safetensors file holds, in its order.

    Raises:
        ValueError: a type of numbers that torch does not have.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} holds {entry['dtype']} numbers, which cannot be read in pieces.")
        found[name] = _stored(
            path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), DTYPES[entry["dtype"]]
        )
    return found


def _stored(path: Path, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> StreamedTensor:
    width = math.prod(shape[1:])

    def rows(a: int, b: int) -> Tensor:
        room = bytearray((b - a) * width * dtype.itemsize)  # read, not mapped: mapped pages would stay in memory
        if not room:
            return torch.empty((b - a, *shape[1:]), dtype=dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(begin + a * width * dtype.itemsize)
            view = memoryview(room)
            while view:
                if not (count := file.readinto(view)):
                    raise ValueError(f"{path} ends too early; it is not complete.")
                view = view[count:]
        return torch.frombuffer(room, dtype=dtype).view(b - a, *shape[1:])

    return StreamedTensor(shape, dtype, rows)


def write_tensors(path: Path, tensors: Mapping[str, StreamedTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, a few rows at a time."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: else as given
    with path.open("wb") as file:
        file.write(header_bytes([(name, tensor.shape, tensor.dtype) for name, tensor in ordered], metadata))
        for name, tensor in ordered:
            for a, b in tensor.pieces():
                piece = tensor.rows(a, b)
                if tuple(piece.shape[1:]) != tensor.shape[1:] or len(piece) != b - a:
                    raise AssertionError(f"{name}: rows {a} to {b} have shape {tuple(piece.shape)}")
                file.write(raw(piece, tensor.dtype))


def header_bytes(
    entries: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a safetensors file whose numbers follow in the order of ``entries``: name, shape, type."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    place = 0
    for name, shape, dtype in entries:
        end = place + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The numbers of a tensor, as a file holds them."""
    return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_shards(folder: Path, shards: Iterable[Mapping[str, StreamedTensor]], stem: str = "model") -> None:
    """Write each mapping to a file of its own, named as transformers names them, with an index where there are several."""
    parts = [part for part in shards if part]
    if len(parts) == 1:
        write_tensors(folder / f"{stem}.safetensors", parts[0])
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        write_tensors(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.bytes for part in parts for tensor in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def split_by_size(tensors: Mapping[str, StreamedTensor], largest: int) -> list[dict[str, StreamedTensor]]:
    """Shards of at most ``largest`` bytes, in order; a tensor that is larger has one of its own."""
    shards: list[dict[str, StreamedTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.bytes > largest:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.bytes
    return shards


def size_in_bytes(size: int | str) -> int:
    """5000000, "5MB" or "4GiB" in bytes.

    Raises:
        ValueError: no size, or none above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (count := int(float(match[1]) * unit)) < 1:
        raise ValueError(f"max_shard_size is {size!r}; give bytes, or a number with a unit, such as 500MB or 5GB.")
    return count
