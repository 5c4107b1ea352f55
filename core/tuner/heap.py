"""The C library's heap while weights are read: what is let go of goes back to the system.

glibc keeps freed blocks of up to 32 MiB in its heap, in between those that stay. While a network is quantised as it is
read, that came to several times the size of the network: see docs/benchmarks/quantisation.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of mallopt(3)."""
FROM = 2**20
"""Blocks of this many bytes and more are given back as soon as they are freed."""
USUAL = 2**25
"""What glibc comes to by itself."""


@contextmanager
def given_back() -> Iterator[None]:
    """While entered, freed memory of large tensors goes back to the system; then the heap is as usual, and trimmed."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, FROM)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, USUAL)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
