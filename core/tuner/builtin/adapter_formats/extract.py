"""``tuner extract``: a LoRA of the difference between a base and a fine-tune of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tuner.builtin.adapter_file import AdapterFile, Update
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.compress import Errors, as_low_rank
from tuner.builtin.adapter_formats.convert import check_format, check_out, write
from tuner.errors import CheckpointError, ConfigError, ModelError
from tuner.spec import ModelSpec


@dataclass(frozen=True)
class Extracted:
    """What an extraction found."""

    path: Path
    modules: int
    errors: Errors
    """by module: norm of what the LoRA lacks, and of the difference"""
    left_out: Errors = field(default_factory=dict)
    """by tensor: norms of differences of biases, norms and tables, which a LoRA cannot hold: all of it is lost"""


def extract(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    rank: int,
    to: str = "comfyui",
    network: str | None = None,
    force: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Extracted:
    """Write the LoRA of ``rank`` that is nearest to ``tuned`` - ``base``, matrix by matrix.

    Arguments
        base, tuned: folders in the diffusers layout, denoisers' own folders, or .safetensors files.
        network: which denoiser of two.
    Raises ModelError where they are not one model, or quantised; CheckpointError where nothing differs.
    """
    if rank < 1:
        raise ConfigError(f"--rank is {rank}", allowed="1 or more")
    check_format(to)
    check_out(out, force, base, tuned)
    before, after = _denoiser(base, network), _denoiser(tuned, network)
    _check_alike(before, after, base, tuned)
    updates: dict[str, Update] = {}
    errors: dict[str, tuple[float, float]] = {}
    left_out: dict[str, tuple[float, float]] = {}
    for name, difference in _differences(before, after):
        progress()
        size = float(difference.norm())
        module, _, leaf = name.rpartition(".")
        if not size:
            continue
        if leaf == "weight" and difference.ndim > 1:
            updates[module], errors[module] = as_low_rank(difference, rank)
        else:
            left_out[name] = (size, size)
    if not updates:
        raise CheckpointError("no matrix differs from the base's", where=tuned)
    target = models.Target(before.spec, before.network, before.shapes, (str(base),))
    metadata = _metadata(before, base)
    done = write(AdapterFile(updates, metadata=metadata), target, to, out)
    return Extracted(done.path, len(updates), errors, left_out)


def count(base: Path, network: str | None) -> int:
    """How many tensors there are to look at."""
    return len(_denoiser(base, network).tensors)


def _denoiser(path: Path, network: str | None) -> models.Base:
    if not path.exists():
        raise ModelError("does not exist", where=path)
    found = {each.network: each for each in models.bases(path)}
    if network is not None and network in found:
        return found[network]
    # A denoiser's own folder or file is what it was named for.
    if len(found) > 1 or (network is not None and (path / next(iter(found))).is_dir()):
        raise ConfigError("which denoiser is meant?", where=path, allowed=found, remedy="say it with --network")
    return next(iter(found.values()))


def _check_alike(before: models.Base, after: models.Base, base: Path, tuned: Path) -> None:
    mine, others = ({name: found[2] for name, found in each.tensors.items()} for each in (before, after))
    differing = sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
    if differing:
        shown = ", ".join(f"{name} ({mine.get(name)} and {others.get(name)})" for name in differing[:3])
        raise ModelError(f"{len(differing)} tensors are not alike: {shown}", where=f"{base} and {tuned}")


def _differences(before: models.Base, after: models.Base) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 difference) of every tensor, one in memory at a time."""
    opened = {path: safe_open(path, framework="pt") for each in (before, after) for path in each.files}
    for name, (path, key, _) in before.tensors.items():
        other, its_key, _ = after.tensors[name]
        first, second = opened[path].get_tensor(key), opened[other].get_tensor(its_key)
        for tensor, place in ((first, path), (second, other)):
            if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                raise ModelError(f"{name} is {tensor.dtype}: quantised weights have no difference", where=place)
        yield name, second.float() - first.float()


def _metadata(base: models.Base, path: Path) -> dict[str, str]:
    """What can be known of the model: its family, its flavour where one alone has such weights, and the base's name."""
    spec: ModelSpec = base.spec
    alike = [each for each in models.known_targets() if dict(each.shapes) == base.shapes]
    found = {"tuner.family": spec.family, "tuner.base_model": path.resolve().name, "tuner.network": base.network}
    if len(alike) == 1 and len(alike[0].labels) == 1:
        found["tuner.flavour"] = alike[0].labels[0]
    return found | {"tuner.extracted": "true", "ss_network_module": "networks.lora"}
