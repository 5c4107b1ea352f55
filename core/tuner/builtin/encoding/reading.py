"""Reading an entry of the store: its bytes once, its tensors as views of them, its checksum at the first time.

A checksum finds what was cut, overwritten, or lost by the disk. One file is hashed once by a process: while it
has the same size, time and inode, nobody has written to it since.
"""

from __future__ import annotations

import hashlib
import json
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
PAGE = 4096
"""Files lie in whole pages of memory. A copy to another place in a page is slower, just after its beginning five times:
the processor takes what it reads next for what it has just written."""
Layout = tuple[tuple[str, torch.dtype, tuple[int, ...], int, int], ...]
"""Of every tensor of a file: name, dtype, shape, and its first and last byte but one."""
_whole: dict[str, tuple[Stamp, Layout]] = {}
"""Path to stamp and layout of the entries whose checksum this process found right."""
_layouts: dict[Layout, Layout] = {}
"""Equal ones once: most entries of a dataset are alike."""


def read(path: str) -> dict[str, Tensor]:
    """The tensors of the entry at ``path``, views of one buffer. Raises OSError, and ValueError for what is damaged."""
    data, stamp = contents(path)
    known, layout = _whole.get(path, (None, ()))
    if known != stamp:
        header, begin = split(data)
        if not fits(data, header, begin):
            raise ValueError("the checksum does not fit")
        layout = _layout(header, begin)
        _whole[path] = stamp, _layouts.setdefault(layout, layout)
    return {name: data[begin:end].view(dtype).view(shape) for name, dtype, shape, begin, end in layout}


def contents(path: str) -> tuple[Tensor, Stamp]:
    """All bytes of a safetensors file (N,) uint8, unpacked where they were packed, and the file's stamp.

    Raises OSError, and ValueError when it cannot be unpacked.
    """
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        stamp = Stamp.of(file.fileno())
        room = torch.empty(stamp.size + PAGE, dtype=torch.uint8)
        data = room[-room.data_ptr() % PAGE :][: stamp.size]
        rest = data.numpy().data
        while rest:  # at most 2 GiB come at once
            count = file.readinto(rest)
            if not count:
                raise ValueError("cut while it was read")
            rest = rest[count:]
    if path.endswith(PACKED):
        data = torch.frombuffer(bytearray(compression.decompress(data.numpy().tobytes())), dtype=torch.uint8)
    return data, stamp


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


def _layout(header: dict[str, Any], begin: int) -> Layout:
    """Safetensors keeps the widest types first, so that each tensor lies where its type may."""
    entries = ((name, entry, entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__")
    return tuple(
        (name, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + first, begin + last)
        for name, entry, (first, last) in entries
    )
