"""The Triton kernels give what their twins in torch give. Without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner_kernels import eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if find_spec("triton") is None or (DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
    # Triton asks for the variable when it is first imported, by whomever.
    pytest.skip("`make triton-tests` runs these in Triton's interpreter", allow_module_level=True)
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

WIDTH, HEADS, EPS = 24, 2, 1e-6
SHAPES = [(1, 1), (2, 1), (2, 5)]
"""(samples, tokens) of what broadcasts."""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from tuner_kernels import triton_rows

    return triton_rows


def rows(dtype: torch.dtype, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return (torch.randn(2, 5, WIDTH) * 3 + 1).to(dtype).to(DEVICE)


def wide(samples: int, tokens: int, seed: int = 9) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(samples, tokens, WIDTH).to(DEVICE)


def table(samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    angles = torch.randn(samples, 5, 1, WIDTH // HEADS // 2).to(DEVICE)
    return angles.cos(), angles.sin()


def same(found: Any, expected: Any, dtype: torch.dtype) -> None:
    # The interpreter cuts bfloat16 off where a GPU rounds.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = wide(*shape), wide(*shape, seed=8)
    expected = eager.norm(rows(dtype), weight, bias, EPS)
    same(kernels.norm(rows(dtype), weight, bias, EPS), expected, dtype)
    for past in (None, rows(dtype, 3)):
        given = (rows(dtype, 2), rows(dtype), weight, *expected[1:], past)
        same([kernels.norm_backward(*given)], [eager.norm_backward(*given)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_turned_norm(kernels: ModuleType, dtype: torch.dtype, samples: int) -> None:
    turns = table(samples) if samples else None
    weight = wide(1, 1).flatten().to(dtype)
    expected = eager.turned_norm(rows(dtype), weight, turns, EPS)
    same(kernels.turned_norm(rows(dtype), weight, turns, EPS), expected, dtype)
    given = (rows(dtype, 2), rows(dtype), weight, expected[1], turns)
    same([kernels.turned_norm_backward(*given)], [eager.turned_norm_backward(*given)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(kernels: ModuleType, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate = wide(*shape)
    found = [kernels.gated_add(rows(dtype), rows(dtype, 2), gate), kernels.gated_backward(rows(dtype), gate)]
    same(found, [eager.gated_add(rows(dtype), rows(dtype, 2), gate), eager.gated_backward(rows(dtype), gate)], dtype)


def test_rows_that_are_no_memory_of_their_own(kernels: ModuleType) -> None:
    """Parts of a wider tensor, as a product for queries, keys and values together gives them."""
    both = torch.cat([rows(torch.float32), rows(torch.float32, 2)], dim=-1)
    part = both[..., WIDTH:]
    given = (wide(1, 1), wide(1, 1, 8), EPS)
    same(kernels.norm(part, *given), eager.norm(part, *given), torch.float32)


@pytest.mark.gpu
def test_they_are_used_on_a_gpu() -> None:
    from tuner_kernels import functions

    assert functions.rows_of(torch.device("cuda")).__name__ == "tuner_kernels.triton_rows"
