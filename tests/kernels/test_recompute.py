"""What a checkpointed fused block does not compute again, and does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tuner.builtin.checkpointing.selective import Selective
from tuner.testing.live_bytes import LiveBytes
from tuner_kernels import block, eager, feed_forward, functions, recompute

DIM, HEADS, WIDE, TOKENS, BATCH = 48, 4, 96, 40, 2
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
EVERYWHERE = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]


def make(targets: list[str], dtype: torch.dtype = torch.float32) -> WanTransformerBlock:
    torch.manual_seed(0)
    made = WanTransformerBlock(DIM, WIDE, HEADS, "rms_norm_across_heads", True, 1e-6, None)
    for parameter in made.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    made.to(dtype).requires_grad_(False)
    made.scale_shift_table.data = made.scale_shift_table.data.float()
    for norm in (made.norm1, made.norm2, made.norm3):
        norm.float()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=targets), made)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
            parameter.requires_grad_(True)
    block.install(made)
    return made.train()


def given(
    dtype: torch.dtype = torch.float32, *, timed: bool = False, tokens: int = TOKENS, text: int = 512
) -> tuple[Any, ...]:
    torch.manual_seed(1)
    angles = torch.randn(1, tokens, 1, DIM // HEADS // 2).repeat_interleave(2, -1)
    return (
        torch.randn(BATCH, tokens, DIM, dtype=dtype),
        torch.randn(BATCH, text, DIM, dtype=dtype),
        torch.randn(BATCH, tokens, 6, DIM) if timed else torch.randn(BATCH, 6, DIM),
        (angles.cos(), angles.sin()),
    )


def plainly(made: Any, *inputs: Any) -> Tensor:
    return made(*inputs)


def checkpointed(made: Any, *inputs: Any) -> Tensor:
    return checkpoint(made, *inputs, use_reentrant=False)


def outcome(made: Any, inputs: tuple[Any, ...], run: Callable[..., Tensor] = checkpointed) -> dict[str, Tensor]:
    made = copy.deepcopy(made)
    block.install(made)
    tokens = inputs[0].clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=tokens.dtype == torch.bfloat16):
        result = run(made, tokens, *inputs[1:])
    (result.float() * torch.linspace(-1, 1, DIM)).sum().backward()
    gradients = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
    return {"result": result.detach(), "tokens": tokens.grad, **gradients}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], bound: float = 0) -> None:
    assert one.keys() == other.keys()
    for name, each in one.items():
        difference = (each.double() - other[name].double()).norm() / each.double().norm()
        assert difference <= bound, (name, float(difference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
@pytest.mark.parametrize("timed", [False, True])
def test_it_is_what_it_is_without_checkpointing(targets: list[str], dtype: torch.dtype, timed: bool) -> None:
    """Bit for bit, but where PEFT's own modules multiply LoRA's matrices in another order."""
    made, inputs = make(targets, dtype), given(dtype, timed=timed)
    bound = 0.0 if targets is ATTENTION else ROUNDING[dtype]
    assert_equal(outcome(made, inputs, plainly), outcome(made, inputs), bound)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
@pytest.mark.parametrize("timed", [False, True])
def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch, targets: list[str], timed: bool) -> None:
    made, inputs = make(targets), given(timed=timed)
    whole = outcome(made, inputs)
    monkeypatch.setattr(feed_forward, "PIECE_TOKENS", 7)
    assert_equal(whole, outcome(made, inputs), 1e-6)


@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_the_last_product_is_not_computed_again(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has LoRA: what that is trained by is what goes into the product."""
    made, inputs = make(targets), given()

    def flops(run: Callable[..., Tensor]) -> int:
        with FlopCounterMode(display=False) as counted:
            outcome(made, inputs, run)
        return counted.get_total_flops()

    found = flops(checkpointed)
    monkeypatch.setattr(feed_forward, "applies", lambda *_: None)
    whole = flops(checkpointed)
    assert whole - found >= 2 * BATCH * TOKENS * DIM * WIDE
    if targets is ATTENTION:
        assert whole - found == 2 * BATCH * TOKENS * DIM * WIDE


def test_without_checkpointing_everything_is_kept() -> None:
    """What is kept is not computed again: forward, and backward without the products of weights' gradients."""
    made, inputs = make(ATTENTION), given()
    with FlopCounterMode(display=False) as forward:
        plainly(made, *inputs)
    with FlopCounterMode(display=False) as counted:
        outcome(made, inputs, plainly)
    per_module = counted.get_flop_counts()["Global"]
    assert sum(per_module.values()) < 2.3 * forward.get_total_flops()


def test_a_second_forward_before_the_backwards() -> None:
    made, inputs = make(EVERYWHERE), given()

    def twice(made: Any, tokens: Tensor, *others: Any) -> Tensor:
        return checkpointed(made, tokens, *others) + checkpointed(made, tokens.flip(1), *others)

    def once(made: Any, tokens: Tensor, *others: Any) -> Tensor:
        return plainly(made, tokens, *others) + plainly(made, tokens.flip(1), *others)

    assert_equal(outcome(made, inputs, once), outcome(made, inputs, twice), 1e-6)


@pytest.fixture
def as_kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Torch's own operations in the place of the Triton kernels: what is done with those is done with them."""
    rows = SimpleNamespace(**vars(eager))
    monkeypatch.setattr(functions, "rows_of", lambda device: rows)
    return rows


def selectively(made: Any, *inputs: Any) -> Tensor:
    policy = Selective()
    computing, again = policy.contexts()
    contexts = iter((computing, again))

    def compute(*inputs: Any) -> Tensor:
        with next(contexts):
            return made(*inputs)

    result = policy.run(lambda tokens: compute(tokens, *inputs[1:]), inputs[0])
    assert policy.kept == 1
    return result


@pytest.mark.parametrize("run", [checkpointed, selectively])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, ["to_k"], ["ffn.net.2"]], ids=str)
@pytest.mark.usefixtures("as_kernels")
def test_what_attention_was_given_is_made_again(run: Callable[..., Tensor], targets: list[str], timed: bool) -> None:
    """Queries, keys and normed rows are not kept: backward makes the very same ones."""
    made, inputs = make(targets), given(timed=timed)
    bound = ROUNDING[torch.float32] if "ffn.net.2" in targets else 0.0
    assert_equal(outcome(made, inputs, plainly), outcome(made, inputs, run), bound)


def held(made: Any, inputs: tuple[Any, ...], run: Callable[..., Tensor]) -> int:
    """Most bytes at an instant of forward and backward."""
    with LiveBytes() as live:
        outcome(made, inputs, run)
    return live.peak


def test_a_checkpointed_block_holds_less(as_kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By at least what it does not keep: intermediates of the feed-forward, normed rows, queries and keys."""
    made, inputs = make(ATTENTION), given(tokens=1024, text=8)
    unit = inputs[0].nbytes
    monkeypatch.setattr(feed_forward, "PIECE_TOKENS", 128)
    less = held(made, inputs, checkpointed)
    for name in ("applies", "is_checkpointed"):
        owner = feed_forward if name == "applies" else recompute
        monkeypatch.setattr(owner, name, lambda *_: None)
    assert held(made, inputs, checkpointed) - less > 5 * unit


def test_kept_tensors_are_given_to_all_who_ask_and_then_let_go() -> None:
    rows = torch.randn(1, 3, 4, requires_grad=True)
    kept, node = recompute.keep(rows, torch.ones(2))
    first, second = recompute.taken(node), recompute.taken(node)
    assert first is second
    kept.sum().backward()
    assert not hasattr(node, "taken")
