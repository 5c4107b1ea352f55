"""Whether weights on disk are those of the model that was described, from the headers of their files alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from tuner.errors import ModelError
from tuner_wan.flavours import FLAVOURS, Flavour
from tuner_wan.names import diffusers_name, is_original
from tuner_wan.sources import broken

SHOWN = 5
"""How many tensors an error names."""
Shape = tuple[int, ...]


def check_weights(module: nn.Module, files: Sequence[Path], *, ignored: Iterable[str] = ()) -> None:
    """Hold the tensors in ``files`` against the parameters of ``module``, which needs no storage.

    Raises ModelError that names the first tensors that are missing, strange or of another shape, and the
    flavour that the files look like; also for files that are no safetensors files.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()}
    held = {
        name: shape
        for name, shape in shapes(files).items()
        if name not in buffers and not any(re.search(pattern, name) for pattern in ignored)
    }
    differing = [
        *(f"{name} is missing" for name in expected if name not in held),
        *(f"{name} is unknown" for name in held if name not in expected),
        *(
            f"{name} is {held[name]} and should be {shape}"
            for name, shape in expected.items()
            if name in held and held[name] != shape
        ),
    ]
    if not differing:
        return
    alike = looks_like(held)
    seen = f"; they look like {alike.name!r}" if alike else ""
    raise ModelError(
        f"the denoiser's weights do not fit its config: {len(differing)} tensors differ{seen}",
        where=f"{files[0]}: {'; '.join(differing[:SHOWN])}{' …' if len(differing) > SHOWN else ''}",
        remedy=f"set model_flavour to {alike.name!r} and use its config.json, or use other weights"
        if alike
        else "the files are incomplete or another model's: fetch them again, or check the base model's paths",
    )


def shapes(files: Sequence[Path]) -> dict[str, Shape]:
    """The shape of every tensor in ``files`` by its name in diffusers; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Shape] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                translate = diffusers_name if any(map(is_original, names)) else str
                found |= {translate(name): tuple(file.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise broken(path.name, error, path) from error
    return found


def looks_like(held: Mapping[str, Shape]) -> Flavour | None:
    """The flavour whose denoiser has these shapes; None when none has."""
    patches = held.get("patch_embedding.weight", ())
    if len(patches) < 2:
        return None
    blocks = len({name.split(".")[1] for name in held if name.startswith("blocks.")})
    image = any(".add_k_proj." in name for name in held)
    last = any(name.endswith("image_embedder.pos_embed") for name in held)
    return next(
        (
            flavour
            for flavour in FLAVOURS.values()
            if (flavour.dim, flavour.in_channels, flavour.blocks) == (patches[0], patches[1], blocks)
            and flavour.image_context == image
            and (flavour.condition == "first_and_last_frame") == last
        ),
        None,
    )
