"""Host memory for what is offloaded: flat buffers, pinned where there is a CUDA device."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from tuner.errors import ConfigError
from tuner_offload.masters import Plan


class HostStore:
    """Keeps masters in host memory (see :data:`tuner_offload.masters.Store`)."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned

    @torch.no_grad()
    def __call__(self, plan: Plan) -> Tensor:
        """A buffer (N,) uint8 with all that ``plan`` names."""
        buffer = host_buffer(plan.nbytes, pinned=self._pinned)
        for _, piece, tensor in plan.pieces:
            piece.view(buffer).copy_(tensor)
        return buffer


def host_buffer(nbytes: int, *, pinned: bool) -> Tensor:
    """Uninitialised host memory (nbytes,) uint8. Raises ConfigError where the system pins no more."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if pinned and nbytes:
        _pin(buffer)
    return buffer


def _pin(buffer: Tensor) -> None:
    """Pin memory that exists: torch's own pinned allocator rounds up to a power of two, 0.7 GiB to 1 GiB."""
    runtime, address = torch.cuda.cudart(), buffer.data_ptr()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
    if code != 0:
        raise ConfigError(
            f"{buffer.nbytes / 2**30:.2f} GiB of host memory could not be pinned (CUDA error {code})",
            where="enable_group_offload: true",
            remedy="free host memory, raise the limit of locked memory (ulimit -l), or quantise the base",
        )
    # Views keep the storage, and with it this, alive.
    release = weakref.finalize(buffer.untyped_storage(), runtime.cudaHostUnregister, address)
    release.atexit = False
