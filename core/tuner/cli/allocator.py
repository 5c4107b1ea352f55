"""How torch's allocator holds a card's memory, where whoever runs it has not said."""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib.metadata import PackageNotFoundError, version

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch reads, the newer name first."""
SETTING = "expandable_segments:True"


def settle(environment: MutableMapping[str, str]) -> None:
    """Ask for segments that grow, in ``environment``, before torch is imported.

    Clips of several sizes, and routes of several lengths, leave gaps in segments of fixed size that nothing else
    fits into (torch, "CUDA semantics", memory management). Whoever set one of the variables is left alone, and so is
    ROCm, whose allocator has no such segments and would say so with a warning.
    """
    if any(name in environment for name in NAMES):
        return
    try:
        if "rocm" in version("torch"):
            return
    except PackageNotFoundError:
        return
    environment[NAMES[1]] = SETTING  # the older name is the one that every version we support reads
