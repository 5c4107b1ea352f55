"""LoRA files that other programs load: names of keys, metadata, and the check before anything is written.

The formats are those of :mod:`tuner.builtin.adapter_names`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.builtin.adapter_file import AdapterFile, Update, low_rank, save
from tuner.builtin.adapter_names import FORMATS, SPELLINGS, end_of
from tuner.errors import CheckpointError, nearest
from tuner.model import Adapter
from tuner.spec import ModelSpec, NetworkSpec

STEM = "pytorch_lora_weights"
"""The name that diffusers looks for in a folder."""
DOWN, UP, NORMS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector.weight"
"""Ends of the adapter's own names."""
PARTS = ("lora_down", "lora_up", "alpha", "magnitude", "dora_scale")
"""What a key of a LoRA file may hold."""
SHOWN = 3
"""How many foreign keys an error names."""


@dataclass(frozen=True)
class LoraFile:
    """What one file will hold: CPU tensors by key, and text by metadata key."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def file_name(network: NetworkSpec, *, alone: bool) -> str:
    """Name of the file of ``network``: the plain one where it is alone, else one that says which it is of the pair."""
    return f"{STEM}.safetensors" if alone else f"{STEM}.{network.label or network.name}.safetensors"


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all matrices and kernels of ``module`` by module name; call it before adapters are attached."""
    kernels = {
        name.removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if name.endswith(".weight") and parameter.ndim >= 2
    }
    # A quantised weight may be packed, and then has another shape than what it stands for.
    linears = [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    return kernels | {name: (each.out_features, each.in_features) for name, each in linears}


def export(adapter: Adapter, spec: ModelSpec, layout: str, facts: Mapping[str, Any]) -> LoraFile:
    """The file of a LoRA adapter in ``layout`` (a name of ``FORMATS``).

    The adapter's tensors are named ``<module>.lora_A.weight`` (r, in) and ``<module>.lora_B.weight`` (out, r), and
    with DoRA ``<module>.lora_magnitude_vector.weight`` (out,). ``facts`` are more things to say in the metadata; a
    value None is left out.
    """
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter.state().items()}
    modules = [name.removesuffix(DOWN) for name in state if name.endswith(DOWN)]
    updates = {name: _update(name, state, adapter.settings) for name in modules}
    tensors, metadata = FORMATS[layout].write(AdapterFile(updates, metadata=_metadata(facts)), spec)
    return LoraFile(tensors, metadata)


def _update(module: str, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Update:
    """What the original weight of ``module`` changes by.

    Where the LoRA took its start out of the base's weight it is the difference of two products: one of twice the rank.
    """
    down, up = state[module + DOWN], state[module + UP]
    alpha = float(settings.get("alphas", {}).get(module, settings["alpha"]))
    begun = settings.get("start", {}).get(module)
    if begun is not None:
        down, up = torch.cat([down, begun[0].to(down)]), torch.cat([up, -begun[1].to(up)], dim=1)
        alpha *= 2
    norms = state.get(module + NORMS)
    return low_rank(down, up, alpha, None if norms is None else norms.reshape(-1, *[1] * (down.ndim - 1)))


def _split(key: str) -> tuple[str, str]:
    """A key as (module, part of its LoRA); the part is empty where it is none of LoRA's."""
    end = end_of(key)
    part = SPELLINGS.get(end, "")
    return key.removesuffix(end).removesuffix("."), part if part in PARTS else ""


def verify(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, layout: str) -> None:
    """Raise CheckpointError unless every key names a matrix of the model (``shapes``) and fits it."""
    form = FORMATS[layout]
    known: dict[str, tuple[int, ...]] = {}
    for module, shape in shapes.items():
        name = form.module_name(module, spec)
        if name in known:
            raise CheckpointError(f"two modules of the model are both called {name!r} in a {layout} LoRA file")
        known[name] = shape
    foreign = sorted(key for key in tensors if _split(key)[0] not in known or not _split(key)[1])
    if foreign:
        raise CheckpointError(
            f"{len(foreign)} of {len(tensors)} keys of the LoRA file name no matrix of the model, such as "
            + ", ".join(foreign[:SHOWN]),
            where=f"lora_format {layout}",
            nearest=nearest(_split(foreign[0])[0], known),
            remedy="the table of names of the model family does not fit its network: report it to the family's author",
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = _split(key)
        pairs.setdefault(name, {})[part] = tensor
    for name, parts in pairs.items():
        _verify_pair(name, parts, known[name])


def _verify_pair(module: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    down, up = parts.get("lora_down"), parts.get("lora_up")
    if down is None or up is None:
        raise CheckpointError(f"the LoRA file has only one of the two matrices of {module!r}")
    if down.shape[1:] != shape[1:] or up.shape[0] != shape[0] or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"the LoRA of {module!r} has shapes {tuple(down.shape)} and {tuple(up.shape)}, and its weight has {shape}"
        )


def write(file: LoraFile, path: Path) -> None:
    """Write ``file`` to ``path`` at once or not at all."""
    save(file.tensors, file.metadata, path)


def model_facts(spec: ModelSpec, network: NetworkSpec) -> dict[str, Any]:
    """What metadata says of the model: nothing of the folders of the machine it was trained on."""
    low, high = network.sigma_range
    return {
        "base_model": spec.public_base,
        "family": spec.family,
        "flavour": spec.flavour,
        "network": network.name,
        "expert": network.label or None,
        "boundary": spec.boundary,
        "sigma_range": f"{low}-{high}",
    }


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the file's metadata says beside rank, alpha and format. No date: the same training gives the same bytes."""
    known = {name: value for name, value in facts.items() if value is not None}
    entries = {f"tuner.{name}": value for name, value in known.items() if name != "title"}
    entries |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{known.get('flavour', 'unknown')}/lora",
        "modelspec.title": known.get("title", "lora"),
        "ss_network_module": "networks.lora",
        "ss_base_model_version": f"{known.get('family', '')} {known.get('flavour', '')}".strip(),
        "ss_steps": known.get("steps", 0),
    }
    return {name: str(value) for name, value in entries.items()}
