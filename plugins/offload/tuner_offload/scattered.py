"""A group's weights that lie in several places, such as the files of a base: read as if they were one buffer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tuner_offload.masters import Buffer


class Scattered:
    """Implements :class:`tuner_offload.masters.Buffer`.

    Arguments
        parts: offset in the buffer -> bytes (n,) uint8 that belong there.
        nbytes: size of the whole; what is in no part is padding.
    """

    def __init__(self, parts: Mapping[int, Tensor], nbytes: int) -> None:
        self.parts = dict(parts)
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        """N."""
        return self._nbytes

    def __getitem__(self, place: slice, /) -> Tensor:
        """The part that begins where ``place`` does."""
        return self.parts[place.start][: place.stop - place.start]


@torch.no_grad()
def copy_into(target: Tensor, source: Buffer) -> None:
    """Copy all of ``source`` to ``target`` (N,) uint8; from pinned memory the host does not wait."""
    if isinstance(source, Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(source, Scattered):
        for offset, part in source.parts.items():
            target[offset : offset + part.nbytes].copy_(part, non_blocking=True)
    else:
        raise TypeError(f"cannot copy from {type(source).__name__}")
