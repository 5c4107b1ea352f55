"""Reading an entry of the store: its bytes once, its tensors as views of them, its checksum at the first time.

A checksum finds what was cut, overwritten, or lost by the disk. One file is hashed once by a process: while it
has the same size, time and inode, nobody has written to it since.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from torch import Tensor

from tuner.builtin.encoding import compression
from tuner.builtin.encoding.stamps import Stamp

CHECKSUM = "sha256"
PACKED = ".zst"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_whole: dict[str, Stamp] = {}
"""Path to stamp of the entries whose checksum this process found right."""


def read(path: str) -> dict[str, Tensor]:
    """The tensors of the entry at ``path``, views of one buffer. Raises OSError, and ValueError for what is damaged."""
    stamp = Stamp.of(path)
    data = contents(path)
    header, begin = split(data)
    if _whole.get(path) != stamp:
        if not fits(data, header, begin):
            raise ValueError("the checksum does not fit")
        _whole[path] = stamp
    return {name: _view(data[begin:], entry) for name, entry in header.items() if name != "__metadata__"}


def contents(path: str) -> Tensor:
    """All bytes of a safetensors file (N,) uint8, unpacked where they were packed. ValueError when they cannot be."""
    if path.endswith(PACKED):
        with open(path, "rb") as file:  # noqa: PTH123
            return torch.frombuffer(bytearray(compression.decompress(file.read())), dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        data = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        rest = data.numpy().data
        while rest:  # at most 2 GiB come at once
            count = file.readinto(rest)
            if not count:
                raise ValueError("cut while it was read")
            rest = rest[count:]
    return data


def split(data: Tensor) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin. ValueError when it is cut or garbled."""
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    if len(data) < 8 + length:
        raise ValueError("cut inside the header")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, 8 + length


def checksum(data: Tensor, header: dict[str, Any], begin: int) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors; free text in the header is left out."""
    named = {name: entry for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    digest.update(data[begin:].numpy().data)
    return digest.hexdigest()


def fits(data: Tensor, header: dict[str, Any], begin: int) -> bool:
    """Whether the entry carries the checksum of its content."""
    metadata = header.get("__metadata__")
    return isinstance(metadata, dict) and metadata.get(CHECKSUM) == checksum(data, header, begin)


def _view(body: Tensor, entry: dict[str, Any]) -> Tensor:
    """A tensor of the file. Safetensors keeps the widest types first, so that each lies where its type may."""
    begin, end = entry["data_offsets"]
    return body[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
