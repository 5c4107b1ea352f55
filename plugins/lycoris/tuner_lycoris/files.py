"""LyCORIS files that other programs load: named as one of the formats of adapter files has it, and read back before
anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tuner.builtin import adapter_file, adapter_names
from tuner.spec import ModelSpec, NetworkSpec
from tuner_lycoris.adapter import tree, updates
from tuner_lycoris.factors import weight_shape

STEM = "pytorch_lora_weights"


def file_name(network: NetworkSpec, *, alone: bool) -> str:
    """Name of the file of ``network``: the plain one where it is alone, else one that says which it is of the pair."""
    return f"{STEM}.safetensors" if alone else f"{STEM}.{network.label or network.name}.safetensors"


def export(
    module: nn.Module, spec: ModelSpec, layout: str, described: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of the file of an adapted network.

    ``described`` is what the metadata says beside what follows from the tensors. Raises CheckpointError where two
    modules would have one name, and where a reader of the format would not find in the file what was trained.
    """
    form = adapter_names.FORMATS[layout]
    tensors, metadata = form.write(content(module, described), spec)
    shapes = {name: weight_shape(module.get_submodule(name)) for name in tree(module).kinds}
    adapter_file.refuse_unread(form.read(tensors, metadata, spec, shapes), len(tensors), f"lora_format {layout}")
    return tensors, metadata


def content(module: nn.Module, described: Mapping[str, str]) -> adapter_file.AdapterFile:
    """What was trained on a network, by module."""
    found: dict[str, adapter_file.Update] = {}
    biases: dict[str, Tensor] = {}
    for name, update in updates(module).items():
        tensors = update.factors.exported(update.settings.multiplier)
        alpha, bias = tensors.pop("alpha", None), tensors.pop("diff_b", None)
        bare = {part.removesuffix(".weight"): tensor for part, tensor in tensors.items()}
        found[name] = adapter_file.Update(bare, None if alpha is None else float(alpha))
        if bias is not None:
            biases[name] = bias
    return adapter_file.AdapterFile(found, biases, described)


def described(spec: ModelSpec, network: NetworkSpec, facts: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the model and, with ``facts``, the training, as text; None is left out. No date, no folder."""
    low, high = network.sigma_range
    entries = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.flavour}/lycoris",
        "modelspec.title": facts.get("title"),
        "ss_network_module": "lycoris.kohya",
        "ss_base_model_version": f"{spec.family} {spec.flavour}",
        "ss_steps": facts.get("steps"),
        "tuner.base_model": spec.public_base,
        "tuner.family": spec.family,
        "tuner.flavour": spec.flavour,
        "tuner.network": network.name,
        "tuner.expert": network.label or None,
        "tuner.boundary": spec.boundary,
        "tuner.sigma_range": f"{low}-{high}",
    }
    entries |= {f"tuner.{name}": value for name, value in facts.items() if name != "title"}
    return {name: str(value) for name, value in entries.items() if value is not None}
