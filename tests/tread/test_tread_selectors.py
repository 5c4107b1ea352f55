"""Choosing tokens by what they show: the right odds, the right measure, and the same draw wherever it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner.blocks import RouteRequest, TokenSelector
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner_tread import motion, salience, selectors, uniform
from tuner_tread.ranges import BlockRange
from tuner_tread.routing import draw_routes, lowest

HALF = (BlockRange(1, 3, 0.5),)
BOTH = pytest.mark.parametrize("selector", [motion, salience])


def run_at(step: int = 0, seed: int = 42) -> Run:
    return Run(CoreConfig(seed=seed), {}, step=step)


def request(tokens: Tensor, grid: tuple[int, ...], positions: Sequence[int] | None = None, **more: Any) -> RouteRequest:
    at = tuple(range(len(tokens)) if positions is None else positions)
    return RouteRequest(
        **{"blocks": 4, "tokens": tokens, "grid": grid, "forced": None, "keep_at_least": 0, **more}, positions=at
    )


def clips(count: int = 2, frames: int = 3, size: int = 12, width: int = 6, seed: int = 0) -> Tensor:
    """Tokens (B, frames * size, width) of still noise, over which the places 3, 4 and 5 change from frame to frame."""
    draw = torch.Generator().manual_seed(seed)
    still = torch.randn(count, 1, size, width, generator=draw).expand(-1, frames, -1, -1).clone()
    still[:, :, 3:6] += 2 * torch.randn(count, frames, 3, width, generator=draw)
    return still.flatten(1, 2)


def kept(selector: TokenSelector, run: Run, asked: RouteRequest, ranges: Sequence[BlockRange] = HALF) -> Tensor:
    (route,) = draw_routes(run, asked, ranges, selector)
    return route.keep


# --- the odds ----------------------------------------------------------------------------------------------


def inclusion(weights: Sequence[float], keep: int) -> list[float]:
    """How likely each item is among ``keep`` drawn one after the other, each with its share of the weight left."""
    odds = [0.0] * len(weights)
    for order in permutations(range(len(weights)), keep):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        for item in order:
            odds[item] += probability
    return odds


def test_tokens_are_drawn_without_replacement_by_their_weight() -> None:
    draws, keep = 6000, 2
    importance = torch.tensor([0.0, 1.0, 2.0, 5.0, 0.5])
    run, asked = run_at(), request(torch.zeros(draws, 5, 2), (1, 1, 5))
    scores = selectors.weighted(run, asked, "test", lambda tokens, frames: importance)
    counts = torch.zeros(5).scatter_add_(0, lowest(scores, keep).flatten(), torch.ones(draws * keep))
    expected = inclusion((0.1 + 0.9 * importance / importance.mean()).tolist(), keep)
    for count, odds in zip(counts.tolist(), expected, strict=True):
        assert abs(count - draws * odds) < 5 * math.sqrt(draws * odds * (1 - odds))


def test_every_token_keeps_a_tenth_of_the_mean_weight() -> None:
    weights = selectors.weights_of(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    assert weights.tolist() == pytest.approx([0.1, 0.1, 0.1, 3.7])
    assert weights.mean() == pytest.approx(1)
    assert selectors.weights_of(torch.zeros(4)).unique().numel() == 1


# --- what is measured --------------------------------------------------------------------------------------


def test_motion_is_the_change_from_the_frame_before() -> None:
    tokens = torch.randn(3 * 5, 4, generator=torch.Generator().manual_seed(1))
    clip = tokens.double().numpy().reshape(3, 5, 4)
    expected = np.zeros((3, 5))
    for frame in (1, 2):
        for place in range(5):
            expected[frame, place] = np.mean([abs(clip[frame, place, d] - clip[frame - 1, place, d]) for d in range(4)])
    expected[0] = (expected[1] + expected[2]) / 2
    assert selectors.motion(tokens, 3).numpy() == pytest.approx(expected.flatten(), rel=1e-6)


def test_salience_is_the_distance_to_the_mean_token() -> None:
    tokens = torch.randn(15, 4, generator=torch.Generator().manual_seed(1))
    values = tokens.double().numpy()
    expected = [np.mean(np.abs(value - values.mean(axis=0))) for value in values]
    assert selectors.salience(tokens, 3).numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("measure", [selectors.motion, selectors.salience])
def test_long_clips_are_measured_in_parts_without_a_difference(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = clips(count=1)[0]
    whole = measure(tokens, 3)
    monkeypatch.setattr(selectors, "CHUNK", 5)
    assert torch.equal(measure(tokens, 3), whole)


@BOTH
def test_what_moves_and_stands_out_is_kept_more_often(selector: TokenSelector) -> None:
    asked = request(clips(count=400), (3, 3, 4))
    share = torch.zeros(36).scatter_add_(0, kept(selector, run_at(), asked).flatten(), torch.ones(400 * 18)) / 400
    busy, still = share.view(3, 12)[:, 3:6], share.view(3, 12)[:, 6:]
    assert busy.min() > 0.6
    assert still.min() > 0.1
    assert still.max() < 0.5


# --- where it falls back to uniform ------------------------------------------------------------------------


def test_without_motion_to_see_the_draw_is_the_uniform_one() -> None:
    picture = request(torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(2)), (1, 5, 8))
    assert torch.equal(kept(motion, run_at(), picture), kept(uniform, run_at(), picture))
    still = request(torch.ones(2, 36, 6), (3, 3, 4))
    for selector in (motion, salience):
        assert torch.equal(kept(selector, run_at(), still), kept(uniform, run_at(), still))


def test_a_model_whose_tokens_are_no_frames_is_refused_under_motion() -> None:
    asked = request(torch.zeros(1, 10, 2), (3, 2, 2))
    with pytest.raises(ConfigError, match="10 tokens are not 3 such frames"):
        kept(motion, run_at(), asked)
    assert kept(salience, run_at(), asked).shape == (1, 5)


# --- the same draw wherever it is made ---------------------------------------------------------------------


@BOTH
def test_a_clip_draws_the_same_whatever_is_in_its_batch(selector: TokenSelector) -> None:
    tokens, run = clips(count=3), run_at(step=7)
    together = kept(selector, run, request(tokens, (3, 3, 4), (4, 5, 6)))
    for row in range(3):
        assert torch.equal(kept(selector, run, request(tokens[row : row + 1], (3, 3, 4), (4 + row,)))[0], together[row])
    assert torch.equal(kept(selector, run, request(tokens.flip(0), (3, 3, 4), (6, 5, 4))), together.flip(0))


@BOTH
def test_step_place_route_and_seed_each_draw_their_own(selector: TokenSelector) -> None:
    tokens = clips(count=1, size=64).expand(2, -1, -1)
    ranges = (BlockRange(0, 1, 0.5), BlockRange(2, 3, 0.5))
    draws = [
        tuple(row.tolist())
        for run in (run_at(), run_at(step=1), run_at(seed=43))
        for route in draw_routes(run, request(tokens, (3, 8, 8)), ranges, selector)
        for row in route.keep
    ]
    assert len(set(draws)) == 12


@BOTH
def test_bfloat16_tokens_are_measured_in_float32(selector: TokenSelector) -> None:
    tokens = clips().bfloat16()
    scores = selector(run_at(), request(tokens, (3, 3, 4)), "test")
    assert scores.dtype == torch.float32
    assert torch.equal(scores, selector(run_at(), request(tokens.float(), (3, 3, 4)), "test"))


@BOTH
def test_forced_tokens_are_always_kept(selector: TokenSelector) -> None:
    forced = torch.zeros(2, 36, dtype=torch.bool)
    forced[0, 20:31] = forced[1, :2] = True
    for step in range(10):
        asked = request(clips(), (3, 3, 4), forced=forced, keep_at_least=11)
        keep = kept(selector, run_at(step), asked, (BlockRange(0, 1, 0.9),))
        assert keep.tolist()[0] == list(range(20, 31))
        assert {0, 1} <= set(keep[1].tolist())


@BOTH
def test_nothing_waits_for_the_device(selector: TokenSelector) -> None:
    """On the meta device every read of a value fails."""
    asked = request(torch.empty(2, 36, 6, device="meta"), (3, 3, 4))
    assert kept(selector, run_at(), asked).shape == (2, 18)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", [uniform, motion, salience])
def test_a_gpu_draws_what_the_cpu_draws_and_the_host_does_not_wait(selector: TokenSelector) -> None:
    """Sums are added up in another order there, so the scores are close; nearly all of the kept tokens are the same."""
    tokens, ranges = clips(size=400).bfloat16(), (BlockRange(1, 3, 0.5),)
    here = kept(selector, run_at(), request(tokens, (3, 20, 20)), ranges)
    asked = request(tokens.cuda(), (3, 20, 20))
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = kept(selector, run_at(), asked, ranges)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(here.tolist(), there.cpu().tolist(), strict=True):
        assert len(set(ours) & set(theirs)) >= len(ours) - 2
