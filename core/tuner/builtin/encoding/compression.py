"""zstd for entries of the cache: an optional package, asked for only where it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

LEVEL = 1
"""Higher levels take several times as long and save next to nothing more on latents: see docs/cache.md."""


def zstandard() -> ModuleType:
    """The package. Raises ConfigError that names the extra when it is not installed."""
    try:
        import zstandard as package
    except ImportError:
        raise ConfigError(
            "compressed entries of the cache need the package zstandard, which is not installed",
            where="compress_disk_cache",
            remedy="install it with `pip install 'difftuner[zstd]'`, or leave compress_disk_cache off and name another "
            "cache folder",
        ) from None
    return package


def compress(data: bytes) -> bytes:
    """``data`` as one zstd frame."""
    packed: bytes = zstandard().ZstdCompressor(level=LEVEL).compress(data)
    return packed


def decompress(data: bytes) -> bytes:
    """What :func:`compress` was given. ValueError for what is no whole frame."""
    package = zstandard()
    try:
        whole: bytes = package.ZstdDecompressor().decompress(data)
    except (package.ZstdError, MemoryError) as error:  # a damaged header may ask for any amount of memory
        raise ValueError(f"not a whole zstd frame: {error}") from None
    return whole
