"""LoRA files that other programs load: names of keys, metadata, and the check before anything is written.

``comfyui`` is ``diffusion_model.`` and the model's original module names, with one ``alpha`` beside each
pair; ComfyUI and diffusers both read it. ``diffusers`` is ``transformer.`` and diffusers' module names,
with alpha in the metadata ``lora_adapter_metadata``, as ``save_lora_weights`` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner import __version__
from tuner.errors import CheckpointError, nearest
from tuner.files import atomic_path
from tuner.model import Adapter
from tuner.spec import ModelSpec, NetworkSpec

STEM = "pytorch_lora_weights"
"""The name that diffusers looks for in a folder."""
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
SHOWN = 3
"""How many foreign keys an error names."""


@dataclass(frozen=True)
class Layout:
    """How one file format names things."""

    prefix: str
    original_names: bool
    alpha_tensors: bool

    def name(self, module: str, spec: ModelSpec) -> str:
        """The name in the file of a module of our network."""
        return self.prefix + (spec.original_name(module) if self.original_names else module)


LAYOUTS: Mapping[str, Layout] = {
    "comfyui": Layout("diffusion_model.", original_names=True, alpha_tensors=True),
    "diffusers": Layout("transformer.", original_names=False, alpha_tensors=False),
}


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
    """The file of a LoRA adapter in ``layout`` (a key of ``LAYOUTS``).

    The adapter's tensors are named ``<module>.lora_A.weight`` (r, in) and ``<module>.lora_B.weight`` (out, r).
    ``facts`` are more things to say in the metadata; a value None is left out.
    """
    form = LAYOUTS[layout]
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.state().items():
        module, suffix = _split(name)
        tensors[form.name(module, spec) + suffix] = tensor.detach().to("cpu", copy=True).contiguous()
        if form.alpha_tensors and suffix == DOWN:
            tensors[form.name(module, spec) + ALPHA] = torch.tensor(float(adapter.settings["alpha"]))
    return LoraFile(tensors, _metadata(adapter, layout, facts))


def _split(key: str) -> tuple[str, str]:
    """A key as (module, suffix); the suffix is empty where it is none of LoRA's."""
    for suffix in (DOWN, UP, ALPHA):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, ""


def verify(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, layout: str) -> None:
    """Raise CheckpointError unless every key names a matrix of the model (``shapes``) and fits it."""
    form = LAYOUTS[layout]
    known: dict[str, tuple[int, ...]] = {}
    for module, shape in shapes.items():
        name = form.name(module, spec)
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
    for module in {_split(key)[0] for key in tensors}:
        _verify_pair(module, tensors, known[module])


def _verify_pair(module: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    down, up = tensors.get(module + DOWN), tensors.get(module + UP)
    if down is None or up is None:
        raise CheckpointError(f"the LoRA file has only one of the two matrices of {module!r}")
    if down.shape[1:] != shape[1:] or up.shape[0] != shape[0] or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"the LoRA of {module!r} has shapes {tuple(down.shape)} and {tuple(up.shape)}, and its weight has {shape}"
        )


def write(file: LoraFile, path: Path) -> None:
    """Write ``file`` to ``path`` at once or not at all."""
    with atomic_path(path) as temporary:
        save_file(dict(file.tensors), temporary, metadata=dict(file.metadata))
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order: safetensors writes it in a random one, and equal files should be equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Tensor offsets count from the header's end, so its size must stay; the format allows trailing spaces.
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


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


def _metadata(adapter: Adapter, layout: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the file, as text. No date: the same training gives the same bytes."""
    rank, alpha = adapter.settings["rank"], adapter.settings["alpha"]
    known = {name: value for name, value in facts.items() if value is not None}
    entries = {f"tuner.{name}": value for name, value in known.items() if name != "title"}
    entries |= {"tuner.version": __version__, "tuner.format": layout, "tuner.rank": rank, "tuner.alpha": alpha}
    entries |= {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{known.get('flavour', 'unknown')}/lora",
        "modelspec.implementation": "diffusers" if layout == "diffusers" else "original",
        "modelspec.title": known.get("title", "lora"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_base_model_version": f"{known.get('family', '')} {known.get('flavour', '')}".strip(),
        "ss_steps": known.get("steps", 0),
    }
    if layout == "diffusers":
        config = {f"transformer.{name}": value for name, value in adapter.settings["peft"].items()}
        entries["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    return {name: str(value) for name, value in entries.items()}
