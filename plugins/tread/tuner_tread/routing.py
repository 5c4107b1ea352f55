"""Choosing the tokens that a route keeps, by sample, route and step: a function of the seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.blocks import RouteRequest, TokenRoute, TokenSelector
from tuner.data.transfer import sent
from tuner.run import Run
from tuner_tread.ranges import BlockRange, check_clip, keep_count


def draw_routes(
    run: Run, request: RouteRequest, ranges: Sequence[BlockRange], select: TokenSelector, share: float = 1.0
) -> list[TokenRoute]:
    """The routes of one training forward, their tokens chosen by ``select``; one that keeps every token is left out.

    Forced tokens are kept whatever their scores.

    Arguments
        share: of each range's ratio, what counts at this step (see :func:`tuner_tread.schedule.share_at`).

    Raises ConfigError where a route would keep no token of a clip as short as this one.
    """
    tokens = request.tokens.shape[1]
    routes = []
    for index, blocks in enumerate(ranges):
        keep = keep_count(tokens, blocks.ratio * share, request.keep_at_least)
        if keep < 1:
            check_clip(ranges, tokens, "a clip")
        if keep < tokens:
            scores = select(run, request, f"tread.{index}")
            if request.forced is not None:
                scores = scores.masked_fill(request.forced, float("-inf"))
            routes.append(TokenRoute(blocks.start, blocks.stop, lowest(scores, keep)))
    return routes


def skipped(routes: Sequence[TokenRoute], request: RouteRequest) -> float:
    """Share of the passes of a token through a block that the routes of one forward leave out, in [0, 1)."""
    tokens = request.tokens.shape[1]
    left_out = sum((route.stop - route.start) * (tokens - route.keep.shape[1]) for route in routes)
    return left_out / (request.blocks * tokens)


def draw_scores(run: Run, request: RouteRequest, purpose: str) -> Tensor:
    """(B, S) float32 on the tokens' device, uniform in [0, 1).

    Drawn on the CPU, so that they do not depend on the device, and always in float32: in bfloat16 the
    numbers tie at the cut. Moved from pinned memory, so that the host does not wait for the device.
    """
    _, size, _ = request.tokens.shape
    scores = torch.stack([torch.rand(size, generator=run.rng(purpose, position)) for position in request.positions])
    return sent(scores, request.tokens.device)


def lowest(scores: Tensor, keep: int) -> Tensor:
    """(B, K): indices of the ``keep`` lowest scores of each row, ascending; of equal scores the first."""
    return scores.argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values
