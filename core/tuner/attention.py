"""What an attention plugin offers to the core's registry. Importing this costs nothing."""

from __future__ import annotations

from dataclasses import dataclass

EXACT = frozenset({"diffusers", "auto"})
"""Values of ``attention_mechanism`` that mean the best exact kernel of the device, which the core chooses."""


@dataclass(frozen=True)
class AttentionBackend:
    """One attention kernel, by the name the diffusers dispatcher knows it by.

    ``trains`` says whether gradients flow through it on this machine: a kernel without a backward is
    used in validation only and training keeps the exact kernel.
    """

    dispatcher: str
    trains: bool
