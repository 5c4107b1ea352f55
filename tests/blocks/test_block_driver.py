"""The block driver against plain loops: same bits, same gradients, right routes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tuner.blocks import RouteRequest, StepContext, Stream, TokenRoute, run_stack

KEEP_6 = torch.tensor([[0, 2, 3, 7, 8, 11], [1, 2, 5, 6, 9, 10]])
KEEP_4 = torch.tensor([[1, 4, 5, 9], [0, 3, 10, 11]])


def fixed(*routes: TokenRoute) -> Callable[[RouteRequest], Sequence[TokenRoute]]:
    return lambda request: routes


def drive(toy: Any, context: StepContext, training: bool = True) -> Tensor:
    stack = toy.stack
    return stack.unembed(run_stack(stack, stack.embed(*toy.inputs), context, training=training))


def outcome(toy: Any, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    output.square().mean().backward()
    return output.detach(), toy.gradients()


def assert_same(ours: tuple[Tensor, dict[str, Tensor]], reference: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Bit-equal outputs and gradients."""
    assert torch.equal(ours[0], reference[0])
    assert ours[1].keys() == reference[1].keys()
    for name, gradient in reference[1].items():
        assert torch.equal(ours[1][name], gradient), name


def naive(toy: Any, routes: Sequence[TokenRoute]) -> Tensor:
    """Sample by sample, with plain indexing, without anything of the driver."""
    net, (latents, times, text) = toy.net, toy.inputs
    starts = {route.start: route for route in routes}
    ends = {route.stop: route for route in routes}
    rows = []
    for b in range(latents.shape[0]):
        everything = torch.arange(latents.shape[1])
        whole, kept = net.patch(latents[b : b + 1]), everything
        for index, block in enumerate(net.blocks):
            if index in ends:
                kept = everything
            if index in starts:
                kept = starts[index].keep[b]
            modulation = net.time(times[b : b + 1, kept].unsqueeze(-1))
            caption = net.caption(text[b : b + 1])
            part = block(whole[:, kept], caption, modulation, net.cos[:, kept], net.sin[:, :, kept])
            whole = torch.stack(
                [part[0, (kept == s).nonzero().item()] if s in kept else whole[0, s] for s in everything]
            )
            whole = whole.unsqueeze(0)
        rows.append(net.head(whole))
    return torch.cat(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_a_plain_loop_bit_for_bit(toy: Any, checkpointing: bool) -> None:
    reference = outcome(toy, toy.net(*toy.inputs))
    assert_same(outcome(toy, drive(toy, StepContext(checkpointing=checkpointing))), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_route_that_keeps_all_tokens_changes_no_bit(toy: Any, checkpointing: bool) -> None:
    every = torch.arange(12).expand(2, -1)
    context = StepContext(router=fixed(TokenRoute(1, 4, every)), checkpointing=checkpointing)
    assert_same(outcome(toy, drive(toy, context)), outcome(toy, toy.net(*toy.inputs)))


ROUTES = {
    "inner": [TokenRoute(1, 4, KEEP_6)],
    "one block": [TokenRoute(2, 3, KEEP_4)],
    "adjacent": [TokenRoute(1, 3, KEEP_6), TokenRoute(3, 4, KEEP_4)],
    "to the last block": [TokenRoute(3, 5, KEEP_4)],
    "every block": [TokenRoute(0, 5, KEEP_6)],
    "given in reverse": [TokenRoute(3, 4, KEEP_4), TokenRoute(0, 2, KEEP_6)],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES.keys())
def test_routed_equals_gathering_and_scattering_by_hand(
    toy: Any, routes: list[TokenRoute], checkpointing: bool
) -> None:
    reference, expected = outcome(toy, naive(toy, routes))
    output, gradients = outcome(toy, drive(toy, StepContext(router=fixed(*routes), checkpointing=checkpointing)))
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-12, msg=name)
    assert not torch.allclose(output, toy.net(*toy.inputs)), "the route must matter for this test to mean something"


def test_checkpointed_route_equals_unchecked_bit_for_bit(toy: Any) -> None:
    context = StepContext(router=fixed(*ROUTES["adjacent"]))
    reference = outcome(toy, drive(toy, context))
    assert_same(outcome(toy, drive(toy, replace(context, checkpointing=True))), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_with_other_routes_before_one_backward(toy: Any, checkpointing: bool) -> None:
    pair = [[TokenRoute(1, 4, KEEP_6)], [TokenRoute(1, 4, KEEP_6.flip(0)), TokenRoute(4, 5, KEEP_4)]]
    contexts = [StepContext(router=fixed(*routes), checkpointing=checkpointing) for routes in pair]
    by_hand = outcome(toy, naive(toy, pair[0]) + 2 * naive(toy, pair[1]))
    ours = outcome(toy, drive(toy, contexts[0]) + 2 * drive(toy, contexts[1]))
    for name, gradient in by_hand[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-12, msg=name)


def test_dropped_tokens_pass_unchanged_with_gradient_one(toy: Any) -> None:
    tokens = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    stream = replace(toy.stack.embed(*toy.inputs), tokens=tokens)
    routed = run_stack(toy.stack, stream, StepContext(router=fixed(TokenRoute(0, 5, KEEP_6)))).tokens
    dropped = torch.ones(2, 12, dtype=torch.bool).scatter_(1, KEEP_6, False)
    assert torch.equal(routed[dropped], tokens[dropped])
    assert not torch.isclose(routed[~dropped], tokens[~dropped]).all(dim=-1).any()
    routed[dropped].sum().backward()
    assert torch.equal(tokens.grad[dropped], torch.ones_like(tokens.grad[dropped]))
    assert not tokens.grad[~dropped].any()


def test_routes_neither_in_evaluation_nor_without_gradients(toy: Any) -> None:
    def refuse(request: RouteRequest) -> Sequence[TokenRoute]:
        raise AssertionError("the router was asked")

    context, reference = StepContext(router=refuse), toy.net(*toy.inputs)
    assert torch.equal(drive(toy, context, training=False), reference)
    with torch.no_grad():
        assert torch.equal(drive(toy, context), reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_router_is_asked_once_and_told_what_it_needs(toy: Any, checkpointing: bool) -> None:
    requests: list[RouteRequest] = []

    def router(request: RouteRequest) -> Sequence[TokenRoute]:
        requests.append(request)
        return [TokenRoute(1, 3, KEEP_6)]

    context = StepContext(router=router, checkpointing=checkpointing, keep_at_least=3, positions=(4, 7))
    forced = torch.arange(12).eq(0).expand(2, -1)
    stream = replace(toy.stack.embed(*toy.inputs), forced=forced)
    toy.stack.unembed(run_stack(toy.stack, stream, context)).sum().backward()
    (request,) = requests
    assert (request.blocks, request.grid, request.positions) == (5, (3, 2, 2), (4, 7))
    assert request.keep_at_least == 3
    assert request.forced is forced
    assert request.tokens.shape == (2, 12, 8)
    assert not request.tokens.requires_grad


def test_blocks_of_a_route_see_what_belongs_to_their_tokens(toy: Any) -> None:
    seen: list[Stream] = []
    plain = toy.stack.block
    toy.stack.block = lambda block, stream: (seen.append(stream), plain(block, stream))[1]
    stream = replace(toy.stack.embed(*toy.inputs), forced=torch.rand(2, 12) < 0.5)
    run_stack(toy.stack, stream, StepContext(router=fixed(TokenRoute(2, 3, KEEP_4))))
    routed, modulation = seen[2], stream.per_token["mod"][0]
    for b in range(2):
        assert torch.equal(routed.per_token["cos"][0][b], toy.net.cos[0, KEEP_4[b]])
        assert torch.equal(routed.per_token["sin"][0][b], toy.net.sin[0][:, KEEP_4[b]])
        assert torch.equal(routed.per_token["mod"][0][b], modulation[b, KEEP_4[b]])
        assert torch.equal(routed.forced[b], stream.forced[b, KEEP_4[b]])
    assert routed.shared is stream.shared
    assert seen[3].per_token["cos"][0] is toy.net.cos


def test_skipped_blocks_do_not_run(toy: Any) -> None:
    context = StepContext(skip=frozenset({0, 3}), router=fixed(TokenRoute(3, 5, KEEP_6)))
    output = drive(toy, context)
    toy.net.blocks = torch.nn.ModuleList(block for index, block in enumerate(toy.net.blocks) if index not in (0, 3))
    torch.testing.assert_close(output, naive(toy, [TokenRoute(2, 3, KEEP_6)]), rtol=0, atol=1e-12)


BAD_ROUTES = {
    "past the last block": [TokenRoute(3, 6, KEEP_6)],
    "before the first block": [TokenRoute(-1, 2, KEEP_6)],
    "empty": [TokenRoute(2, 2, KEEP_6)],
    "overlapping": [TokenRoute(0, 3, KEEP_6), TokenRoute(2, 4, KEEP_4)],
    "same start": [TokenRoute(1, 2, KEEP_6), TokenRoute(1, 3, KEEP_4)],
    "for another batch": [TokenRoute(1, 2, KEEP_6[:1])],
    "keeping nothing": [TokenRoute(1, 2, KEEP_6[:, :0])],
    "without a batch axis": [TokenRoute(1, 2, KEEP_6[0])],
}


@pytest.mark.parametrize("routes", BAD_ROUTES.values(), ids=BAD_ROUTES.keys())
def test_routes_that_cannot_be_run_are_refused(toy: Any, routes: list[TokenRoute]) -> None:
    with pytest.raises(ValueError, match="token route"):
        drive(toy, StepContext(router=fixed(*routes)))


def test_a_block_that_changes_the_dtype_may_be_routed(toy: Any) -> None:
    toy.net.float()
    toy.inputs = tuple(x.float() for x in toy.inputs)
    plain = toy.stack.block
    toy.stack.block = lambda block, stream: replace(stream, tokens=plain(block, stream).tokens.bfloat16())
    context = StepContext(router=fixed(TokenRoute(0, 1, KEEP_6)), skip=frozenset({1, 2, 3, 4}))
    assert run_stack(toy.stack, toy.stack.embed(*toy.inputs), context).tokens.dtype == torch.bfloat16


def test_a_checkpointed_block_holds_its_input_through_autograd_alone(toy: Any) -> None:
    """Whoever offloads saved tensors gets the memory: no closure pins a block's input until backward."""
    inputs: list[weakref.ref[Tensor]] = []
    plain = toy.stack.block
    toy.stack.block = lambda block, stream: (inputs.append(weakref.ref(stream.tokens)), plain(block, stream))[1]
    with saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        output = drive(toy, StepContext(checkpointing=True))
    assert len(inputs) == 5
    assert all(tensor() is None for tensor in inputs[1:])
    output.sum().backward()
