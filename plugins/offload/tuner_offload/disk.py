"""Masters that are files: mapped into memory, so that the system reads them when they are copied and forgets at will.

A weight that the base's own files hold as it is needed is mapped where it lies. What was changed on the way, to
another precision say, is written once, to a file named after its content: the next run finds it there.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import ConfigError
from tuner.files import atomic_path
from tuner_offload.masters import Piece, Plan
from tuner_offload.scattered import Scattered

GIB = 2**30
WHERE = "group_offload_to_disk_path"
MAPS = Path("/proc/self/maps")
Stored = tuple[str, Piece, Tensor]


class DiskStore:
    """Keeps masters in safetensors files under ``folder`` and in the base's own (see ``tuner_offload.masters.Store``).

    Nothing in the folder is ever removed or overwritten. Raises ConfigError where it cannot be written, or a file in
    it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_mapped = self.bytes_found = self.bytes_written = 0
        """Bytes in the base's own files, in files of an earlier run, and in files written now."""

    def __call__(self, plan: Plan) -> Scattered:
        """A buffer with all that ``plan`` names, read from files when it is copied."""
        files = _Mapped()
        parts: dict[int, Tensor] = {}
        others: list[Stored] = []
        for name, piece, tensor in plan.pieces:
            if files.holds(tensor) and tensor.stride() == piece.stride and tensor.is_contiguous():
                parts[piece.offset] = tensor.detach().view(-1).view(torch.uint8)
                self.bytes_mapped += piece.nbytes
            elif piece.nbytes:
                others.append((name, piece, tensor))
        return Scattered(parts | (self._stored(others) if others else {}), plan.nbytes)

    def describe(self) -> str:
        """Where the weights are, in words."""
        shares = (
            (self.bytes_mapped, "in the base's own files"),
            (self.bytes_found, f"found in {self.folder}"),
            (self.bytes_written, f"written to {self.folder}"),
        )
        return ", ".join(f"{size / GIB:.2f} GiB {where}" for size, where in shares if size) or "nothing"

    def _stored(self, pieces: Sequence[Stored]) -> dict[int, Tensor]:
        """Mapped bytes of ``pieces`` by their offset, from a file that is written where there is none."""
        tensors = {name: _bytes(piece, tensor) for name, piece, tensor in pieces}
        layout = {name: _layout(piece) for name, piece, _ in pieces}
        size = sum(each.nbytes for each in tensors.values())
        path = self.folder / f"{_digest(tensors, layout)}.safetensors"
        if path.exists():
            self.bytes_found += size
        else:
            self._write(path, tensors, layout, size)
            self.bytes_written += size
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found = {piece.offset: file.get_tensor(name) for name, piece, _ in pieces}
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"an offloaded group cannot be read: {error}", where=f"{WHERE}: {path}", remedy="remove this file"
            ) from error
        return found

    def _write(self, path: Path, tensors: dict[str, Tensor], layout: dict[str, str], size: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise ConfigError(
                    f"the disk is full: a group needs {size / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free",
                    where=f"{WHERE}: {self.folder}",
                    remedy="free some space, choose another folder, or quantise the base (base_model_precision)",
                )
            with atomic_path(path) as temporary:
                save_file(tensors, temporary, {"format": "pt", "layout": json.dumps(layout)})
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"a group of blocks cannot be offloaded to disk: {error}",
                where=f"{WHERE}: {self.folder}",
                remedy="choose a folder that can be written and has space",
            ) from error


def _bytes(piece: Piece, tensor: Tensor) -> Tensor:
    """The bytes (n,) uint8 of ``tensor`` as ``piece`` lays them out."""
    flat = torch.empty(piece.nbytes, dtype=torch.uint8)
    replace(piece, offset=0).view(flat).copy_(tensor.detach())
    return flat


def _layout(piece: Piece) -> str:
    return f"{piece.dtype} {list(piece.shape)} strides {list(piece.stride)}"


def _digest(tensors: dict[str, Tensor], layout: dict[str, str]) -> str:
    """SHA-256 of names, layouts and content, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(layout).encode())
    for each in tensors.values():
        digest.update(each.numpy().data)
    return digest.hexdigest()


class _Mapped:
    """Which memory of this process is a file's. Where the system does not say, none is."""

    def __init__(self) -> None:
        self._ranges = sorted(_ranges(MAPS.read_text().splitlines())) if MAPS.exists() else []

    def holds(self, tensor: Tensor) -> bool:
        """Whether all of ``tensor`` lies in a mapped file."""
        if tensor.device.type != "cpu" or not tensor.nbytes:
            return False
        address = tensor.data_ptr()
        place = bisect.bisect_right(self._ranges, (address, 2**64)) - 1
        return place >= 0 and address + tensor.nbytes <= self._ranges[place][1]


def _ranges(lines: Iterable[str]) -> Iterable[tuple[int, int]]:
    """(first address, end) of each mapped file that still exists, by the lines of ``/proc/self/maps``."""
    for line in lines:
        fields = line.split(maxsplit=5)
        name = fields[5] if len(fields) == 6 else ""
        # By no suffix: in the hub's cache a file is named after its content.
        if name.startswith("/") and not name.startswith(("/dev/", "/memfd:")) and not name.endswith(" (deleted)"):
            first, _, end = fields[0].partition("-")
            yield int(first, 16), int(end, 16)
