"""One block of Wan with LoRA, checkpointed, counted: elementwise traffic, bytes held, operations.

Tensors are torch's fakes: real dimensions, no memory. A custom Triton operation counts by what goes in and comes out,
so the path with kernels is counted with an opaque operation in the place of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from rows.row import Row
from tuner.builtin.lora.adapter import leave_casts_to_autocast
from tuner.testing.peak import StepBytes, fakes, kernels_of_cuda, without_storage
from tuner.testing.traffic import Traffic
from tuner_chunked_ff.chunk import install as install_chunks
from tuner_kernels import block as fused
from tuner_kernels import eager, functions, linears
from tuner_wan import lean

RANK, TEXT = 16, 512
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
CHUNKS = 8


@dataclass(frozen=True)
class Size:
    """Dimensions of a block and of what it works on."""

    name: str
    dim: int
    heads: int
    ffn: int
    tokens: int


SIZES = (Size("1.3B", 1536, 12, 8960, 18_900), Size("14B", 5120, 40, 13_824, 18_900))
TINY = Size("tiny", 64, 4, 128, 512)


def nothing(made: Any, size: Size) -> None:
    """diffusers and PEFT as they are."""


def ours(made: Any, size: Size) -> None:
    """What every run of ours does to a block."""
    leave_casts_to_autocast(made)


def small(made: Any, size: Size) -> None:
    """``wan_lean_blocks``."""
    ours(made, size)
    lean.install(made)


def few(made: Any, size: Size) -> None:
    """``fused_blocks``."""
    ours(made, size)
    fused.install(made)


def chunked(made: Any, size: Size) -> None:
    """``fused_blocks`` and a feed-forward in chunks."""
    few(made, size)
    install_chunks(made.ffn, -(-size.tokens // CHUNKS))


@dataclass(frozen=True)
class Way:
    """One way to compute a block."""

    name: str
    prepare: Callable[[Any, Size], None]
    kernels: bool = False
    lora: torch.dtype = torch.float32
    moved: float | None = None
    held: float | None = None
    operations: float | None = None
    """goals"""


BF16 = torch.bfloat16
DIFFUSERS = Way("diffusers + PEFT", nothing)
KERNELS = Way("ours, fused_blocks, kernels", few, kernels=True, moved=150, held=16, operations=250)
WAYS = (
    DIFFUSERS,
    Way("ours", ours),
    Way("ours, wan_lean_blocks", small),
    Way("ours, fused_blocks in plain torch", few, moved=360),
    KERNELS,
    Way("ours, fused_blocks, kernels, lora_dtype bf16", few, kernels=True, lora=BF16, operations=250),
    Way("ours, fused_blocks, kernels, chunked feed-forward", chunked, kernels=True, held=16),
)


def build(size: Size, way: Way) -> Any:
    """A frozen bfloat16 block with a LoRA that is trained, on the meta device."""
    with torch.device("meta"):
        made = WanTransformerBlock(size.dim, size.ffn, size.heads, "rms_norm_across_heads", True, 1e-6, None)
    made.to(torch.bfloat16).requires_grad_(False)
    for norm in (made.norm1, made.norm2, made.norm3):
        norm.float()
    made.scale_shift_table.data = made.scale_shift_table.data.float()
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
    inject_adapter_in_model(lora, made, low_cpu_mem_usage=True)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(way.lora)
            parameter.requires_grad_(True)
    way.prepare(made, size)
    return made.train()


def constants(size: Size) -> tuple[Any, ...]:
    """Text, modulation and rotary tables: shared by all blocks."""
    turns = torch.empty(1, size.tokens, 1, size.dim // size.heads)
    text = torch.empty(1, TEXT, size.dim, dtype=torch.bfloat16)
    return text, torch.empty(1, 6, size.dim), (turns, turns.clone())


def step(made: Any, size: Size, given: tuple[Any, ...]) -> None:
    """Forward, recompute and backward of the checkpointed block."""
    tokens = torch.empty(1, size.tokens, size.dim, dtype=torch.bfloat16).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        result = checkpoint(made, tokens, *given, use_reentrant=False)
    end = _End.apply(result)
    del result  # in a network it is the next block's input, which is gone when that block's backward is done
    end.backward()


class _End(torch.autograd.Function):
    """What comes after the block: its backward makes the gradient of the block's result."""

    @staticmethod
    def forward(ctx: Any, result: Tensor) -> Tensor:
        ctx.like = result.shape, result.dtype
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


def traffic(size: Size, way: Way) -> Traffic:
    """Operations and elementwise bytes of a step."""
    made = build(size, way)
    with fakes(), kernels(way.kernels):
        without_storage(made)
        given = constants(size)
        with Traffic() as counted:
            step(made, size, given)
    return counted


def units_moved(size: Size, way: Way, whole: Traffic) -> float:
    """Elementwise bytes for each token over D * 2: what text and modulation take cancels out of two lengths.

    ``whole`` is the traffic at the size's own length.
    """
    shorter = replace(size, tokens=size.tokens // 2)
    more = whole.bytes - traffic(shorter, way).bytes
    return more / ((size.tokens - shorter.tokens) * size.dim * 2)


def units_held(size: Size, way: Way) -> float:
    """Most bytes held over S * D * 2: the block's input and the gradient of its result are among them."""
    made = build(size, way)
    with fakes(), kernels(way.kernels), kernels_of_cuda():
        without_storage(made)
        given = constants(size)
        with StepBytes(made) as held:
            step(made, size, given)
    return float(held.peak) / (size.tokens * size.dim * 2)


# Kernels, counted by what goes in and what comes out


def _opaque(name: str, function: Callable[..., Any]) -> Any:
    made = torch.library.custom_op(f"tuner_bench::{name}", function, mutates_args=())
    made.register_fake(function)
    return made


def _norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)
    return torch.empty_like(rows), statistic, torch.empty_like(statistic)


def _norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, residual: Tensor | None
) -> Tensor:
    return torch.empty_like(rows)


def _turned_norm(
    rows: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)


def _turned_norm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor, cos: Tensor | None, sin: Tensor | None
) -> Tensor:
    return torch.empty_like(rows)


def _gated_add(rows: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(rows)


def _gated_backward(gradient: Tensor, gate: Tensor) -> Tensor:
    return torch.empty_like(gradient)


OPAQUE: Mapping[str, Any] = {
    name: _opaque(name, function)
    for name, function in {
        "norm": _norm,
        "norm_backward": _norm_backward,
        "turned_norm": _turned_norm,
        "turned_norm_backward": _turned_norm_backward,
        "gated_add": _gated_add,
        "gated_backward": _gated_backward,
    }.items()
}


def _spread(operation: Any, place: int) -> Callable[..., Any]:
    """``operation`` on a table that is a pair, as the kernels are given it: its argument number ``place``."""

    def call(*given: Any) -> Any:
        table = given[place]
        return operation(*given[:place], *((None, None) if table is None else table), *given[place + 1 :])

    return call


def stand_ins() -> SimpleNamespace:
    """The functions of :mod:`tuner_kernels.eager`, each one opaque operation."""
    found = SimpleNamespace(**OPAQUE)
    found.turned_norm = _spread(OPAQUE["turned_norm"], 2)
    found.turned_norm_backward = _spread(OPAQUE["turned_norm_backward"], 4)
    assert all(hasattr(eager, name) for name in vars(found)), "the kernels have changed their names"
    return found


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """While entered, fakes pass for plain weights, and row-wise work is that of a GPU's kernels where wanted."""
    rows = stand_ins() if wanted else eager
    plain = mock.patch.object(linears, "Tensor", FakeTensor)  # one of the types that it takes for a plain weight
    with plain, mock.patch.object(functions, "rows_of", return_value=rows):
        yield


# The rows


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Traffic, memory and operations of every path."""
    if tiny:
        return of_one(TINY, DIFFUSERS) + of_one(TINY, KERNELS)
    return [row for size in SIZES for way in WAYS for row in of_one(size, way)]


def of_one(size: Size, way: Way) -> list[Row]:
    """The rows of one way to compute."""
    counted, case = traffic(size, way), f"{way.name}, {size.name}"
    return [
        Row(f"elementwise units: {case}", round(units_moved(size, way, counted), 1), way.moved),
        Row(f"peak live units: {case}", round(units_held(size, way), 1), way.held),
        Row(f"operations: {case}", sum(counted.operations.values()), way.operations),
    ]
