"""Which model an adapter file is for: a base on disk, or the models that the families know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.builtin.adapter_file import AdapterFile, AdapterFormat, Shapes, recognise, refuse_unread
from tuner.config.keys import CoreConfig
from tuner.errors import CheckpointError, ModelError
from tuner.manager import Manager, hooks_of
from tuner.run import Run
from tuner.selection import Catalog
from tuner.spec import ModelSpec

WEIGHT = ".weight"


@dataclass(frozen=True)
class Target:
    """One denoiser that a file may be for."""

    spec: ModelSpec
    network: str
    shapes: Shapes
    labels: tuple[str, ...]
    """What it is called: flavours with these very weights, or the path of a base."""


@dataclass(frozen=True)
class Base:
    """The weights of one denoiser on disk."""

    network: str
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, str, tuple[int, ...]]]
    """Name in our network -> file, name there, shape."""
    spec: ModelSpec

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of weights by module."""
        return {name.removesuffix(WEIGHT): found[2] for name, found in self.tensors.items() if name.endswith(WEIGHT)}


@cache
def _manager() -> tuple[Manager, Run]:
    """The installed plugins that know models or formats, and a run without a config."""
    catalog, manager = Catalog(), Manager()
    for name in catalog.installed:
        cls = catalog.peek(name)
        if cls is not None and {"known_models", "adapter_formats"} & set(hooks_of(cls)):
            manager.add(name, cls(name, cls.Config()))
    return manager, Run(CoreConfig(), plugins={})


def formats() -> dict[str, AdapterFormat]:
    """Every installed format of adapter files by name."""
    manager, run = _manager()
    return manager.registry("adapter_formats", run)


@cache
def known() -> tuple[ModelSpec, ...]:
    """Every model that an installed family knows by name."""
    manager, run = _manager()
    return tuple(spec for _, specs in manager.collect("known_models", run=run) for spec in specs)


def known_targets() -> list[Target]:
    """Their denoisers, those of equal weights as one."""
    found: dict[Any, list[tuple[ModelSpec, str, Shapes]]] = {}
    for spec in known():
        for network in spec.networks:
            alike = (spec.family, tuple(sorted(network.weights.items())))
            found.setdefault(alike, []).append((spec, network.name, network.weights))
    return [Target(*group[0], tuple(dict.fromkeys(spec.flavour for spec, _, _ in group))) for group in found.values()]


def fits(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], targets: Iterable[Target], where: Path
) -> list[tuple[Target, AdapterFile]]:
    """The file as each target would read it, the best first. Raises CheckpointError for a file of no known format."""
    every = formats()
    form = every[recognise(tensors, every, where)]
    read = [(each, form.read(tensors, metadata, each.spec, each.shapes)) for each in targets]
    named = metadata.get("tuner.flavour")
    return sorted(read, key=lambda pair: (len(pair[1].unread), named not in pair[0].labels))


def fitting(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], targets: Sequence[Target], where: Path
) -> tuple[Target, AdapterFile]:
    """The target that the file is for, and what it says. Raises CheckpointError with the first keys that differ."""
    target, file = fits(tensors, metadata, targets, where)[0]
    try:
        refuse_unread(file, len(tensors), where)
    except CheckpointError as error:
        error.add_note(f"held against {', '.join(target.labels)}, which is nearest; name another base with --model")
        raise
    return target, file


def targets(model: Path | None) -> list[Target]:
    """The denoisers of the base ``model``, or every known one. Raises ModelError for a folder without weights."""
    if model is None:
        return known_targets()
    return [Target(base.spec, base.network, base.shapes, (str(model),)) for base in bases(model)]


def bases(path: Path) -> list[Base]:
    """The denoisers in a folder of the diffusers layout, in a denoiser's own folder, or in a single file.

    Raises ModelError where there is none that a family knows.
    """
    names = dict.fromkeys(network.name for spec in known() for network in spec.networks)
    folders = {name: path / name for name in names if (path / name).is_dir()} or {"": path}
    found = [base for name, place in folders.items() if (base := _base(name, place)) is not None]
    if not found:
        raise ModelError(
            "holds no denoiser of a known family",
            where=path,
            allowed="a folder in the diffusers layout, a denoiser's own folder, or a .safetensors file",
        )
    return found


def _base(network: str, place: Path) -> Base | None:
    files = [place] if place.is_file() else _weight_files(place)
    held = {key: (file, key, shape) for file in files for key, shape in headers(file).items()}
    best = max(known(), key=lambda spec: _overlap(spec, held), default=None)
    if best is None or not _overlap(best, held):
        return None
    ours = _our_names(best)
    tensors = {ours.get(_stem(key), _stem(key)) + _leaf(key): found for key, found in held.items()}
    config = place / "config.json"
    described = _json(config) if place.is_dir() and config.is_file() else {}
    return Base(network or best.networks[0].name, tuple(files), described, tensors, best)


def _weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights: those of the index, or the file without a variant in its name, or the only one.

    Raises ModelError where there are several sets.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"), key=lambda path: len(path.name))
    if indices:
        return [folder / name for name in sorted(set(_json(indices[0]).get("weight_map", {}).values()))]
    found = sorted(folder.glob("*.safetensors"), key=lambda path: len(path.name))
    plain = [path for path in found if path.name.count(".") == 1]
    if len(found) > 1 and len(plain) != 1:
        raise ModelError(f"{len(found)} sets of weights", where=folder, remedy="name one of the files instead")
    return plain or found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"is no JSON: {error}", where=path) from error
    return found if isinstance(found, dict) else {}


def headers(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name; none is read. Raises ModelError."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read: {error}", where=file, allowed="a whole .safetensors file") from error


PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What some files put before every name."""


def _stem(key: str) -> str:
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return key.rpartition(".")[0]


def _leaf(key: str) -> str:
    return "." + key.rpartition(".")[2]


def _our_names(spec: ModelSpec) -> dict[str, str]:
    """Original names of modules to ours, as far as they differ from every name of ours, of any size of the model."""
    same = [network for each in known() if each.family == spec.family for network in each.networks]
    modules = {module for network in same for module in network.weights}
    return {spec.original_name(module): module for module in modules if spec.original_name(module) not in modules}


def _overlap(spec: ModelSpec, held: Mapping[str, Any]) -> int:
    names = {_stem(key) for key in held}
    ours = {module for network in spec.networks for module in network.weights}
    return max(len(names & ours), len(names & {spec.original_name(module) for module in ours}))
