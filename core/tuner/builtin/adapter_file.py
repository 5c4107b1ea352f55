"""Adapter files, whatever program wrote them: what each module's weight is changed by, and by how much.

A format (hook ``adapter_formats``) turns the keys of a file into this and back. Modules have the names that they have
in our networks; tensors have the names of the LyCORIS library, without ``.weight``: ``lora_down`` (r, in, *kernel),
``lora_up`` (out, r), ``lora_mid``, ``hada_w1_a`` (out, r), ``hada_w1_b`` (r, in) …, ``lokr_w1`` …, or ``diff`` for a
whole difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner.errors import CheckpointError
from tuner.files import atomic_path
from tuner.spec import ModelSpec

RANKED = ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""The tensors whose first axis is the rank, in the order in which readers look for it."""
SHOWN = 3
"""How many keys an error names."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of weights by module name."""


@dataclass(frozen=True)
class Update:
    """What is added to the weight of one module."""

    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    """Over the rank it is the scale; None is the rank, as readers take it."""
    dora_scale: Tensor | None = None
    """DoRA's norms of the trained weight's rows, (out, 1, …), or of its columns, (1, in, …)."""

    @property
    def kind(self) -> str:
        """``lora``, ``hada`` (LoHa), ``lokr`` or ``diff``."""
        return next(iter(self.tensors)).partition("_")[0]

    @property
    def rank(self) -> int | None:
        """None where nothing is of low rank: then alpha scales nothing."""
        return next((self.tensors[name].shape[0] for name in RANKED if name in self.tensors), None)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def delta(self, shape: Iterable[int], base: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The difference of the weight, of ``shape``, computed in ``dtype``.

        ``base``: the weight itself, which DoRA's difference depends on (arXiv:2402.09353, eq. 5). Raises
        CheckpointError where it is needed and absent, RuntimeError where the factors do not make that shape.
        """
        added = self.product(dtype).reshape(*shape)
        if self.dora_scale is None:
            return added
        if base is None:
            raise CheckpointError("this is a DoRA: what it adds depends on the weights of the base model")
        merged = base.to(dtype) + added
        axes = tuple(range(1, merged.ndim)) if self.by_rows else (0, *range(2, merged.ndim))
        norms = torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
        decomposed: Tensor = merged * (self.dora_scale.to(dtype).reshape(norms.shape) / norms)
        return decomposed - base.to(dtype)

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the factors make, scaled: a matrix (out, the rest), or a difference in its own shape."""
        found = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return _PRODUCTS[self.kind](found) * self.scale

    @property
    def by_rows(self) -> bool:
        """Whether DoRA's scale, where there is one, is of the weight's rows (PEFT's and LyCORIS' default)."""
        return self.dora_scale is not None and self.dora_scale.shape[0] != 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensors make an update of a weight of ``shape``; nothing is computed."""
        found = {name: tensor.to("meta", torch.float32) for name, tensor in self.tensors.items()}
        try:
            made = _PRODUCTS[self.kind](found)
        except (RuntimeError, KeyError, IndexError):
            return False
        whole = made.shape[:1] == torch.Size(shape[:1]) and made.numel() == prod(shape)
        rows_or_columns = (shape[0], prod(shape[1:]))
        return whole and (self.dora_scale is None or self.dora_scale.numel() in rows_or_columns)


def low_rank(down: Tensor, up: Tensor, alpha: float | None = None, dora_scale: Tensor | None = None) -> Update:
    """A LoRA: ``down`` (r, in, *kernel), ``up`` (out, r), scaled by ``alpha`` / r."""
    return Update({"lora_down": down, "lora_up": up}, alpha, dora_scale)


def _factor(found: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """A factor (rows, columns): whole, of two matrices, or of two and a core with a convolution's kernel."""
    if name in found:
        return found[name].flatten(1)
    left, right = found[f"{name}_a"], found[f"{name}_b"]
    return torch.einsum("rs...,ro,si->oi...", found[core], left, right).flatten(1) if core in found else left @ right


def _low_rank(found: Mapping[str, Tensor]) -> Tensor:
    up, down = found["lora_up"].flatten(1), found["lora_down"].flatten(1)
    if "lora_mid" in found:
        return torch.einsum("or,rs...,si->oi...", up, found["lora_mid"], down).flatten(1)
    return up @ down


_PRODUCTS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "lora": _low_rank,
    "hada": lambda found: _factor(found, "hada_w1", "hada_t1") * _factor(found, "hada_w2", "hada_t2"),
    "lokr": lambda found: torch.kron(_factor(found, "lokr_w1"), _factor(found, "lokr_w2", "lokr_t2")),
    "diff": lambda found: found["diff"],
}


@dataclass(frozen=True)
class AdapterFile:
    """What a file says of one network."""

    updates: Mapping[str, Update]
    """by module"""
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    """differences of biases (out,), by module"""
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """what was assumed in reading, for people"""
    unread: Mapping[str, str] = field(default_factory=dict)
    """key -> why it means nothing here"""


class AdapterFormat(Protocol):
    """How programs name the tensors of an adapter."""

    def claims(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this format."""

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: ModelSpec, shapes: Shapes
    ) -> AdapterFile:
        """What a file says; ``shapes`` of weights by module of our network. Keys of no meaning are ``unread``."""

    def write(self, file: AdapterFile, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata. Raises CheckpointError for what the format cannot hold."""


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata of a safetensors file. Raises CheckpointError when it is none."""
    if path.is_dir():
        there = sorted(each.relative_to(path).as_posix() for each in path.rglob("*.safetensors"))
        raise CheckpointError(
            "this is a folder, and a file is wanted",
            where=path,
            allowed=", ".join(there[:SHOWN]) or "a .safetensors file; there is none in it",
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=path, allowed="a whole .safetensors file") from error


def recognise(tensors: Mapping[str, Tensor], formats: Mapping[str, AdapterFormat], where: object) -> str:
    """The name of the last format that claims these keys. Raises CheckpointError when none does."""
    found = next((name for name, each in reversed(list(formats.items())) if each.claims(tensors)), None)
    if found is None:
        first = ", ".join(list(tensors)[:SHOWN])
        raise CheckpointError(
            f"no known format of adapters has such keys: {first}", where=where, allowed=", ".join(formats)
        )
    return found


def read(path: Path, spec: ModelSpec, shapes: Shapes, formats: Mapping[str, AdapterFormat]) -> AdapterFile:
    """An adapter file for a network.

    Arguments
        spec: whose table of names is used.
        shapes: shapes of the network's weights by module name.
        formats: by name, as the hook ``adapter_formats`` gives them.

    Raises CheckpointError for a file that cannot be read, is of no known format, or is another model's.
    """
    tensors, metadata = load(path)
    found = formats[recognise(tensors, formats, path)].read(tensors, metadata, spec, shapes)
    refuse_unread(found, len(tensors), path)
    return found


def refuse_unread(file: AdapterFile, keys: int, where: object) -> None:
    """Raise CheckpointError where some of the file's ``keys`` mean nothing for the model it was read for."""
    if file.unread:
        first = "; ".join(f"{key}: {why}" for key, why in list(file.unread.items())[:SHOWN])
        raise CheckpointError(
            f"{len(file.unread)} of {keys} keys do not fit the model: {first}",
            where=where,
            remedy="`tuner inspect` says which model it is for",
        )


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Write a file at once or not at all; equal tensors and metadata give equal bytes."""
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
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
