"""``tuner inspect``: what an adapter file is, which model it fits, and who would not load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuner.builtin.adapter_file import AdapterFile, Update, load, recognise
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.readers import refused
from tuner.builtin.adapter_metadata import peft_config
from tuner.builtin.adapter_names import NAMES

LARGEST = 10
"""How many modules are listed with the norms of what is added."""


@dataclass(frozen=True)
class Inspection:
    """All that a file says of itself, and what was found by reading it."""

    path: Path
    size: int
    """bytes"""
    layout: str
    keys: int
    dtypes: tuple[str, ...]
    kinds: Mapping[str, int]
    """what people call a kind -> modules"""
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    fits: tuple[str, ...]
    """flavours, or the base, whose weights every key fits; empty where there are none"""
    nearest: tuple[str, ...]
    """those that most keys fit"""
    family: str
    base: str | None
    stage: str | None
    """which expert it is for, as far as it says"""
    unread: Mapping[str, str]
    """key -> why it does not fit the nearest model"""
    refused: Mapping[str, Mapping[str, str]]
    """program -> key -> why it would not load it"""
    norms: Mapping[str, tuple[float, float]]
    """module -> Frobenius norm of what is added, and that over the root of its elements; DoRA's are left out"""
    notes: tuple[str, ...]
    metadata: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        plain = {name: value for name, value in vars(self).items() if name not in ("path", "norms")}
        norms = {module: {"norm": norm, "rms": rms} for module, (norm, rms) in self.norms.items()}
        return {"path": str(self.path), **plain, "norms": norms}


def inspect(path: Path, model: Path | None = None) -> Inspection:
    """Look at the adapter file ``path``; ``model``: a base to hold it against, every known model when None.

    Raises CheckpointError for what is no adapter file.
    """
    tensors, metadata = load(path)
    layout = recognise(tensors, models.formats(), path)
    read = models.fits(tensors, metadata, models.targets(model), path)
    target, file = read[0]
    whole = [label for each, found in read if not found.unread for label in each.labels]
    config = peft_config(metadata)
    return Inspection(
        path=path,
        size=path.stat().st_size,
        layout=layout,
        keys=len(tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        kinds=Counter(_kind(update) for update in file.updates.values()) | _more(file),
        ranks=Counter(str(update.rank) for update in file.updates.values() if update.rank is not None),
        alphas=Counter(f"{_alpha(update):g}" for update in file.updates.values() if update.rank is not None),
        fits=tuple(whole),
        nearest=target.labels,
        family=target.spec.family,
        base=metadata.get("tuner.base_model")
        or metadata.get("ss_sd_model_name")
        or config.get("base_model_name_or_path"),
        stage=metadata.get("tuner.expert") or metadata.get("tuner.network"),
        unread=file.unread,
        refused=refused(tensors, file, target.spec, target.shapes),
        norms=_norms(file),
        notes=file.notes,
        metadata=metadata,
    )


def _kind(update: Update) -> str:
    return ("DoRA of " if update.dora_scale is not None else "") + NAMES[update.kind]


def _more(file: AdapterFile) -> Counter[str]:
    return Counter({"difference of a bias": len(file.biases)} if file.biases else {})


def _alpha(update: Update) -> float:
    return float(update.rank or 0) if update.alpha is None else update.alpha


def _norms(file: AdapterFile) -> dict[str, tuple[float, float]]:
    """Largest first."""
    found = {}
    for module, update in file.updates.items():
        if update.dora_scale is None:
            norm, elements = norm_of(update)
            found[module] = (norm, norm / elements**0.5)
    return dict(sorted(found.items(), key=lambda each: -each[1][0]))


def norm_of(update: Update) -> tuple[float, int]:
    """(Frobenius norm, elements) of what is added; a product of factors is not written out where it need not be."""
    found = {name: tensor.float() for name, tensor in update.tensors.items()}
    if update.kind == "lora" and "lora_mid" not in found:
        up, down = found["lora_up"].flatten(1), found["lora_down"].flatten(1)
        squared = torch.sum((up.mT @ up).double() * (down @ down.mT).double())
        return abs(update.scale) * float(squared.clamp_min(0).sqrt()), up.shape[0] * down.shape[1]
    made = update.product()
    return float(made.double().norm()), made.numel()
