"""The trampoline: a network's forward goes through the driver, and everything else about it stays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tuner.blocks import RouteRequest, StepContext, TokenRoute, Trampoline, install

KEEP = torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]])


def router(request: RouteRequest) -> Sequence[TokenRoute]:
    return [TokenRoute(1, 4, KEEP)]


@pytest.fixture
def trampoline(toy: Any) -> Trampoline:
    return install(toy.net, toy.stack)


def count_blocks(toy: Any) -> list[int]:
    """Counts the calls of the stack's ``block``."""
    calls: list[int] = []
    plain = toy.stack.block
    toy.stack.block = lambda block, stream: (calls.append(1), plain(block, stream))[1]
    return calls


def test_runs_the_driver_and_keeps_class_and_state(toy: Any) -> None:
    names, plain = list(toy.net.state_dict()), toy.net(*toy.inputs)
    calls = count_blocks(toy)
    install(toy.net, toy.stack)
    assert torch.equal(toy.net(*toy.inputs), plain)
    assert len(calls) == 5
    assert type(toy.net).__name__ == "ToyNet"
    assert list(toy.net.state_dict()) == names
    assert len(list(toy.net.modules())) == len(list(type(toy.net)().modules()))


def test_hooks_on_the_network_still_fire(toy: Any, trampoline: Trampoline) -> None:
    fired: list[str] = []
    toy.net.register_forward_pre_hook(lambda *_: fired.append("before"))
    toy.net.register_forward_hook(lambda *_: fired.append("after"))
    toy.net(*toy.inputs)
    assert fired == ["before", "after"]


def test_switched_off_it_is_the_class_own_forward(toy: Any, trampoline: Trampoline) -> None:
    calls = count_blocks(toy)
    trampoline.context = StepContext(router=router)
    trampoline.enabled = False
    assert torch.equal(toy.net(*toy.inputs), type(toy.net).forward(toy.net, *toy.inputs))
    assert not calls
    trampoline.enabled = True
    toy.net(*toy.inputs)
    assert len(calls) == 5


def test_evaluation_mode_is_not_routed(toy: Any, trampoline: Trampoline) -> None:
    plain = type(toy.net).forward(toy.net, *toy.inputs)
    trampoline.context = StepContext(router=router)
    assert not torch.allclose(toy.net(*toy.inputs), plain)
    toy.net.eval()
    assert torch.equal(toy.net(*toy.inputs), plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_context_is_read_once(toy: Any, trampoline: Trampoline, checkpointing: bool) -> None:
    """What happens to the context after the forward does not reach its recomputation."""
    context = StepContext(router=router, checkpointing=checkpointing)
    trampoline.context = context
    toy.net(*toy.inputs).square().sum().backward()
    expected = toy.gradients()

    output = toy.net(*toy.inputs)
    trampoline.context = replace(context, router=lambda request: [TokenRoute(0, 5, KEEP.flip(0))], skip=frozenset({2}))
    trampoline.enabled = False
    output.square().sum().backward()
    assert all(torch.equal(expected[name], gradient) for name, gradient in toy.gradients().items())


def test_a_deep_copy_runs_its_own_weights(toy: Any, trampoline: Trampoline) -> None:
    before = toy.net(*toy.inputs)
    copied = copy.deepcopy(toy.net)
    assert torch.equal(copied(*toy.inputs), before)
    with torch.no_grad():
        for parameter in toy.net.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(copied(*toy.inputs), before)
    copied(*toy.inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in toy.net.parameters())


def test_a_deep_copy_leaves_the_step_behind(toy: Any, trampoline: Trampoline) -> None:
    """Residency (streams, pinned memory) and router belong to the original, and may not be copyable at all."""

    class Uncopyable:
        def __deepcopy__(self, memo: object) -> object:
            raise TypeError("cannot copy a stream")

    trampoline.context = StepContext(router=router, residency=Uncopyable())  # type: ignore[arg-type]
    copied = copy.deepcopy(toy.net)
    assert torch.equal(copied(*toy.inputs), type(toy.net).forward(toy.net, *toy.inputs))
    assert trampoline.context.router is router


@pytest.mark.parametrize("first", ["trampoline", "net", "stack"])
def test_copied_together_network_and_trampoline_belong_together(toy: Any, trampoline: Trampoline, first: str) -> None:
    whole = {"trampoline": trampoline, "net": toy.net, "stack": toy.stack}
    copied = copy.deepcopy({first: whole[first], **whole})
    calls: list[int] = []
    copied["trampoline"].context = StepContext(router=lambda request: calls.append(1) or [])  # type: ignore[func-returns-value]
    copied["net"](*toy.inputs)
    assert calls == [1]
    assert copied["trampoline"].stack is copied["stack"]
    assert copied["stack"].module is copied["net"]
