"""A Wan block that keeps less for its backward: the same operations, those on single tokens in pieces.

Diffusers' ``WanTransformerBlock`` keeps the inputs of its six norms in float32, twice what they came in, and computes
norms, modulation and gates on float32 copies of all tokens. Here a norm keeps what it was given, and is computed again
in backward, piece by piece. Attention and matrices see what they always see, and none of them is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuner.model import Network, Stage, Transform
from tuner_wan.costs import PIECE_TOKENS

SELF_ATTENTION, FEED_FORWARD = 0, 3
"""First of three rows of the modulation: shift, scale, gate."""


def transform() -> Transform:
    """The transform that makes every block of a network keep less."""

    def apply(network: Network) -> None:
        for block in network.stack.blocks:
            install(block)

    return Transform(Stage.REWRITE, "Wan blocks that keep less", frozenset({"block_forward"}), apply)


def install(block: Any) -> None:
    """Make ``block``, a ``WanTransformerBlock``, keep less. Bound methods: classes, hooks and names stay."""
    object.__setattr__(block, "forward", MethodType(_block, block))
    for attention in (block.attn1, block.attn2):
        norms = (attention.norm_q, attention.norm_k)
        if any("forward" in vars(norm) for norm in norms):
            continue  # an adapter has taken one
        for norm in norms:
            object.__setattr__(norm, "_tuner_rotary", ())
            object.__setattr__(norm, "forward", MethodType(_norm, norm))


def _block(self: Any, tokens: Tensor, text: Tensor, modulation: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The class's forward: tokens (B, S, D), text (B, L, D), modulation (B, 6, D) or, for each token, (B, S, 6, D)."""
    if not _is_large(tokens):
        return type(self).forward(self, tokens, text, modulation, rotary)  # type: ignore[no-any-return]
    modulated = _Modulated(self.scale_shift_table, modulation)
    with _turning(self.attn1, rotary) as left:
        attended = self.attn1(modulated.norm(self.norm1, tokens, SELF_ATTENTION), None, None, left)
    tokens = modulated.add(tokens, attended, SELF_ATTENTION)
    del attended
    normed = _in_pieces(lambda piece: self.norm2(piece.float()).type_as(piece), tokens, whole=_is_trained(self.norm2))
    attended = self.attn2(normed, text, None, None)
    del normed
    tokens = tokens + attended
    del attended
    fed = self.ffn(modulated.norm(self.norm3, tokens, FEED_FORWARD))
    return modulated.add(tokens, fed, FEED_FORWARD)


@contextmanager
def _turning(attention: Any, rotary: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor] | None]:
    """While entered, the norms of queries and keys turn what they give by ``rotary``; gives what is left to turn by."""
    norms = [norm for norm in (attention.norm_q, attention.norm_k) if "_tuner_rotary" in vars(norm)]
    for norm in norms:
        object.__setattr__(norm, "_tuner_rotary", rotary)
    try:
        yield None if norms else rotary
    finally:
        for norm in norms:
            object.__setattr__(norm, "_tuner_rotary", ())


def _norm(self: Any, tokens: Tensor) -> Tensor:
    """The class's forward, of queries or keys (B, S, D), in the type that attention computes in."""

    def compute(piece: Tensor, *rotary: Tensor) -> Tensor:
        normed: Tensor = type(self).forward(self, piece)
        if rotary:
            normed = _turned(normed.unflatten(2, (-1, rotary[0].shape[-1])), *rotary).flatten(2)
        kind = normed.device.type
        return normed.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else normed

    if not _is_large(tokens):
        return type(self).forward(self, tokens)  # type: ignore[no-any-return]
    return _in_pieces(compute, tokens, *self._tuner_rotary, whole=_is_trained(self))


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rows`` (B, S, heads, E) turned pairwise by the tables (B or 1, S, 1, E), as diffusers' processor does."""
    left, right = rows.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.empty_like(rows)
    turned[..., 0::2] = left * cos - right * sin
    turned[..., 1::2] = left * sin + right * cos
    return turned.type_as(rows)


@dataclass(frozen=True)
class _Modulated:
    """A block's modulation, the same for all tokens or each token's own. Its rows are made where they are needed."""

    table: Tensor
    """(1, 6, D)"""
    modulation: Tensor
    """(B, 6, D) or (B, S, 6, D)"""

    def norm(self, norm: nn.Module, tokens: Tensor, first: int) -> Tensor:
        """``norm`` of ``tokens`` (B, S, D), scaled and shifted."""

        def compute(piece: Tensor, *times: Tensor) -> Tensor:
            normed: Tensor = norm(piece.float())
            return (normed * (1 + self._row(first + 1, *times)) + self._row(first, *times)).type_as(piece)

        return _in_pieces(compute, tokens, *self._times(), whole=self._is_whole(norm))

    def add(self, tokens: Tensor, change: Tensor, first: int) -> Tensor:
        """``tokens`` and, through its gate, ``change``: both (B, S, D)."""

        def compute(piece: Tensor, added: Tensor, *times: Tensor) -> Tensor:
            return (piece.float() + added.float() * self._row(first + 2, *times)).type_as(piece)

        # A product keeps its gate. Each token's own is larger than what is added: then that is kept in its place.
        times = self._times()
        return _in_pieces(compute, tokens, change, *times, whole=self._is_whole(), again=bool(times))

    def _row(self, row: int, *times: Tensor) -> Tensor:
        """(B, 1, D), or (B, S', D) of the pieces' own ``times`` (B, S', 6, D)."""
        own = times[0][:, :, row] if times else self.modulation[:, row, None]
        return self.table[:, row] + own.float()

    def _times(self) -> tuple[Tensor, ...]:
        return (self.modulation,) if self.modulation.ndim > self.table.ndim else ()

    def _is_whole(self, *modules: nn.Module) -> bool:
        return self.table.requires_grad or self.modulation.requires_grad or any(map(_is_trained, modules))


def _in_pieces(compute: Callable[..., Tensor], *tokens: Tensor, whole: bool, again: bool = True) -> Tensor:
    """``compute`` of tensors (B, S, ...) in pieces along S, none longer than ``PIECE_TOKENS``.

    Arguments
        whole: in one piece, as where a parameter is trained: its gradient would be summed in another order.
        again: keep what goes in, and compute again in backward.
    """
    count = 1 if whole else -(-tokens[0].shape[1] // PIECE_TOKENS)
    # Not tensor_split: the gradient of each of its pieces is as long as all of them.
    size = -(-tokens[0].shape[1] // count)
    pieces = zip(*(each.split(size, dim=1) for each in tokens), strict=True)
    if again:
        done = [checkpoint(compute, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    else:
        done = [compute(*piece) for piece in pieces]
    return done[0] if count == 1 else torch.cat(done, dim=1)


def _is_large(tokens: Tensor) -> bool:
    return torch.is_grad_enabled() and tokens.shape[1] > PIECE_TOKENS


def _is_trained(module: nn.Module) -> bool:
    return any(each.requires_grad for each in module.parameters())
