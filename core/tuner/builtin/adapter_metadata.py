"""What the metadata of an adapter file says of its scale, and what a file that is written says of itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from typing import Any

from torch import Tensor

from tuner import __version__
from tuner.builtin.adapter_file import AdapterFile, Update

DIFFUSERS = "lora_adapter_metadata"
"""JSON of PEFT's LoraConfig, its keys beginning with the component's name."""
FINETRAINERS = "lora_config"
"""The same without the component; diffusers does not read it."""
COMPONENT = "transformer."
DECLARED = ("tuner.alpha", "ss_network_alpha")
"""Where else a file may name its alpha; no program that loads it looks there."""
STALE = {DIFFUSERS, FINETRAINERS, "sshs_model_hash", "sshs_legacy_hash", "tuner.rank", "ss_network_dim", *DECLARED}
"""Entries that a new file says anew, or that are true of the old one only."""

Declared = Callable[[str, Mapping[str, Tensor]], float | None]


def alphas(metadata: Mapping[str, str]) -> Declared:
    """How alpha follows from the metadata for a module and its tensors: None where nothing is said.

    An rsLoRA (arXiv:2312.03732) is scaled by alpha / sqrt(r): its alpha is given as that over r.
    """
    config = peft_config(metadata)
    pattern = config.get("alpha_pattern") or {}

    def of(module: str, parts: Mapping[str, Tensor]) -> float | None:
        if "lora_down" not in parts or "lora_alpha" not in config:
            return None
        # PEFT's rule (get_pattern_key): the first pattern that matches the end of the name.
        match = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = float(config["lora_alpha"] if match is None else pattern[match])
        return alpha * sqrt(parts["lora_down"].shape[0]) if config.get("use_rslora") else alpha

    return of


def peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's LoraConfig as the metadata has it; empty where it has none that can be read."""
    try:
        if DIFFUSERS in metadata:
            packed = json.loads(metadata[DIFFUSERS])
            return {key.removeprefix(COMPONENT): value for key, value in packed.items() if key.startswith(COMPONENT)}
        found = json.loads(metadata.get(FINETRAINERS, "{}"))
    except (ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def notes(metadata: Mapping[str, str], updates: Mapping[str, Update], layout: str) -> list[str]:
    """What was assumed of alpha, where the file's own tensors do not say it."""
    silent = [update for update in updates.values() if update.alpha is None and update.rank is not None]
    if layout in ("diffusers", "peft"):
        if DIFFUSERS not in metadata and FINETRAINERS in metadata:
            return [
                f"alpha is from the metadata entry {FINETRAINERS!r}, which diffusers does not read: it takes the rank"
            ]
        return [f"no {DIFFUSERS!r} in the metadata: alpha is taken to be the rank, as diffusers does"] if silent else []
    said = {entry: metadata[entry] for entry in DECLARED if entry in metadata}
    if not silent or not said:
        return []
    shown = ", ".join(f"{entry} {value}" for entry, value in said.items())
    return [f"{len(silent)} modules have no alpha: it is taken to be the rank, as all readers do ({shown} is not read)"]


def written(file: AdapterFile, layout: str) -> dict[str, str]:
    """Metadata of a file in ``layout``: what the old one said and is still true, and what the new one is."""
    entries: dict[str, Any] = {key: value for key, value in file.metadata.items() if key not in STALE}
    ranks, scales = _most_common(file.updates.values())
    entries |= {"format": "pt", "tuner.format": layout, "tuner.version": __version__}
    entries["modelspec.implementation"] = "diffusers" if layout in ("diffusers", "lycoris") else "original"
    if ranks is not None and scales is not None:
        entries |= {"tuner.rank": ranks, "tuner.alpha": scales, "ss_network_dim": ranks, "ss_network_alpha": scales}
    if layout == "diffusers":
        config = {f"{COMPONENT}{name}": value for name, value in lora_config(file).items()}
        entries[DIFFUSERS] = json.dumps(config, indent=2, sort_keys=True)
    return {name: str(value) for name, value in entries.items()}


def lora_config(file: AdapterFile) -> dict[str, Any]:
    """PEFT's LoraConfig of a file of LoRA updates: what its defaults do not say."""
    rank, alpha = _most_common(file.updates.values())
    ranks = {module: update.rank for module, update in file.updates.items() if update.rank != rank}
    alphas = {module: _alpha(update) for module, update in file.updates.items() if _alpha(update) != alpha}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(module): value for module, value in ranks.items()},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items()},
        "target_modules": sorted(file.updates),
        "use_dora": any(update.dora_scale is not None for update in file.updates.values()),
        "lora_bias": bool(file.biases),
    }


def _most_common(updates: Iterable[Update]) -> tuple[int | None, float | int | None]:
    """The rank and the alpha of most updates that have one."""
    ranked = [update for update in updates if update.rank is not None]
    ranks, alphas = Counter(update.rank for update in ranked), Counter(map(_alpha, ranked))
    return (ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]) if ranked else (None, None)


def _alpha(update: Update) -> float | int:
    """Alpha as it counts; an integer where it is one, as people expect to read it."""
    found = update.rank or 0 if update.alpha is None else update.alpha
    return int(found) if float(found).is_integer() else float(found)
