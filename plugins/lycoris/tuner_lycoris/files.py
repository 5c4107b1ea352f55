"""LyCORIS files that other programs load: names of keys, metadata, and the check before anything is written.

``comfyui`` is ``diffusion_model.`` and the model's original module names; ``kohya`` is ``lora_unet_`` and the same
with underscores, as musubi-tuner reads it; ``lycoris`` is what the LyCORIS library itself writes for a diffusers
model. The tensors are the same in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tuner import __version__
from tuner.errors import CheckpointError
from tuner.files import atomic_path
from tuner.spec import ModelSpec, NetworkSpec
from tuner_lycoris.adapter import Update

STEM = "pytorch_lora_weights"


@dataclass(frozen=True)
class Layout:
    """How one file format names modules."""

    prefix: str
    original_names: bool
    flat: bool
    """Whether the dots of a module's name become underscores."""

    def name(self, module: str, spec: ModelSpec) -> str:
        """The name in the file of a module of our network."""
        found = spec.original_name(module) if self.original_names else module
        return self.prefix + (found.replace(".", "_") if self.flat else found)


LAYOUTS: Mapping[str, Layout] = {
    "comfyui": Layout("diffusion_model.", original_names=True, flat=False),
    "kohya": Layout("lora_unet_", original_names=True, flat=True),
    "lycoris": Layout("lycoris_", original_names=False, flat=True),
}


def file_name(network: NetworkSpec, *, alone: bool) -> str:
    """Name of the file of ``network``: the plain one where it is alone, else one that says which it is of the pair."""
    return f"{STEM}.safetensors" if alone else f"{STEM}.{network.label or network.name}.safetensors"


def export(updates: Mapping[str, Update], spec: ModelSpec, layout: str) -> dict[str, Tensor]:
    """The tensors of a file on the CPU, by key.

    Raises CheckpointError where two modules would have one name, which a flat format cannot tell apart, and where
    the tensors of a module do not make up a matrix of its shape.
    """
    form, tensors = LAYOUTS[layout], {}
    owner: dict[str, str] = {}
    for module, update in updates.items():
        name = form.name(module, spec)
        if name in owner:
            raise CheckpointError(
                f"{owner[name]!r} and {module!r} are both called {name!r} in a {layout} file",
                where=f"lora_format {layout}",
                remedy="the table of names of the model family does not fit its network: report it to its author",
            )
        owner[name] = module
        found = update.factors.exported(update.settings.multiplier)
        _verify(module, found, update.factors.shape)
        tensors.update({f"{name}.{key}": tensor.to("cpu", copy=True).contiguous() for key, tensor in found.items()})
    return tensors


def _verify(module: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless a reader makes an update of ``shape`` of ``tensors``, from their names alone."""
    rows, columns = _made(tensors)
    flat = shape[0] * (shape[1] if len(shape) > 1 else 1)
    whole = 1
    for size in shape:
        whole *= size
    if rows != shape[0] or rows * columns not in (flat, whole):
        raise CheckpointError(
            f"the file's tensors of {module!r} make a matrix ({rows}, {columns}), and its weight has {shape}"
        )


def _made(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of the matrix that the tensors make."""
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "diff" in sizes:
        return sizes["diff"][0], tensors["diff"][0].numel()
    if "lora_up.weight" in sizes:
        return sizes["lora_up.weight"][0], tensors["lora_down.weight"][0].numel()
    if "hada_w1_a" in sizes:
        axis = 1 if "hada_t1" in sizes else 0
        return sizes["hada_w1_a"][axis], sizes["hada_w1_b"][1]
    small = sizes["lokr_w1"] if "lokr_w1" in sizes else (sizes["lokr_w1_a"][0], sizes["lokr_w1_b"][1])
    if "lokr_w2" in sizes:
        return small[0] * sizes["lokr_w2"][0], small[1] * tensors["lokr_w2"][0].numel()
    axis = 1 if "lokr_t2" in sizes else 0
    return small[0] * sizes["lokr_w2_a"][axis], small[1] * sizes["lokr_w2_b"][1]


def metadata(spec: ModelSpec, network: NetworkSpec, layout: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of the file, as text; ``facts`` are more things to say, None is left out. No date, no folder."""
    low, high = network.sigma_range
    entries = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{spec.flavour}/lycoris",
        "modelspec.implementation": "diffusers" if layout == "lycoris" else "original",
        "modelspec.title": facts.get("title"),
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": facts.get("rank"),
        "ss_network_alpha": facts.get("alpha"),
        "ss_base_model_version": f"{spec.family} {spec.flavour}",
        "ss_steps": facts.get("steps"),
        "tuner.version": __version__,
        "tuner.format": layout,
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


def write(tensors: Mapping[str, Tensor], described: Mapping[str, str], path: Path) -> None:
    """Write a file at once or not at all; the same training gives the same bytes."""
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(described))
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order: safetensors writes it in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= size:  # offsets count from the header's end, so its size must stay
            file.seek(8)
            file.write(ordered.ljust(size))
