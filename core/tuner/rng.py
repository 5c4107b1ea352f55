"""Counter-based randomness: every number drawn in a step is a function of what it is for and where it stands.

A generator is derived from (seed, purpose, step, position in the global batch). So unloading a plugin
moves nobody else's numbers, one process and many draw the same noise for the same sample, recomputation
in backward is safe, and resuming needs no generator state.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed that depends on every argument; equal arguments give equal seeds on every machine."""
    text = "\x1f".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for ``purpose`` at ``counters`` (usually step and position).

    It lives on the CPU on purpose: the numbers then do not depend on the device.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *counters))


def seed_global(seed: int, purpose: str, *counters: int) -> None:
    """Seed torch's generators of the CPU and of this process's device, which dropout and adapters draw from."""
    import torch

    torch.default_generator.manual_seed(derived := derive_seed(seed, purpose, *counters))
    # Not torch.manual_seed: for every kind of device that there is not it notes a stack trace, a millisecond in all.
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed(derived)
