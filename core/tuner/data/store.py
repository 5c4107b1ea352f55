"""A content-addressed store of tensors on disk.

An entry's name is the hash of all that decides its content, so nothing stale can be read and two runs share
what is equal. Entries are safetensors, written aside and renamed; each carries a checksum over its names,
shapes and bytes. Files that are not entries are neither read nor removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tuner.errors import DataError
from tuner.files import atomic_write_bytes

CHECKSUM = "sha256"
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_KEY = re.compile(r"[0-9a-f]{16,}")


def make_key(*parts: object) -> str:
    """The name of an entry: a hash over the parts, each told apart from its neighbours."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class Store:
    """Entries under one folder, at ``<root>/<first two digits>/<key>.safetensors``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Where the entry is or would be. ValueError for what is no key."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key: {key!r}")
        return self.root / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file for ``key``; it may be damaged (see :meth:`is_whole`)."""
        return self.path(key).is_file()

    def is_whole(self, key: str) -> bool:
        """Whether the entry is there and its checksum is right."""
        try:
            return _checksum_fits(self.path(key).read_bytes())
        except FileNotFoundError:
            return False

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU. Raises DataError when it is missing or damaged."""
        path = self.path(key)
        try:
            data = path.read_bytes()
            if _checksum_fits(data):
                tensors: dict[str, Tensor] = safetensors.torch.load(data)
                return tensors
            fault = "damaged"
        except FileNotFoundError:
            fault = "missing"
        except OSError as error:
            fault = f"unreadable ({error.strerror})"
        raise DataError(
            f"an entry of the cache is {fault}",
            where=path,
            remedy="start again: what is missing or damaged is encoded anew",
        )

    def write(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry at once or not at all; one that is there is replaced.

        Arguments
            tensors: name to tensor, on any device.
            metadata: what a person may want to know of the entry; text to text.
        Raises DataError when the disk is full or the folder cannot be written.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        checksum = _checksum(safetensors.torch.save(plain))
        data = safetensors.torch.save(plain, {**metadata, CHECKSUM: checksum})
        path = self.path(key)
        try:
            atomic_write_bytes(path, data)
        except OSError as error:
            full = error.errno in _NO_SPACE
            raise DataError(
                "the disk is full: the cache cannot be written"
                if full
                else f"the cache cannot be written: {error.strerror}",
                where=path.parent,
                remedy="free some space or move the cache folder, and start again: what is cached already is kept"
                if full
                else "make the folder writable or choose another cache folder",
            ) from error


def _split(data: bytes) -> tuple[dict[str, object], memoryview]:
    """Header and tensor bytes of a safetensors file. ValueError when it is cut or garbled."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise ValueError("cut inside the header")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, memoryview(data)[8 + length :]


def _checksum(data: bytes) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors; free text in the header is left out."""
    header, body = _split(data)
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()


def _checksum_fits(data: bytes) -> bool:
    try:
        metadata = _split(data)[0].get("__metadata__")
        return isinstance(metadata, dict) and metadata.get(CHECKSUM) == _checksum(data)
    except (ValueError, SafetensorError):
        return False
