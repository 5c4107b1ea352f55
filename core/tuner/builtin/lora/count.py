"""What a LoRA adds to a network, counted from names and widths alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.builtin.lora.names import Targets, in_blocks
from tuner.spec import NetworkSpec


def counted(targets: Targets, network: NetworkSpec, *, dora: bool) -> Mapping[str, Any]:
    """The fields of a workload that a LoRA changes: parameters, and what it keeps of what the matrices are given."""
    parameters = on_text = 0
    inputs: dict[str, int] = {}
    for linear, names in zip(network.matrices, in_blocks(network), strict=True):
        found = targets.among(names, names)
        count = sum(rank * (linear.inputs + linear.outputs) for rank, _ in found.values())
        count += len(found) * linear.outputs if dora else 0
        parameters += count
        if linear.over != "tokens":
            on_text += count
        elif found:
            given = linear.input or linear.name
            inputs[given] = max(linear.inputs * len(found), inputs.get(given, 0))
    return {
        "adapter_parameters": parameters,
        "adapter_parameters_on_text": on_text,
        "adapted_width": round(sum(inputs.values()) / network.blocks),
        "adapted_inputs": frozenset(inputs),
    }
