"""Find the clips and pictures of a folder: every file is stat'ed, none is opened."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import overload

from tuner.builtin.garbage import uncollected
from tuner.data.source import Found, Listing
from tuner.errors import DataError

VIDEO_SUFFIXES = frozenset(
    (
        ".3gp",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    )
)
PICTURE_SUFFIXES = frozenset((".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_NAME = itemgetter(0)
_Row = tuple[str, int, int]
"""name inside the folder, bytes, mtime_ns"""


class Files(Sequence[Found]):
    """Files of one folder, kept as columns: a hundred thousand are compared without an object for each.

    Arguments
        root: the folder with a separator at its end; ``root + name`` is a file's path.
        names: paths inside it.
        sizes: bytes.
        times: mtime_ns.
    """

    def __init__(self, root: str, names: Sequence[str], sizes: Sequence[int], times: Sequence[int]) -> None:
        self.root, self.names, self.sizes, self.times = root, names, sizes, times

    @classmethod
    def of(cls, listing: Listing) -> Files:
        """The columns of any listing."""
        files = listing.files
        if isinstance(files, cls):
            return files
        root = os.path.join(listing.root, "")  # noqa: PTH118
        names = [each.path[len(root) :] for each in files]
        return cls(root, names, [each.size for each in files], [each.mtime_ns for each in files])

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Found | Files:
        if isinstance(index, slice):
            return Files(self.root, self.names[index], self.sizes[index], self.times[index])
        return Found(self.root + self.names[index], self.sizes[index], self.times[index])

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Found]:
        return map(Found, map(str.__add__, repeat(self.root), self.names), self.sizes, self.times)


def local_listing(folder: Path, suffixes: Collection[str]) -> Listing:
    """The files of a local folder. Raises DataError when it cannot be read."""
    try:
        # Not resolve(): the names of people's files are kept, where they are links too.
        return Listing(Path(os.path.abspath(folder)), scan(folder, suffixes))  # noqa: PTH100
    except OSError as error:
        raise DataError(
            f"a folder of files cannot be read: {error.strerror or error}",
            where=error.filename or folder,
            remedy="correct instance_data_dir, or the permissions",
        ) from error


def scan(folder: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> Files:
    """Every file under ``folder`` with one of ``suffixes`` (hidden files and folders left out), sorted by path.

    Each is stat'ed, none is opened. Raises OSError for a folder that cannot be read.
    """
    root = os.path.join(os.path.abspath(folder), "")  # noqa: PTH100, PTH118
    names: list[str] = []
    sizes: list[int] = []
    times: list[int] = []
    pending, seen, in_order = [""], set(), True
    with uncollected():
        while pending:
            inner = pending.pop()
            here = root + inner
            status = os.stat(here)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                continue  # a link that leads back
            seen.add((status.st_dev, status.st_ino))
            with _opened(here) as entries:
                rows, folders = _looked_through(entries, here, inner, suffixes)
            pending += sorted(folders, reverse=True)
            if rows:
                rows.sort(key=_NAME)
                in_order = in_order and (not names or names[-1] < rows[0][0])
                # Folder by folder, while its rows are in the processor's cache: all at once takes twice as long.
                some_names, some_sizes, some_times = zip(*rows, strict=True)
                names += some_names
                sizes += some_sizes
                times += some_times
        files = Files(root, names, sizes, times)
        return files if in_order else _sorted(files)


def _sorted(files: Files) -> Files:
    """By path: needed where a folder holds both files and folders."""
    names, sizes, times = files.names, files.sizes, files.times
    order = sorted(range(len(names)), key=names.__getitem__)
    return Files(files.root, [names[at] for at in order], [sizes[at] for at in order], [times[at] for at in order])


def _looked_through(
    entries: Iterable[os.DirEntry[str]], here: str, inner: str, suffixes: Collection[str]
) -> tuple[list[_Row], list[str]]:
    """The files and the folders among ``entries``, with ``inner`` before their names; folders end in a separator."""
    rows: list[_Row] = []
    folders: list[str] = []
    for entry in entries:
        name = entry.name
        if name[0] == ".":
            continue
        try:
            if entry.is_dir():
                folders.append(inner + name + os.sep)
            elif name[-4:] in suffixes or name[name.rfind(".") :].lower() in suffixes:  # most suffixes are of three
                status = entry.stat()
                rows.append((inner + name, status.st_size, status.st_mtime_ns))
        except FileNotFoundError:
            pass  # a link to nowhere
        except OSError as error:
            error.filename = here + name
            raise
    return rows, folders


@contextmanager
def _opened(folder: str) -> Iterator[Iterable[os.DirEntry[str]]]:
    """The entries of a folder. Where the system can, they are stat'ed from there and not from the root of the disk."""
    if os.scandir not in os.supports_fd:
        with os.scandir(folder) as entries:
            yield entries
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(handle) as entries:
            yield entries
    finally:
        os.close(handle)
