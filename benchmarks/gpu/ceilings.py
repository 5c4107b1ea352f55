"""What the device can do at Wan's shapes: matrix products, attention kernels, copies. Everything else is held to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from gpu.running import Result, Row, Skipped

COLUMNS = ("kind", "tflops", "backward_tflops", "seconds", "backward_seconds", "gb_per_s")
TERA, GIGA = 1e12, 1e9
HEAD = 128
ATTENTION_BACKWARD = 2.5
"""Times the forward's FLOP: five products for two (arXiv:2307.08691)."""
SQUARE = 8192
COPIES = ("host to device", "device to host", "device")
BACKENDS = ("cudnn", "flash", "efficient", "default")
KERNELS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""Names in :class:`torch.nn.attention.SDPBackend`; ``default`` is torch's own choice."""


def device() -> torch.device:
    """The CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_of(work: Callable[[], object], least: float = 0.3) -> float:
    """Median seconds of ``work``, done for at least ``least`` seconds after a warm-up; the device is waited for."""
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=least).median)


# Matrix products


def product(kind: str, rows: int, inputs: int, outputs: int, least: float) -> dict[str, Any]:
    """(rows, inputs) times (inputs, outputs) of normal numbers: a bf16 product, or an 8-bit one with its rescaling."""
    where = device()
    left = torch.randn(rows, inputs, device=where, dtype=torch.bfloat16)
    right = torch.randn(outputs, inputs, device=where, dtype=torch.bfloat16)
    seconds = seconds_of(_product(kind, left, right), least)
    return {"kind": kind, "seconds": seconds, "tflops": 2 * rows * inputs * outputs / seconds / TERA}


def _product(kind: str, left: Tensor, right: Tensor) -> Callable[[], object]:
    """The product of ``left`` (M, K) and ``right`` (N, K) transposed."""
    if kind == "bf16":
        return lambda: left @ right.t()
    if kind == "int8":
        whole, other = (each.mul(40).clamp(-127, 127).to(torch.int8) for each in (left, right))
        return lambda: torch._int_mm(whole, other.t())
    if left.device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise Skipped("products of float8 with a scale for each row need a CUDA device of capability 8.9 or more")
    few, others = (each.clamp(-448, 448).to(torch.float8_e4m3fn) for each in (left, right))
    by_row = torch.ones(left.shape[0], 1, device=left.device)
    by_column = torch.ones(1, right.shape[0], device=left.device)
    return lambda: torch._scaled_mm(few, others.t(), scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16)


# Attention


def attention(backend: str, tokens: int, heads: int, head: int, least: float) -> dict[str, Any]:
    """Forward, with what backward needs kept, and backward of self-attention as Wan's processors call it.

    Queries, keys and values are (1, tokens, heads, head) in memory, which torch sees transposed.
    """
    where = device()
    given = [torch.randn(1, tokens, heads, head, device=where, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    inputs = [each.requires_grad_(True) for each in given]
    chosen = nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, KERNELS[backend]))
    with chosen:
        forward = seconds_of(lambda: scaled_dot_product_attention(*inputs), least)
        result = scaled_dot_product_attention(*inputs)
        arrived = torch.randn_like(result)
        backward = seconds_of(lambda: torch.autograd.grad(result, inputs, arrived, retain_graph=True), least)
    flop = 4.0 * tokens * tokens * heads * head
    return {
        "kind": backend,
        "seconds": forward,
        "tflops": flop / forward / TERA,
        "backward_seconds": backward,
        "backward_tflops": ATTENTION_BACKWARD * flop / backward / TERA,
        "tokens": tokens,
        "heads": heads,
    }


# Copies


def copied(kind: str, size: int, least: float) -> dict[str, Any]:
    """``size`` bytes from pinned memory to the device, back, or within it (read and written, so twice the bytes)."""
    where = device()
    there = torch.empty(size, dtype=torch.uint8, device=where)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=where.type == "cuda")
    source, target = {
        "host to device": (here, there),
        "device to host": (there, here),
        "device": (there, torch.empty_like(there)),
    }[kind]
    seconds = seconds_of(lambda: target.copy_(source, non_blocking=True), least)
    return {"kind": kind, "seconds": seconds, "gb_per_s": size * (1 + (kind == "device")) / seconds / GIGA}


# The rows


def shapes(smoke: bool) -> Iterator[tuple[str, int, int, int]]:
    """(name, rows, inputs, outputs) of the products: a large square, and those of Wan's blocks."""
    if smoke:
        yield "square", 64, 64, 64
        return
    yield "square", SQUARE, SQUARE, SQUARE
    for model, dim, ffn in (("1.3B", 1536, 8960), ("14B", 5120, 13_824)):
        yield f"{model} S x D x D", 32_760, dim, dim
        yield f"{model} S x D x F", 32_760, dim, ffn
        yield f"{model} S x F x D", 32_760, ffn, dim


def rows(smoke: bool) -> list[Row]:
    """The products, then attention, the shapes of most use first, then copies."""
    least, size = (1e-3, 2**16) if smoke else (0.3, 2**30)
    kinds = ("bf16", "int8", "fp8")
    found = [Row("product, bf16, square", product, ("bf16", *next(shapes(smoke))[1:], least))]
    found += [
        Row(f"copy, {kind}", copied, (kind, size, least)) for kind in ("host to device", "device to host", "device")
    ]
    lengths, counts, head = ((64,), (2,), 8) if smoke else ((16_384, 32_760, 4608), (12, 40), HEAD)
    backends = ("math", "default") if smoke else BACKENDS
    found += [
        Row(f"attention, {backend}, S = {tokens}, {heads} heads", attention, (backend, tokens, heads, head, least))
        for tokens in lengths
        for heads in counts
        for backend in backends
    ]
    found += [
        Row(f"product, {kind}, {name}", product, (kind, *shape, least))
        for name, *shape in shapes(smoke)
        for kind in kinds
        if (kind, name) != ("bf16", "square")
    ]
    return found


def summary(done: Sequence[Result], name: str) -> dict[str, Any]:
    """The rates that ``tuner plan`` reads, as far as they were measured.

    Products are those of the large square; attention is the kernel that is the fastest, forward and backward
    together, at the longest sequence that was measured.
    """
    found: dict[str, Any] = {"device": name}
    by_name = {each.row.name: each.figures for each in done if each.figures}
    if square := by_name.get("product, bf16, square"):
        found["matmul_tflops"] = square["tflops"]
    kernels = [each for each in by_name.values() if "backward_tflops" in each]
    if kernels:
        longest = max(each["tokens"] for each in kernels)
        best = max((each for each in kernels if each["tokens"] == longest), key=_combined)
        found |= {"attention_forward_tflops": best["tflops"], "attention_backward_tflops": best["backward_tflops"]}
    copies: Mapping[str, tuple[str, float]] = {
        "copy, device": ("copy_tb_per_s", 1000.0),
        "copy, host to device": ("host_to_device_gb_per_s", 1.0),
        "copy, device to host": ("device_to_host_gb_per_s", 1.0),
    }
    found |= {key: by_name[row]["gb_per_s"] / unit for row, (key, unit) in copies.items() if row in by_name}
    return found


def _combined(figures: Mapping[str, Any]) -> float:
    """TFLOP/s of forward and backward together."""
    return (1 + ATTENTION_BACKWARD) / (1 / figures["tflops"] + ATTENTION_BACKWARD / figures["backward_tflops"])
