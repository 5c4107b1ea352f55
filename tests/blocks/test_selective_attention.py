"""Selective checkpointing: which attention is computed once, which twice, and with which kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.blocks import RouteRequest, StepContext, TokenRoute, run_stack
from tuner.builtin.checkpointing.offload import Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.checkpointing import ATTENTION_OPERATORS, Checkpointing

BLOCKS, TOKENS, TEXT = 5, 12, 5


def forward(toy: Any, policy: Checkpointing | None, **context: Any) -> Tensor:
    stack = toy.stack
    stream = run_stack(stack, stack.embed(*toy.inputs), StepContext(checkpointing=policy, **context))
    return stack.unembed(stream).square().mean()


def routed(request: RouteRequest) -> list[TokenRoute]:
    return [TokenRoute(1, 3, torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]]))]


class Attention(TorchDispatchMode):
    """Notes the number of keys of each attention that is computed."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ATTENTION_OPERATORS:
            self.keys.append(args[1].shape[-2])
        return func(*args, **(kwargs or {}))


def test_selective_computes_self_attention_once_and_attention_to_text_twice(make_toy: Callable[[], Any]) -> None:
    seen = {}
    for policy in (Checkpointing(), Selective(), Selective(2)):
        with Attention() as attention:
            loss = forward(make_toy(), policy)
        assert attention.keys == BLOCKS * [TOKENS, TEXT]
        with Attention() as attention:
            loss.backward()
        seen[type(policy), policy.interval] = attention.keys
    assert seen[Checkpointing, 1] == BLOCKS * [TOKENS, TEXT]
    assert seen[Selective, 1] == BLOCKS * [TEXT]
    assert seen[Selective, 2] == 3 * [TEXT], "blocks 0, 2 and 4"


def test_selective_counts_two_forwards_apart(toy: Any) -> None:
    policy = Selective()
    total = forward(toy, policy) + forward(toy, policy, router=routed)
    with Attention() as attention:
        total.backward()
    assert attention.keys == 2 * BLOCKS * [TEXT]
    assert policy.kept == 2 * BLOCKS


def test_selective_says_once_that_a_kernel_is_out_of_its_reach(toy: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Torch's ``math`` takes attention to pieces: nothing can be kept, and gradients stay right."""
    policy = Selective()
    with sdpa_kernel(SDPBackend.MATH):
        forward(toy, None).backward()
        expected = toy.gradients()
        for _ in range(2):
            forward(toy, policy).backward()
            assert all(torch.equal(gradient, expected[name]) for name, gradient in toy.gradients().items())
    assert sum("selective keeps nothing" in each for each in caplog.messages) == 1
    caplog.clear()
    forward(toy, Selective())
    assert not caplog.messages


@torch.library.custom_op("tuner_test::attention", mutates_args=())
def kernel_of_a_plugin(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, S, H, E), as FlashAttention has them."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous()


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = [each.detach().requires_grad_() for each in ctx.saved_tensors]
    with torch.enable_grad():
        query, key, value = (each.transpose(1, 2) for each in rows)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    query, key, value = torch.autograd.grad(out, rows, gradient)
    return query, key, value


kernel_of_a_plugin.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@pytest.mark.parametrize("registered", [False, True])
def test_a_plugin_may_name_its_operator(toy: Any, monkeypatch: pytest.MonkeyPatch, registered: bool) -> None:
    calls: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel_of_a_plugin(query, key, value).flatten(2)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() == "tuner_test::attention":
                calls.append(args[1].shape[1])
            return func(*args, **(kwargs or {}))

    for block in toy.net.blocks:
        block.attend = attend
    if registered:
        monkeypatch.setitem(ATTENTION_OPERATORS, "tuner_test::attention", -3)
    forward(toy, None).backward()
    expected = toy.gradients()
    loss = forward(toy, Selective())
    with Calls():
        loss.backward()
    assert calls == BLOCKS * ([TEXT] if registered else [TOKENS, TEXT])
    assert all(torch.equal(gradient, expected[name]) for name, gradient in toy.gradients().items())


def test_compiled_blocks_are_checkpointed_the_same(toy: Any) -> None:
    """``aot_eager`` traces and splits blocks as the default backend does, without generating code."""
    torch.compiler.reset()
    for block in toy.net.blocks:
        block.compile(backend="aot_eager")
    forward(toy, None).backward()
    expected = toy.gradients()
    for policy in (Checkpointing(), Selective(), Offload(torch.device("cpu"))):
        loss = forward(toy, policy)
        with Attention() as attention:
            loss.backward()
        assert attention.keys == BLOCKS * ([TEXT] if isinstance(policy, Selective) else [TOKENS, TEXT])
        assert all(torch.equal(gradient, expected[name]) for name, gradient in toy.gradients().items())
