"""What several tools have in common: sizes, offload, model files, optimizers and prompts in our terms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from tuner.cli.importing.draft import Draft

BLOCKS = {"1.3b": 30, "5b": 30, "14b": 40}
"""Blocks of the denoiser by the size in a flavour's name."""
BOUNDARY = {"t2v": 0.875, "i2v": 0.9}
"""Noise level at which the experts of Wan 2.2 14B change places."""
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "bnb-adamw8bit",
    "pagedadamw": "bnb-adamw-paged",
    "pagedadamw8bit": "bnb-adamw8bit-paged",
    "adam": "torch-adam",
    "adam8bit": "bnb-adam8bit",
    "adafactor": "adafactor",
    "lion": "optimi-lion",
    "lion8bit": "bnb-lion8bit",
    "prodigy": "prodigy",
    "sgd": "sgd",
    "adamw_optimi": "optimi-adamw",
    "stableadamw": "optimi-stableadamw",
    "muon": "muon",
    "adamwschedulefree": "adamw_schedulefree",
}
SCHEDULERS = {
    name: name
    for name in ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
}
PICKLE = "a pickle is never read; the file of the model's own repository is used"
LINES = "each line of a caption file is an alternative here; there the whole file is one caption"


def square(resolution: Any) -> float:
    """The edge of a square with the area of ``[width, height]``, or of a number that is one already, in pixels."""
    if isinstance(resolution, (int, float)):
        return float(resolution) if not float(resolution).is_integer() else int(resolution)
    width, height = (resolution[0], resolution[-1])
    edge = round(math.sqrt(width * height), 2)
    return int(edge) if edge.is_integer() else edge


def repeats(times: Any) -> int:
    """Their count of passes, where 1 is once, as extra passes. Raises ValueError."""
    return max(0, round(float(times)) - 1)


def offload(draft: Draft, theirs: str, swapped: Any) -> None:
    """Blocks kept on the host as group offload, the others resident. Needs the flavour in ``draft``."""
    flavour = str(draft.settings.get("model_flavour", ""))
    blocks = next((count for size, count in BLOCKS.items() if f"-{size}" in flavour), None)
    resident = {} if blocks is None else {"group_offload_resident_blocks": max(0, blocks - int(swapped))}
    draft.put(
        theirs,
        swapped,
        "blocks on the host there, blocks that stay on the device here; two groups more are there while they compute",
        enable_group_offload=True,
        group_offload_use_stream=True,
        **resident,
    )


def model_file(draft: Draft, theirs: str, path: Any, ours: str) -> None:
    """A weight file or folder; pickles are not read."""
    if PurePath(str(path)).suffix in (".pth", ".pt", ".ckpt", ".bin"):
        draft.none(theirs, path, PICKLE)
    else:
        draft.put(
            theirs, path, "the config of a single file is that of the model's own repository", **{ours: str(path)}
        )


def expert(draft: Draft, theirs: str, kind: str, low: float, high: float) -> str:
    """``high`` or ``low``, by a range of noise levels (0 to 1); a row where the range is another than ours."""
    boundary = BOUNDARY[kind]
    which = "high" if (low + high) / 2 >= boundary else "low"
    exact = (boundary, 1.0) if which == "high" else (0.0, boundary)
    close = all(abs(one - two) < 0.0105 for one, two in zip((low, high), exact, strict=True))
    why = "" if close else f"; there the range is {low:g} to {high:g}, which has no counterpart"
    draft.put(
        theirs,
        f"{low:g} to {high:g}",
        f"the {which}-noise expert is trained on its own range, {exact[0]:g} to {exact[1]:g}{why}",
        model_flavour=f"{kind}-14b-2.2-{which}",
    )
    return which


def levels(draft: Draft, theirs: str, low: Any, high: Any) -> None:
    """A range of noise levels for a model with one denoiser."""
    if (low, high) != (0, 1):
        draft.none(
            theirs, f"{low:g} to {high:g}", "all levels are trained; flow_custom_timesteps lists single timesteps"
        )


def common(draft: Draft, ours: str, values: Sequence[Any], theirs: str, why: str) -> None:
    """One setting here for what each dataset or prompt has there: the first, and a row where they differ."""
    if not values:
        return
    draft.settings[ours] = values[0]
    if any(value != values[0] for value in values):
        draft.none(theirs, values, f"{why}: {values[0]!r} is used for all")


def lycoris(draft: Draft, theirs: str, value: Any, config: Mapping[str, Any]) -> None:
    """A LyCORIS adapter; what was set for a plain LoRA moves into its config, or is said to be left out."""
    into: dict[str, Any] = {}
    for key, name in (("lora_rank", "linear_dim"), ("lora_alpha", "linear_alpha"), ("lora_dropout", "dropout")):
        if (found := draft.move(key, "lycoris_config", f"`{name}` in it")) is not None:
            into[name] = found
    for key in ("init_lora", "lora_dtype", "lora_target_modules", "lora_exclude_modules"):
        draft.move(key, "", "of plain LoRA alone: a LyCORIS adapter has its own config")
    draft.put(theirs, value, "", lora_type="lycoris", lycoris_config={**into, **config})


def optimizer(draft: Draft, theirs: str) -> None:
    """Leave out options of an optimizer that has no counterpart, or other options than ours."""
    options = draft.settings.get("optimizer_config")
    if not options:
        return
    name = draft.settings.get("optimizer")
    if name is None:
        draft.move("optimizer_config", "", "options of an optimizer that has no counterpart")
    elif name == "adafactor":
        kept = {key: value for key, value in options.items() if key == "weight_decay"}
        for key in options.keys() - kept.keys():
            draft.none(f"{theirs}: {key}", options[key], "torch's Adafactor has no such option, or another one")
        draft.settings["optimizer_config"] = kept


def mask(draft: Draft, entry: dict[str, Any], folder: Any) -> dict[str, Any]:
    """The conditioning entry for a folder of masks, named in ``entry``."""
    entry["conditioning_data"] = f"{entry['id']}-masks"
    return {
        "id": entry["conditioning_data"],
        "dataset_type": "conditioning",
        "conditioning_type": "mask",
        "instance_data_dir": str(folder),
    }


def text_embeds() -> dict[str, Any]:
    """The entry for encoded captions that every list has."""
    return {"id": "text-embeds", "dataset_type": "text_embeds", "default": True}


def identity(path: Any, taken: Sequence[Mapping[str, Any]], behind: str = "") -> str:
    """An id for a dataset after its folder, unique in the list."""
    stem = re.sub(r"[^\w-]+", "-", PurePath(str(path)).stem or "data").strip("-") or "data"
    name, number = stem + behind, 1
    while name in {entry["id"] for entry in taken}:
        number += 1
        name = f"{stem}-{number}{behind}"
    return name


def cleared(settings: dict[str, Any]) -> None:
    """Take out what is None: there it means 'not set'."""
    for key in [key for key, value in settings.items() if value is None]:
        del settings[key]
