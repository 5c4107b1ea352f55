"""A whole checkpointed block on the Triton kernels gives what diffusers gives: without a GPU in the interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tuner_kernels import block, functions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if find_spec("triton") is None or (DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
    pytest.skip("`make triton-tests` runs these in Triton's interpreter", allow_module_level=True)
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

HEADS, DIM, TOKENS, TEXT = 2, 32, 6, 9
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def make(dtype: torch.dtype, targets: list[str]) -> WanTransformerBlock:
    torch.manual_seed(0)
    made = WanTransformerBlock(DIM, 64, HEADS, "rms_norm_across_heads", True, 1e-6, None)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    made.to(dtype).requires_grad_(False)
    made.scale_shift_table.data = made.scale_shift_table.data.float()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=targets), made)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
            parameter.requires_grad_(True)
    return made.train().to(DEVICE)


def outcome(made: Any, dtype: torch.dtype, *, timed: bool) -> dict[str, Tensor]:
    """Result and gradients of a checkpointed forward."""
    torch.manual_seed(1)
    angles = torch.randn(1, TOKENS, 1, DIM // HEADS // 2).repeat_interleave(2, -1).to(DEVICE)
    tokens = torch.randn(2, TOKENS, DIM, dtype=dtype).to(DEVICE).requires_grad_()
    text = torch.randn(2, TEXT, DIM, dtype=dtype).to(DEVICE)
    modulation = torch.randn(2, TOKENS, 6, DIM) if timed else torch.randn(2, 6, DIM)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        rotary = (angles.cos(), angles.sin())
        result = checkpoint(made, tokens, text, modulation.to(DEVICE), rotary, use_reentrant=False)
    (result.float() * torch.linspace(-1, 1, DIM, device=DEVICE)).sum().backward()
    gradients = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
    return {"result": result.detach(), "tokens": tokens.grad, **gradients}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]], ids=["attention", "all"])
@pytest.mark.parametrize("timed", [False, True], ids=["a time", "a time per token"])
def test_a_checkpointed_block_is_diffusers_own(dtype: torch.dtype, targets: list[str], timed: bool) -> None:
    assert functions.rows_of(DEVICE).__name__ == "tuner_kernels.triton_rows"
    expected = outcome(make(dtype, targets), dtype, timed=timed)
    fused = make(dtype, targets)
    block.install(fused)
    found = outcome(fused, dtype, timed=timed)
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        difference = (found[name].double() - each.double()).norm() / each.double().norm()
        assert difference < BOUNDS[dtype], (name, float(difference))
