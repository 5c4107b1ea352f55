"""A content-addressed store of tensors on disk.

An entry's name is the hash of all that decides its content, so nothing stale can be read and two runs share
what is equal. Entries are safetensors, written aside and renamed; each carries a checksum over its names,
shapes and bytes. Files that are not entries are neither read nor removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from tuner.builtin.encoding import compression, reading
from tuner.builtin.encoding.stamps import Stamp, Stamps
from tuner.errors import DataError
from tuner.files import atomic_write_bytes

SUFFIX = ".safetensors"
PACKED_SUFFIX = ".safetensors.zst"
CHECK_THREADS = 4
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_KEY = re.compile(r"[0-9a-f]{16,}")


def make_key(*parts: object) -> str:
    """The name of an entry: a hash over the parts, each told apart from its neighbours."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class Lacking(NamedTuple):
    """The keys that have no whole entry."""

    absent: list[str]
    damaged: list[str]


class Store:
    """Entries under one folder, at ``<root>/<first two digits>/<key>.safetensors``, or ``….safetensors.zst``.

    Either form is read, whatever ``compress`` says: it decides only what is written.
    """

    def __init__(self, root: Path, *, compress: bool = False) -> None:
        self.root, self.compress = root, compress
        self._folder = os.fspath(root)
        self.stamps = Stamps(root)

    def path(self, key: str) -> Path:
        """Where the entry is, or would be written. ValueError for what is no key."""
        wanted, other = map(Path, self._forms(key))
        return other if not wanted.exists() and other.exists() else wanted

    def has(self, key: str) -> bool:
        """Whether there is a file for ``key``; it may be damaged (see :meth:`is_whole`)."""
        return self.path(key).is_file()

    def is_whole(self, key: str) -> bool:
        """Whether the entry is there and its checksum is right: all of it is read."""
        try:
            data, _ = reading.contents(os.fspath(self.path(key)))
            return reading.fits(data, *reading.split(data))
        except (FileNotFoundError, ValueError):
            return False

    def stamp(self, key: str) -> Stamp | None:
        """What the entry's file is known by; None where there is none."""
        for path in self._forms(key):
            with suppress(FileNotFoundError):
                return Stamp.of(path)
        return None

    def lacking(
        self, keys: Collection[str], *, reread: bool = False, advance: Callable[[int], None] = lambda _: None
    ) -> Lacking:
        """Those of ``keys`` that have no whole entry, in the same order.

        An entry that was found whole before, and whose file has the same size, time and inode, is only looked up.

        Arguments
            reread: read every entry, whatever is known of it.
            advance: called with the number of keys that are done.
        """
        known = {} if reread else self.stamps.known()
        now = {key: stamp for key in keys if (stamp := self.stamp(key)) is not None}
        unsure = [key for key, stamp in now.items() if known.get(key) != stamp]
        advance(len(keys) - len(unsure))
        whole: dict[str, Stamp] = {}
        damaged: list[str] = []
        try:
            with ThreadPoolExecutor(CHECK_THREADS) as pool:
                for key, fits in zip(unsure, pool.map(self.is_whole, unsure), strict=True):
                    advance(1)
                    if fits:
                        whole[key] = now[key]
                    else:
                        damaged.append(key)
        finally:
            self.stamps.record(whole)
            self.stamps.forget(damaged)
        return Lacking([key for key in keys if key not in now], damaged)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU, views of one buffer. Raises DataError when it is missing or damaged."""
        fault = "missing"
        for path in self._forms(key):
            try:
                return reading.read(path)
            except FileNotFoundError:
                continue
            except ValueError:
                fault = "damaged"
            except OSError as error:
                fault = f"unreadable ({error.strerror})"
            break
        self.stamps.forget([key])
        raise DataError(
            f"an entry of the cache is {fault}",
            where=self.path(key),
            remedy="start again: what is missing or damaged is encoded anew",
        )

    def write(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write an entry at once or not at all; one that is there, in either form, is replaced.

        Arguments
            tensors: name to tensor, on any device.
            metadata: what a person may want to know of the entry; text to text.
        Raises DataError when the disk is full or the folder cannot be written.
        """
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        bare = torch.frombuffer(bytearray(safetensors.torch.save(plain)), dtype=torch.uint8)
        checksum = reading.checksum(bare, *reading.split(bare))
        data = safetensors.torch.save(plain, {**metadata, reading.CHECKSUM: checksum})
        path, other = map(Path, self._forms(key))
        try:
            atomic_write_bytes(path, compression.compress(data) if self.compress else data)
            other.unlink(missing_ok=True)
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

    def _forms(self, key: str) -> tuple[str, str]:
        """Where the entry lies in the form that is written, and in the other one: text, for there are many of them."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key: {key!r}")
        stem = f"{self._folder}{os.sep}{key[:2]}{os.sep}{key}"
        plain, packed = stem + SUFFIX, stem + PACKED_SUFFIX
        return (packed, plain) if self.compress else (plain, packed)
