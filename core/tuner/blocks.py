"""The block stack: features for every model family at once.

A family says how its network embeds, runs one block and unembeds. The driver here runs the blocks and
is the one place that knows token routing, activation checkpointing, layer skipping and block
residency. It is pure: everything is an argument, so that the recomputation of a checkpointed block
sees exactly what its forward saw, whatever happened in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tuner.checkpointing import Checkpointing

if TYPE_CHECKING:
    from tuner.run import Run


@dataclass(frozen=True)
class Stream:
    """All that blocks read. Only ``tokens`` is transformed; the rest is carried along.

    B is the batch, S the tokens of one sample, D the width of the network.
    """

    tokens: Tensor
    """(B, S, D)"""
    per_token: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    """name -> (tensor, its token axis): rotary cos and sin, per-token modulation; batch axis 0 may be 1"""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """whatever has no token axis: text, global modulation, masks"""
    grid: tuple[int, ...] = ()
    """(frames, height, width) in tokens"""
    forced: Tensor | None = None
    """(B, S) bool: tokens that no route may drop"""

    def gather_companions(self, keep: Tensor) -> Stream:
        """The stream with all that accompanies a token restricted to the indices ``keep`` (B, K); ``tokens`` stay."""
        return replace(
            self,
            per_token={name: (_take(tensor, axis, keep), axis) for name, (tensor, axis) in self.per_token.items()},
            forced=None if self.forced is None else self.forced.gather(1, keep),
        )


def _take(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    """``tensor`` at the indices ``keep`` (B, K) along ``axis``, its batch axis broadcast from 1 where needed."""
    batch, count = keep.shape
    index = keep.reshape(batch, *[1] * (axis - 1), count, *[1] * (tensor.ndim - axis - 1))
    # Not take_along_dim: it writes the index out, eight bytes for every element.
    shape = (batch, *tensor.shape[1:axis], count, *tensor.shape[axis + 1 :])
    return tensor.expand(batch, *tensor.shape[1:]).gather(axis, index.expand(shape))


@dataclass(frozen=True)
class TokenRoute:
    """Blocks ``start`` (inclusive) to ``stop`` (exclusive) see only the tokens ``keep`` (B, K), sorted."""

    start: int
    stop: int
    keep: Tensor


@dataclass(frozen=True)
class RouteRequest:
    """What a token router is asked with, once per training forward."""

    blocks: int
    tokens: Tensor
    """(B, S, D), detached"""
    grid: tuple[int, ...]
    forced: Tensor | None
    keep_at_least: int
    """The largest number of forced tokens in the global micro-batch: no route may keep fewer."""
    positions: tuple[int, ...]
    """Position of each sample in the global batch, for the counter-based generators."""


class TokenSelector(Protocol):
    """One way to choose the tokens that a route keeps (see the hook ``token_selectors``)."""

    def __call__(self, run: Run, request: RouteRequest, purpose: str) -> Tensor:
        """Scores (B, S), float32 on the tokens' device: the lowest are kept."""


class Residency(Protocol):
    """Who moves a block's weights. The driver calls it around every block of every forward."""

    streamed: Set[int]
    """``id`` of every tensor that it moves: nobody else does."""

    def begin(self, differentiated: bool) -> None:
        """A forward starts; ``differentiated`` says whether a backward will follow."""

    def enter(self, index: int) -> None:
        """Block ``index`` is about to compute (in forward or recomputation): its weights must be on the device."""

    def leave(self, index: int) -> None:
        """Block ``index`` has computed its forward and nothing of it is needed until its recomputation, if any."""

    def backward_done(self, index: int) -> None:
        """The gradient of block ``index``'s input is known: its weights are no longer needed."""

    def end(self, differentiated: bool) -> None:
        """The forward is over (``differentiated`` False), or its backward is (True): release what is held."""


class SequenceParallel(Protocol):
    """Processes that run the blocks over a part of every sample's tokens each."""

    def split(self, stream: Stream) -> Stream:
        """The part of the stream that this process runs."""

    def gather(self, tokens: Tensor) -> Tensor:
        """The tokens (B, S, D) of all processes, from those of this one."""

    def kernel(self, name: Any) -> Any:
        """The attention of the dispatcher that runs its kernel ``name`` over the tokens of all processes."""


FULL = Checkpointing()


@dataclass(frozen=True)
class StepContext:
    """What one forward of a network is run with. Read once at its start, then passed on as arguments."""

    router: Callable[[RouteRequest], Sequence[TokenRoute]] | None = None
    checkpointing: Checkpointing | bool | None = None
    """How activations are kept for backward: True recomputes every block, False and None keep everything."""
    skip: frozenset[int] = frozenset()
    residency: Residency | None = None
    sequence: SequenceParallel | None = None
    keep_at_least: int = 0
    positions: tuple[int, ...] = ()
    forced: Tensor | None = None
    """(B, S) bool: tokens that no route may drop, beside those that the family forces"""

    def checkpointing_of(self, index: int) -> Checkpointing | None:
        """How block ``index`` is checkpointed; None keeps everything."""
        policy = FULL if self.checkpointing is True else self.checkpointing or None
        return policy if policy is not None and index % policy.interval == 0 else None


class BlockStack(ABC):
    """A family's view of one network: embed, the blocks, unembed.

    ``embed`` takes the network's own forward arguments and ``unembed`` gives its own return value, so
    that whoever calls the network (a diffusers pipeline, a wrapper of FSDP) notices nothing.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.module = module
        self.blocks = blocks

    @abstractmethod
    def embed(self, *args: Any, **kwargs: Any) -> Stream:
        """The stream that enters block 0, from the arguments of the network's forward."""

    @abstractmethod
    def block(self, block: nn.Module, stream: Stream) -> Stream:
        """The stream after ``block``. Must only replace ``tokens`` (and, in joint models, ``shared``)."""

    @abstractmethod
    def unembed(self, stream: Stream) -> Any:
        """The network's return value from the stream after the last block."""

    def forward(self, drive: Callable[[Stream], Stream], *args: Any, **kwargs: Any) -> Any:
        """The whole forward. A family overrides it to wrap the call (LoRA scale arguments and the like)."""
        return self.unembed(drive(self.embed(*args, **kwargs)))


class Trampoline:
    """Stands in for a network's forward, on the instance, and can be switched off.

    It is a bound method set once, never deleted and never a closure: after ``copy.deepcopy`` the copy
    runs the copy's weights, and the class named in saved files stays the network's own.
    """

    def __init__(self, stack: BlockStack) -> None:
        self.stack = stack
        self.context = StepContext()
        self.enabled = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Trampoline:
        """The copy drives the copied stack, without this step's context: router and residency serve the original."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.stack, copied.context, copied.enabled = deepcopy(self.stack, memo), StepContext(), self.enabled
        return copied


def install(module: nn.Module, stack: BlockStack) -> Trampoline:
    """Make ``module(...)`` run through the block driver. Returns the trampoline that holds its context."""
    trampoline = Trampoline(stack)
    # Past nn.Module.__setattr__ bookkeeping on purpose: plain attributes of the instance.
    object.__setattr__(module, "_tuner_trampoline", trampoline)
    object.__setattr__(module, "forward", MethodType(_driven_forward, module))
    return trampoline


def _driven_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    trampoline: Trampoline = self._tuner_trampoline  # type: ignore[assignment]
    if not trampoline.enabled:
        return type(self).forward(self, *args, **kwargs)
    stack, context, training = trampoline.stack, trampoline.context, self.training

    def drive(stream: Stream) -> Stream:
        if context.sequence is None:
            return run_stack(stack, stream, context, training=training)
        part = run_stack(stack, context.sequence.split(stream), context, training=training)
        return replace(stream, tokens=context.sequence.gather(part.tokens), shared=part.shared)

    return stack.forward(drive, *args, **kwargs)


def run_stack(stack: BlockStack, stream: Stream, context: StepContext, *, training: bool = True) -> Stream:
    """Run all blocks of ``stack`` over ``stream`` as ``context`` says.

    Routes apply in training with gradients only. A route over all tokens (K = S) takes the unrouted
    path. Companions are gathered once per block, not once per route: the gradients of what made them
    then add up in the same order as without a route, bit for bit.
    """
    differentiated = torch.is_grad_enabled()
    routes = _routes(stack, stream, context) if training and differentiated else {}
    residency = context.residency
    if residency is not None:
        residency.begin(differentiated)
    full: Stream | None = None
    route: TokenRoute | None = None
    for index in range(len(stack.blocks)):
        if route is None and index in routes:
            route, full = routes[index], stream
            stream = replace(stream, tokens=_take(stream.tokens, 1, route.keep))
        if index not in context.skip:
            stream = _run_block(stack, index, stream, None if route is None else route.keep, context, differentiated)
        if route is not None and full is not None and index + 1 == route.stop:
            target = route.keep.unsqueeze(-1).expand(stream.tokens.shape)
            dropped = full.tokens.to(stream.tokens.dtype)  # a family's first block may change the dtype
            stream = replace(stream, tokens=dropped.scatter(1, target, stream.tokens))
            route = full = None
    if residency is not None:
        _announce_end(stream.tokens, residency)
    return stream


def _watch_backward(tokens: Tensor, index: int, residency: Residency) -> Tensor:
    """``tokens`` as a view whose gradient, once known, says that the block they enter is done with backward."""
    if not tokens.requires_grad:
        return tokens
    tokens = tokens.view_as(tokens)
    tokens.register_hook(lambda _: residency.backward_done(index))
    return tokens


def _announce_end(tokens: Tensor, residency: Residency) -> None:
    """Tell ``residency`` when the forward is over, or, where a backward follows, when that backward is.

    With LoRA on a frozen base the first block's input needs no gradient, so its *backward done* never
    comes: a callback queued in the autograd engine marks the end of the whole backward instead.
    """
    if not tokens.requires_grad:
        residency.end(False)
        return

    def at_backward_start(_: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: residency.end(True))

    tokens.register_hook(at_backward_start)


def _routes(stack: BlockStack, stream: Stream, context: StepContext) -> dict[int, TokenRoute]:
    """The routes of this forward by their first block, without those that keep every token."""
    if context.router is None:
        return {}
    request = RouteRequest(
        blocks=len(stack.blocks),
        tokens=stream.tokens.detach(),
        grid=stream.grid,
        forced=_either(stream.forced, context.forced),
        keep_at_least=context.keep_at_least,
        positions=context.positions or tuple(range(stream.tokens.shape[0])),
    )
    routes = sorted(context.router(request), key=lambda route: route.start)
    _check_routes(routes, request)
    return {route.start: route for route in routes if route.keep.shape[1] < stream.tokens.shape[1]}


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What is forced by the family, by the context, or by both."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def _check_routes(routes: Sequence[TokenRoute], request: RouteRequest) -> None:
    """Raise ValueError for routes that the driver would run wrongly without a word; values of ``keep`` are not read."""
    batch, size, _ = request.tokens.shape
    free = 0
    for route in routes:
        if not free <= route.start < route.stop <= request.blocks:
            raise ValueError(
                f"token route over blocks {route.start} to {route.stop} (exclusive) is empty, overlaps the route "
                f"before it, or leaves the {request.blocks} blocks of the network"
            )
        if route.keep.ndim != 2 or route.keep.shape[0] != batch or not 1 <= route.keep.shape[1] <= size:
            raise ValueError(
                f"token route from block {route.start} keeps indices of shape {tuple(route.keep.shape)}; "
                f"the batch needs ({batch}, K) with K from 1 to {size}"
            )
        free = route.stop


def _run_block(
    stack: BlockStack, index: int, stream: Stream, keep: Tensor | None, context: StepContext, differentiated: bool
) -> Stream:
    """One block, checkpointed and with its weights brought in, as the context says."""
    residency = context.residency
    policy = context.checkpointing_of(index) if differentiated else None
    computing, again = (nullcontext(), nullcontext()) if policy is None else policy.contexts()
    # Without tokens: the closure lives until backward and would pin an input that autograd was told to offload.
    carried = replace(stream, tokens=stream.tokens.new_empty(0))

    def compute(tokens: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        # Residency enters *inside* the checkpoint, so that recomputation fetches the weights again, and outside its
        # contexts: which copies that takes differs from one computation to the next.
        nonlocal computing
        if residency is not None:
            residency.enter(index)
        routed = replace(carried, tokens=tokens)
        if keep is not None:
            routed = routed.gather_companions(keep)
        with computing:
            out = stack.block(stack.blocks[index], routed)
        if residency is not None and computing is not again and (policy is not None or not differentiated):
            residency.leave(index)
        computing = again
        return out.tokens, out.shared

    tokens = stream.tokens
    if residency is not None and differentiated:
        tokens = _watch_backward(tokens, index, residency)
    tokens, shared = compute(tokens) if policy is None else policy.run(compute, tokens)
    return replace(stream, tokens=tokens, shared=shared)
