"""Routes as users write them, on the blocks of a network. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner_tread import RouteSettings, TreadSettings


@dataclass(frozen=True)
class BlockRange:
    """A route on one network: blocks ``start`` (inclusive) to ``stop`` (exclusive) drop ``ratio`` of the tokens."""

    start: int
    stop: int
    ratio: float


def resolve(settings: TreadSettings, blocks: int, where: str = "tread_config") -> tuple[BlockRange, ...]:
    """The routes on a network of so many blocks; errors name ``where``.

    Raises ConfigError, in the user's own numbers, where an index is no block of the network, a route ends
    before it starts, or starts before the one ahead of it has ended.
    """
    ranges: list[BlockRange] = []
    for index, route in enumerate(settings.routes):
        start = _block(route.start_layer_idx, blocks)
        last = _block(route.end_layer_idx, blocks)
        fault = _fault(route, start, last, blocks) or _overlap(route, start, index, ranges, blocks)
        if fault:
            raise ConfigError(
                f"routes[{index}]: {fault}",
                where=where,
                allowed=f"blocks 0 to {blocks - 1}, or -{blocks} to -1 from the end; routes in their order, disjoint",
            )
        ranges.append(BlockRange(start, last + 1, route.selection_ratio))
    return tuple(ranges)


def keep_count(tokens: int, ratio: float, at_least: int = 0) -> int:
    """K: how many of so many tokens a route keeps that drops ``ratio`` of them (round half to even)."""
    return max(tokens - round(tokens * ratio), at_least)


def check_clip(ranges: Sequence[BlockRange], tokens: int, clip: str) -> None:
    """Raise ConfigError where a route would keep none of the ``tokens`` of a clip, which the error calls ``clip``."""
    for index, route in enumerate(ranges):
        if keep_count(tokens, route.ratio) < 1:
            raise ConfigError(
                f"routes[{index}]: selection_ratio {route.ratio} keeps none of the {tokens} tokens of {clip}",
                where="tread_config",
                remedy="lower selection_ratio, or train on larger or longer clips",
            )


def _block(value: int, blocks: int) -> int:
    """The block that ``value`` names; negative values count from the end."""
    return value + blocks if value < 0 else value


def _fault(route: RouteSettings, start: int, last: int, blocks: int) -> str | None:
    """What is wrong with one route by itself."""
    for key, value, block in (
        ("start_layer_idx", route.start_layer_idx, start),
        ("end_layer_idx", route.end_layer_idx, last),
    ):
        if not 0 <= block < blocks:
            return f"{key} {value} is block {block} of {blocks}"
    if last < start:
        return (
            f"it ends before it starts: start_layer_idx {route.start_layer_idx} is block {start}, "
            f"end_layer_idx {route.end_layer_idx} is block {last} of {blocks}"
        )
    return None


def _overlap(route: RouteSettings, start: int, index: int, before: Sequence[BlockRange], blocks: int) -> str | None:
    """What is wrong with a route beside the one ahead of it."""
    if not before or start >= before[-1].stop:
        return None
    return (
        f"start_layer_idx {route.start_layer_idx} is block {start} of {blocks}, but routes[{index - 1}] "
        f"covers blocks {before[-1].start} to {before[-1].stop - 1}"
    )


def dropped_shares(ranges: Sequence[BlockRange], blocks: int) -> tuple[float, ...]:
    """Share of the tokens that each of so many blocks does not see."""
    routed = {block: each.ratio for each in ranges for block in range(each.start, each.stop)}
    return tuple(routed.get(block, 0.0) for block in range(blocks))


def remaining_share(ranges: Sequence[BlockRange], blocks: int) -> tuple[float, float]:
    """Share of the blocks' work that is left: (per-token work, self-attention), each in (0, 1].

    A block that keeps a share k of the tokens does k of its linear work and k squared of its self-attention.
    """
    linear = sum((route.stop - route.start) * route.ratio for route in ranges)
    quadratic = sum((route.stop - route.start) * (1 - (1 - route.ratio) ** 2) for route in ranges)
    return 1 - linear / blocks, 1 - quadratic / blocks
