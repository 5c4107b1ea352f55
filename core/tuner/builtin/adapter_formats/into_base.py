"""``tuner merge --into``: adapters into the weights of a base, in a new folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from tuner.builtin.adapter_file import AdapterFile, load
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.combine import Weighted, mixed, read_all
from tuner.builtin.adapter_formats.compress import Errors
from tuner.errors import CheckpointError, ConfigError, ModelError
from tuner.files import TEMPORARY, atomic_path, sync_file, sync_folder

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that an update can be added in."""


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    path: Path
    changed: int
    """tensors that differ from the base's"""
    network: str
    rounding: Errors = field(default_factory=dict)
    """by module: norm of what rounding to the base's dtype changed, and of the update"""
    notes: tuple[str, ...] = ()


def merge(
    sources: Sequence[Path],
    weights: Sequence[float] | None,
    base: Path,
    out: Path,
    *,
    network: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Merged:
    """Write a copy of ``base`` with ``sources`` added to the weights of one denoiser, each times its weight.

    The base is only read. Files are copied, and then only the changed tensors written, one in memory at a time.

    Arguments
        base: a folder in the diffusers layout, a denoiser's own folder, or a .safetensors file.
        network: which denoiser of two; the one that the files name when None.
    Raises ModelError for a quantised base, CheckpointError for files of another model, ConfigError for a wrong choice.
    """
    _check_places(base, out)
    chosen, weighted = _choose(sources, weights, base, network)
    _refuse_quantised(chosen, weighted)
    rounding: dict[str, tuple[float, float]] = {}
    with _new(out) as temporary:
        _copy(base, temporary)
        changed = 0
        for file in chosen.files:
            inside = temporary if base.is_file() else temporary / file.relative_to(base)
            changed += _patch(inside, chosen, file, weighted, rounding, progress)
            sync_file(inside)
    notes = (*dict.fromkeys(note for each, _ in weighted for note in each.notes), *mixed(sources, chosen.network))
    return Merged(out, changed, chosen.network, rounding, notes)


def _check_places(base: Path, out: Path) -> None:
    if not base.exists():
        raise ModelError("does not exist", where=base)
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists", where="-o", remedy="choose another name: a base is never overwritten")
    if out.resolve().is_relative_to(base.resolve()):
        raise ConfigError(f"{str(out)!r} is inside the base", where="-o", remedy="choose a folder elsewhere")
    if base.is_file() != (out.suffix == ".safetensors"):
        kind = "file" if base.is_file() else "folder"
        raise ConfigError(f"the base is a {kind}, and {str(out)!r} would not be one", where="-o")
    needed = sum(path.stat().st_size for path in ([base] if base.is_file() else base.rglob("*")) if path.is_file())
    place = next(path for path in out.resolve().parents if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise ConfigError(
            f"the copy needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=place,
            remedy="choose another disk",
        )


def _choose(
    sources: Sequence[Path], weights: Sequence[float] | None, base: Path, network: str | None
) -> tuple[models.Base, Weighted]:
    """The denoiser that the files are for, and the files as it reads them."""
    found = {each.network: each for each in models.bases(base)}
    if network is not None and network not in found:
        raise ConfigError(f"the base has no denoiser {network!r}", where="--network", allowed=found)
    targets = [models.Target(each.spec, name, each.shapes, (f"{base}/{name}",)) for name, each in found.items()]
    named = {said for path in sources if (said := load(path)[1].get("tuner.network"))}
    if network is None and len(found) > 1:
        if len(named) != 1 or not named <= found.keys():
            raise ConfigError(
                f"the base has {len(found)} denoisers, and the files do not say which one they are for",
                allowed=found,
                remedy="say it with --network",
            )
        network = named.pop()
    chosen = [each for each in targets if network in (None, each.network)]
    target, weighted = read_all(sources, weights, chosen)
    return found[target.network], weighted


def _refuse_quantised(base: models.Base, weighted: Weighted) -> None:
    """Raise ModelError where a weight that is to change is not stored as it is: the sum would be silently lost."""
    reason = "its config.json has a quantization_config" if base.config.get("quantization_config") else None
    wanted = {f"{module}.weight" for file, _ in weighted for module in file.updates}
    wanted |= {f"{module}.bias" for file, _ in weighted for module in file.biases}
    for name in sorted(wanted) if reason is None else ():
        if name not in base.tensors:
            raise CheckpointError(f"the base has no {name}", where=base.files[0])
        path, key, _ = base.tensors[name]
        dtype = read_header(path)[0][key]["dtype"]
        if dtype not in FLOATS:
            reason = f"{key} is {dtype}"
            break
    if reason is not None:
        raise ModelError(
            f"the base is quantised: {reason}",
            where=base.files[0],
            allowed=f"weights of {', '.join(FLOATS)}",
            remedy="merge into the weights that it was made of, and quantise again",
        )


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A temporary place that becomes ``out`` at the end, or goes away."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        with atomic_path(out) as temporary:
            yield temporary
        return
    temporary = out.with_name(f"{TEMPORARY}{os.getpid()}-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.rename(out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _copy(base: Path, to: Path) -> None:
    """Files as they are; links of a hub's cache become files, since the base may go away."""
    if base.is_dir():
        shutil.copytree(base, to, ignore=shutil.ignore_patterns(f"{TEMPORARY}*", ".cache", ".git"))
    else:
        shutil.copyfile(base, to)


def _patch(
    copy: Path,
    base: models.Base,
    original: Path,
    weighted: Weighted,
    rounding: dict[str, tuple[float, float]],
    progress: Callable[[], None],
) -> int:
    """Write the changed tensors over those of a copied file; how many there were."""
    header, start = read_header(copy)
    changed = 0
    copy.chmod(copy.stat().st_mode | 0o200)
    with safe_open(original, framework="pt") as source, copy.open("r+b") as target:
        for name, (path, key, _) in base.tensors.items():
            module, _, leaf = name.rpartition(".")
            if path != original or not _touches(module, leaf, weighted):
                continue
            progress()
            before = source.get_tensor(key)
            added = _added(module, leaf, before, weighted)
            after = (before.float() + added).to(FLOATS[header[key]["dtype"]])
            if not after.isfinite().all():
                raise CheckpointError(f"{key} is not finite with the update added", where=original)
            _overwrite(target, start + header[key]["data_offsets"][0], after)
            rounding[name] = (float((after.float() - before.float() - added).norm()), float(added.norm()))
            changed += 1
    return changed


def _touches(module: str, leaf: str, weighted: Weighted) -> bool:
    held = [{"weight": file.updates, "bias": file.biases}.get(leaf, {}) for file, _ in weighted]
    return any(module in each for each in held)


def _added(module: str, leaf: str, before: Tensor, weighted: Weighted) -> Tensor:
    """The weighted sum of what the files add to one tensor, float32."""
    total = torch.zeros(before.shape)
    for file, weight in weighted:
        total += weight * _term(file, module, leaf, before)
    return total


def _term(file: AdapterFile, module: str, leaf: str, before: Tensor) -> Tensor | float:
    if leaf == "bias":
        return file.biases[module].float() if module in file.biases else 0.0
    if module not in file.updates:
        return 0.0
    return file.updates[module].delta(before.shape, base=before)


def _overwrite(file: IO[bytes], offset: int, tensor: Tensor) -> None:
    file.seek(offset)
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def read_header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin (github.com/huggingface/safetensors, Format)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size
