"""Fused blocks compute what diffusers' compute, forward and backward, in far fewer operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tuner.testing.traffic import Traffic
from tuner_kernels import block, functions, linears

DIM, HEADS, WIDE, TEXT = 48, 4, 96, 512
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Largest difference over the norm: float32's own rounding, and that of the results of a block in bfloat16."""


def make(dtype: torch.dtype, *, image: bool = False, dim: int = DIM, **lora: Any) -> WanTransformerBlock:
    """A block with random weights and a trained LoRA on its attention."""
    torch.manual_seed(0)
    made = WanTransformerBlock(dim, 2 * dim, HEADS, "rms_norm_across_heads", True, 1e-6, dim if image else None)
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    made.to(dtype).requires_grad_(False)
    for norm in (made.norm1, made.norm2, made.norm3):
        norm.float()
    made.scale_shift_table.data = made.scale_shift_table.data.float()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **lora}), made)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
            parameter.requires_grad_(True)
    return made.train()


def given(
    dtype: torch.dtype, *, batch: int, image: bool, timed: bool, tokens: int = 40, dim: int = DIM
) -> tuple[Any, ...]:
    """Tokens, text, modulation and rotary tables."""
    torch.manual_seed(1)
    angles = torch.randn(1, tokens, 1, dim // HEADS // 2).repeat_interleave(2, -1)
    return (
        torch.randn(batch, tokens, dim, dtype=dtype),
        torch.randn(batch, TEXT + 9 * image, dim, dtype=dtype),
        torch.randn(batch, tokens, 6, dim) if timed else torch.randn(batch, 6, dim),
        (angles.cos(), angles.sin()),
    )


def outcome(made: WanTransformerBlock, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The result and every gradient, of a checkpointed forward and its backward."""
    tokens = inputs[0].clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=tokens.dtype == torch.bfloat16):
        result = checkpoint(made, tokens, *inputs[1:], use_reentrant=False)
    (result.float() * torch.linspace(-1, 1, result.shape[-1])).sum().backward()
    gradients = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
    return {"result": result.detach(), "tokens": tokens.grad, **gradients}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], bound: float) -> None:
    assert one.keys() == other.keys()
    for name, each in one.items():
        assert other[name].dtype == each.dtype
        difference = (each.double() - other[name].double()).norm() / each.double().norm()
        assert difference < bound, (name, difference)


def fused(made: WanTransformerBlock) -> WanTransformerBlock:
    same = copy.deepcopy(made)
    block.install(same)
    return same


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("image", "timed", "batch"), [(False, False, 2), (True, False, 1), (False, True, 2)])
def test_results_and_gradients_are_those_of_diffusers(dtype: torch.dtype, image: bool, timed: bool, batch: int) -> None:
    made, inputs = make(dtype, image=image), given(dtype, batch=batch, image=image, timed=timed)
    assert_equal(outcome(made, inputs), outcome(fused(made), inputs), CLOSE[dtype])


@pytest.mark.parametrize("kernel", ["_native_math", "_native_flash", "native"])
def test_every_exact_attention_kernel(kernel: str) -> None:
    """Their gradients lie in memory in different ways."""
    made, inputs = make(torch.float32), given(torch.float32, batch=2, image=False, timed=False)
    for each in (made.attn1, made.attn2):
        each.processor._attention_backend = kernel
    assert_equal(outcome(made, inputs), outcome(fused(made), inputs), 2e-6)


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_dropout": 0.5},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["to_q", "ffn.net.0.proj", "ffn.net.2"]},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_k": 3}},
    ],
    ids=str,
)
def test_every_kind_of_lora(lora: dict[str, Any]) -> None:
    made, inputs = make(torch.float32, **lora), given(torch.float32, batch=1, image=False, timed=False)
    torch.manual_seed(2)
    plain = outcome(made, inputs)
    torch.manual_seed(2)
    assert_equal(plain, outcome(fused(made), inputs), CLOSE[torch.float32])


def test_with_the_adapter_off_it_is_the_base() -> None:
    made, inputs = make(torch.float32), given(torch.float32, batch=1, image=False, timed=False)
    quick = fused(made)
    for each in (made, quick):
        for layer in each.modules():
            if hasattr(layer, "_disable_adapters"):
                layer._disable_adapters = True
    with torch.no_grad():
        torch.testing.assert_close(quick(*inputs), made(*inputs), rtol=1e-5, atol=1e-5)


def test_a_matrix_that_does_more_is_left_to_its_module() -> None:
    """Hooks, forwards put on an instance, trained and quantised weights: nothing of them is passed over."""
    rows = torch.randn(1, 3, 8)
    plain = torch.nn.Linear(8, 8).requires_grad_(False)
    assert linears.parts_of(plain, rows) is not None
    hooked = copy.deepcopy(plain)
    hooked.register_forward_hook(lambda module, inputs, result: result * 2)
    moved = copy.deepcopy(plain)
    object.__setattr__(moved, "forward", lambda given: given)
    half, trained = copy.deepcopy(plain).bfloat16(), copy.deepcopy(plain).requires_grad_(True)
    for each in (hooked, moved, half, trained):
        assert linears.parts_of(each, rows) is None
    doubled, passed = (linears.apply([each], rows)[0] for each in (hooked, moved))
    assert torch.equal(doubled, plain(rows) * 2)
    assert torch.equal(passed, rows)


@pytest.mark.parametrize("part", ["scale_shift_table", "attn1.norm_q.weight", "norm2.bias"])
def test_a_block_with_trained_norms_is_diffusers_own(part: str) -> None:
    made, inputs = make(torch.float32), given(torch.float32, batch=1, image=False, timed=False)
    dict(made.named_parameters())[part].requires_grad_(True)
    one, other = outcome(made, inputs), outcome(fused(made), inputs)
    assert part in other
    assert all(torch.equal(each, other[name]) for name, each in one.items())


def traffic(made: WanTransformerBlock, tokens: int, dim: int) -> Traffic:
    inputs = given(torch.bfloat16, batch=1, image=False, timed=False, tokens=tokens, dim=dim)
    with Traffic() as counted:
        outcome(made, inputs)
    return counted


def test_less_than_half_the_traffic_and_fewer_operations() -> None:
    """Bytes by token: what the text and the modulation take is in both of two lengths, and cancels out."""
    dim = 64
    made = make(torch.bfloat16, dim=dim, lora_alpha=4)
    units, operations = [], []
    for each in (made, fused(made)):
        short, long = traffic(each, 256, dim), traffic(each, 512, dim)
        units.append((long.bytes - short.bytes) / (256 * dim * 2))
        operations.append(sum(long.operations.values()))
    assert units[1] < 360 < 0.45 * units[0]
    assert operations[1] < 0.62 * operations[0]


def test_rows_are_torchs_own_without_a_gpu() -> None:
    assert functions.rows_of(torch.device("cpu")).__name__ == "tuner_kernels.eager"
