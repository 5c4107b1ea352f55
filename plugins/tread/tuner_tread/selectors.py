"""Choosing tokens by what they show: draws without replacement, each token with a weight of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tuner.blocks import RouteRequest
from tuner.errors import ConfigError
from tuner.run import Run
from tuner_tread.routing import draw_scores

FLOOR = 0.1
"""What every token has of the mean weight, whatever it shows, so that none is dropped for good."""
CHUNK = 2048
"""Tokens looked at together: float32 copies of all of a long clip would be as large as an activation."""


def weighted(run: Run, request: RouteRequest, purpose: str, importance: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Scores (B, S) float32 whose lowest K are a draw of K tokens without replacement, by weight.

    The keys are Exp(1) / weight (Efraimidis and Spirakis, 2006), made from the numbers that ``uniform`` draws; with
    equal weights they have the order of those. Each sample is weighed by itself, so that the others of its batch
    cannot change a bit of it. Nothing waits for the device.

    Arguments
        importance: of the tokens (S, D) of one clip and their number of frames, (S,) float32, not negative.
    """
    exponential = -torch.log1p(-draw_scores(run, request, purpose))
    frames = request.grid[0] if request.grid else 1
    weights = torch.stack([weights_of(importance(tokens, frames)) for tokens in request.tokens])
    return exponential / weights


def weights_of(importance: Tensor) -> Tensor:
    """(S,) of mean 1 from an importance (S,): ``0.1 + 0.9 * importance / its mean``; alike where all are 0."""
    tiny = torch.finfo(importance.dtype).tiny
    return FLOOR + (1 - FLOOR) * importance / importance.mean().clamp_min(tiny)


def motion(tokens: Tensor, frames: int) -> Tensor:
    """(S,): mean over D of the absolute difference of each token (S, D) to the one at its place a frame earlier.

    The first frame has the mean of the others at the same place. A single frame has no motion: all weigh alike.

    Raises ConfigError where the tokens are not so many frames of one size.
    """
    size, rest = divmod(len(tokens), frames)
    if rest:
        raise ConfigError(
            f"tread_selector 'motion' needs frames of one size; {len(tokens)} tokens are not {frames} such frames",
            where="tread_selector",
            remedy="use uniform or salience with this model",
        )
    if frames == 1:
        return tokens.new_ones(size, dtype=torch.float32)
    clip = tokens.unflatten(0, (frames, size))
    moved = torch.stack([distance(clip[index], clip[index - 1]) for index in range(1, frames)])
    return torch.cat([moved.mean(0, keepdim=True), moved]).flatten()


def salience(tokens: Tensor, frames: int) -> Tensor:
    """(S,): mean over D of the absolute difference of each token (S, D) to the mean token of its clip."""
    return distance(tokens, tokens.mean(0, keepdim=True, dtype=torch.float32))


def distance(tokens: Tensor, others: Tensor) -> Tensor:
    """(N,) float32: mean over D of |tokens - others|, for tokens (N, D) and others (N, D) or (1, D)."""
    parts = zip(tokens.split(CHUNK), others.expand_as(tokens).split(CHUNK), strict=True)
    return torch.cat([(one.float() - other.float()).abs().mean(-1) for one, other in parts])
