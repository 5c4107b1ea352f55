"""Which programs would not load a key of an adapter file, and why.

From the code of ComfyUI (``comfy/lora.py``: ``model_lora_keys_unet``, and ``comfy/weight_adapter``) and of diffusers
(``loaders/lora_conversion_utils.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tuner.builtin.adapter_file import AdapterFile, Shapes
from tuner.builtin.adapter_names import FORMATS, end_of
from tuner.spec import ModelSpec

COMFYUI, DIFFUSERS = "ComfyUI", "diffusers"
PEFT_ONLY = ("lora_magnitude_vector", "lora_B.bias", "lora_A.default", "lora_B.default")
"""What ends of keys begin with that no adapter of ComfyUI has."""
IN_DIFFUSERS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
CONVERTED = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "diff_b")
"""What diffusers' converter of original names takes."""
CONVERTED_FLAT = ("lora_down.weight", "lora_up.weight", "alpha")
"""What its converter of kohya's names takes."""


@dataclass(frozen=True)
class Names:
    """The modules that keys name by the very rules of each format."""

    dotted: Mapping[str, str]
    flat: Mapping[str, str]
    image: Mapping[str, str]
    """module of an image's embedding -> end of its name"""
    blocks: Mapping[str, Collection[str]]
    """block -> its matrices but for those, in order"""

    @classmethod
    def of(cls, spec: ModelSpec, shapes: Shapes) -> Names:
        """Those of a model."""
        linears = [each for network in spec.networks for each in network.linears]
        image = {
            module: each.name
            for each in linears
            if each.over == "image"
            for module in shapes
            if module.endswith(f".{each.name}")
        }
        blocks: dict[str, list[str]] = {}
        ends = tuple(dict.fromkeys(f".{each.name}" for each in linears if each.over != "image"))
        for module in shapes:
            if end := next((end for end in ends if module.endswith(end)), None):
                blocks.setdefault(module.removesuffix(end), []).append(module)
        dotted, flat = (
            {FORMATS[form].module_name(module, spec): module for module in shapes} for form in ("comfyui", "kohya")
        )
        return cls(dotted, flat, image, blocks)

    def module(self, key: str) -> str | None:
        """The module that ComfyUI would find for a key."""
        name = key.removesuffix(end_of(key)).removesuffix(".")
        return self.dotted.get(name) or self.flat.get(name)


def refused(keys: Collection[str], file: AdapterFile, spec: ModelSpec, shapes: Shapes) -> dict[str, dict[str, str]]:
    """Program -> key -> why it does not load it, or not as it is meant. Keys that fit no model are left out."""
    known, names = [key for key in keys if key not in file.unread], Names.of(spec, shapes)
    comfyui = {key: why for key in known if (why := _comfyui(key, file, names))}
    found = {COMFYUI: comfyui, DIFFUSERS: _diffusers(known, file, names, shapes)}
    return {program: refusals for program, refusals in found.items() if refusals}


def _comfyui(key: str, file: AdapterFile, names: Names) -> str | None:
    module = names.module(key)
    if module is None:
        return "it reads diffusion_model.* and lora_unet_* with the model's original names only"
    end = end_of(key)
    if end.startswith(PEFT_ONLY):
        return "none of its adapters has such a tensor"
    update = file.updates.get(module)
    if end == "dora_scale" and update is not None and update.by_rows:
        return "it divides by the norms of the base's rows, where DoRA divides by those of the sum"
    return None


def _diffusers(keys: Collection[str], file: AdapterFile, names: Names, shapes: Shapes) -> dict[str, str]:
    if {update.kind for update in file.updates.values()} & {"hada", "lokr"}:
        return dict.fromkeys(keys, "it has no loader for LoHa and LoKr, and refuses the whole file")
    flat = any(key.startswith(FORMATS["kohya"].prefixes) for key in keys)
    if flat and (lacking := _lacking(file, names)):
        return dict.fromkeys(keys, f"it reads these names only where every matrix of a block is there: no {lacking}")
    halves = {names.image[module] for module in file.updates if module in names.image}
    alone = len(halves) == 1 and len(set(names.image.values())) > 1
    return {key: why for key in keys if (why := _diffusers_key(key, names, shapes, alone=alone))}


def _diffusers_key(key: str, names: Names, shapes: Shapes, *, alone: bool) -> str | None:
    end = end_of(key)
    if key.startswith(FORMATS["diffusers"].prefixes):
        return None if end in IN_DIFFUSERS else "none of its LoRA layers has such a tensor"
    flat = key.startswith(FORMATS["kohya"].prefixes)
    if not flat and not key.startswith(FORMATS["comfyui"].prefixes):
        return "it reads transformer.*, diffusion_model.* and lora_unet_* only"
    module = names.module(key)
    if module is None:
        return "its converter takes original names"
    if end not in (CONVERTED_FLAT if flat else CONVERTED):
        return "its converter takes no such tensor"
    if len(shapes[module]) != 2:
        return "its converter takes matrices of attention, feed-forward and embedders only"
    if alone and module in names.image:
        return "its converter takes the matrices on embedded frames only together"
    return None


def _lacking(file: AdapterFile, names: Names) -> str | None:
    """The first matrix that a file of the first blocks lacks."""
    count = len({block for block, modules in names.blocks.items() if file.updates.keys() & set(modules)})
    wanted = [module for modules in list(names.blocks.values())[: max(count, 1)] for module in modules]
    return next((module for module in wanted if module not in file.updates), None)
