"""Writing files so that nothing half written is ever taken for whole.

Data goes to a temporary name in the same folder, is flushed to the disk, and only then renamed. A
reader therefore sees the old file or the new one, whatever happens in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tuner-partial-"
"""Prefix of temporary names; anything that starts with it may be removed when no run is alive."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; on success it is flushed to disk and renamed to ``path``, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: writers such as PyAV choose the container by it.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        # In a folder that is temporary itself, whoever renames that one sees to the disk.
        durable = not any(part.startswith(TEMPORARY) for part in path.parts[:-1])
        if durable:
            sync_file(temporary)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` at once or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` at once or not at all."""
    atomic_write_bytes(path, text.encode())


def sync_file(path: Path) -> None:
    """Return when the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the folder's entries are on the disk, where the system can say so."""
    with suppress(OSError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
