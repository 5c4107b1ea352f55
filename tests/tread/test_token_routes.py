"""The tokens that TREAD keeps: how many, which, drawn from what; and what it does to a network."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tuner.blocks import BlockStack, RouteRequest, StepContext, Stream, TokenRoute, install, run_stack
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.testing.toy.describe import ToyDimensions
from tuner.testing.toy.networks import ToyTransformer
from tuner.testing.toy.stack import ToyStack
from tuner_tread import RouteSettings, TreadConfig, TreadPlugin, TreadSettings, uniform
from tuner_tread.ranges import BlockRange, keep_count, remaining_share, resolve
from tuner_tread.routing import draw_routes, lowest

GOLDEN = Path(__file__).parent / "golden"
HALF = (BlockRange(1, 3, 0.5),)


def run_at(step: int = 0, seed: int = 42) -> Run:
    return Run(CoreConfig(seed=seed), {}, step=step, token_selectors={"uniform": uniform})


def request(size: int, positions: Sequence[int] = (0, 1), **others: Any) -> RouteRequest:
    values = {"blocks": 4, "tokens": torch.zeros(len(positions), size, 2), "grid": (size,), "forced": None}
    return RouteRequest(**{**values, "keep_at_least": 0, "positions": tuple(positions), **others})


def kept(run: Run, asked: RouteRequest, ranges: Sequence[BlockRange] = HALF) -> Tensor:
    (route,) = draw_routes(run, asked, ranges, uniform)
    return route.keep


@pytest.mark.parametrize("case", json.loads((GOLDEN / "tread_keep_counts.json").read_text()), ids=str)
def test_keep_counts_are_the_reference_figures(case: dict[str, Any]) -> None:
    assert keep_count(case["S"], case["ratio"]) == case["keep"]


@pytest.mark.parametrize(("ratio", "keep"), [(0.1, 29484), (0.25, 24570), (0.35, 21294), (0.5, 16380)])
def test_keep_counts_at_81_frames_of_832_by_480(ratio: float, keep: int) -> None:
    assert kept(run_at(), request(32760), (BlockRange(1, 3, ratio),)).shape == (2, keep)


def test_a_route_and_back_is_the_reference_round_trip() -> None:
    golden = json.loads((GOLDEN / "tread_roundtrip.json").read_text())
    seen: list[Tensor] = []

    class Scaling(BlockStack):
        def embed(self) -> Stream:
            return Stream(torch.arange(24.0).view(2, 6, 2))

        def block(self, block: nn.Module, stream: Stream) -> Stream:
            seen.append(stream.tokens)
            return replace(stream, tokens=stream.tokens * golden["scale_kept_by"])

        def unembed(self, stream: Stream) -> Tensor:
            return stream.tokens

    stack = Scaling(nn.Identity(), [nn.Identity()])
    route = TokenRoute(0, 1, torch.tensor(golden["ids_keep"]))
    output = stack.forward(lambda stream: run_stack(stack, stream, StepContext(router=lambda _: [route])))
    assert seen[0].tolist() == golden["start"]
    assert output.tolist() == golden["end"]
    assert keep_count(6, golden["ratio"]) == route.keep.shape[1]


def test_kept_indices_are_sorted_and_distinct() -> None:
    keep = kept(run_at(), request(101, range(3)))
    assert keep.shape == (3, 51)
    assert (keep.diff(dim=1) > 0).all()
    assert keep.min() >= 0
    assert keep.max() < 101


def test_sample_route_step_and_seed_each_draw_their_own() -> None:
    ranges = (BlockRange(0, 1, 0.5), BlockRange(2, 3, 0.5))
    draws = [
        row.tolist()
        for run in (run_at(), run_at(step=1), run_at(seed=43))
        for route in draw_routes(run, request(64, (0, 1)), ranges, uniform)
        for row in route.keep
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws) == 12


def test_a_sample_draws_the_same_wherever_it_is_computed() -> None:
    """Two processes of one sample and one of two draw alike, whatever torch's global generator did before."""
    together = kept(run_at(step=7), request(64, (4, 5)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for row, position in enumerate((4, 5)):
        assert torch.equal(kept(run_at(step=7), request(64, (position,)))[0], together[row])
    assert torch.equal(torch.get_rng_state(), before)
    in_bfloat16 = request(64, (4, 5), tokens=torch.zeros(2, 64, 2, dtype=torch.bfloat16))
    assert torch.equal(kept(run_at(step=7), in_bfloat16), together)


def test_every_token_is_kept_equally_often() -> None:
    draws, tokens = 2000, 20
    counts = torch.zeros(tokens)
    for step in range(draws // 4):
        for row in kept(run_at(step), request(tokens, range(4)), (BlockRange(0, 1, 0.3),)):
            counts[row] += 1
    expected = draws * 0.7
    assert counts.sum() == draws * 14
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected * 0.3)


def test_forced_tokens_are_always_kept() -> None:
    forced = torch.zeros(2, 40, dtype=torch.bool)
    forced[0, :9] = forced[1, 30:33] = True
    for step in range(20):
        keep = kept(run_at(step), request(40, forced=forced, keep_at_least=9), (BlockRange(0, 1, 0.8),))
        assert keep.shape == (2, 9)
        assert keep[0].tolist() == list(range(9))
        assert {30, 31, 32} <= set(keep[1].tolist())
    assert kept(run_at(), request(40, forced=forced, keep_at_least=9)).shape == (2, 20)


def test_forcing_tokens_does_not_change_the_draw_of_the_others() -> None:
    forced = torch.zeros(1, 40, dtype=torch.bool)
    free = kept(run_at(), request(40, (0,)))
    forced[0, free[0, :5]] = True
    assert torch.equal(kept(run_at(), request(40, (0,), forced=forced, keep_at_least=5)), free)


def test_routes_that_keep_everything_are_left_out() -> None:
    ranges = (BlockRange(0, 1, 0.0), BlockRange(1, 2, 0.01), BlockRange(2, 3, 0.5))
    assert [route.start for route in draw_routes(run_at(), request(12), ranges, uniform)] == [2]
    assert not draw_routes(run_at(), request(12, keep_at_least=12), ranges, uniform)


def test_a_route_that_keeps_nothing_is_an_error_with_its_numbers() -> None:
    with pytest.raises(ConfigError, match=r"routes\[1\]: selection_ratio 0.9 keeps none of the 2 tokens"):
        draw_routes(run_at(), request(2), (BlockRange(0, 1, 0.4), BlockRange(1, 2, 0.9)), uniform)


def test_of_equal_scores_the_first_is_kept() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.5, 0.25, 0.5, 0.75]])
    assert lowest(scores, 3).tolist() == [[0, 1, 3]]
    assert lowest(scores, 4).tolist() == [[0, 1, 2, 3]]


# A network through the plugin


def network() -> tuple[ToyTransformer, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    net = ToyTransformer(ToyDimensions(blocks=6)).double()
    latents = torch.randn(2, 12, 3, 8, 8).double()
    return net, (latents, torch.tensor([100.0, 700.0]).double(), torch.randn(2, 8, 16).double())


def plugin(*routes: tuple[float, int, int]) -> TreadPlugin:
    written = tuple(
        RouteSettings(selection_ratio=ratio, start_layer_idx=start, end_layer_idx=end) for ratio, start, end in routes
    )
    return TreadPlugin("tread", TreadConfig(tread_config=TreadSettings(routes=written)))


def context(tread: TreadPlugin, run: Run, **others: Any) -> StepContext:
    return StepContext(
        router=lambda asked: tread.route_tokens(run=run, request=asked) or (), positions=(0, 1), **others
    )


@pytest.fixture
def waves_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy family computes its sines in float32; these tests compare in float64."""
    from tuner.testing.toy import networks

    plain = networks.waves
    monkeypatch.setattr(networks, "waves", lambda values, width: plain(values, width).double())


@pytest.mark.usefixtures("waves_in_double")
class TestNetwork:
    """Routes in a network of another family, through the plugin's own hook."""

    def test_dropped_tokens_skip_exactly_the_named_blocks(self) -> None:
        net, inputs = network()
        tread, seen = plugin((0.5, 1, 2), (0.25, 3, -2)), []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
        install(net, ToyStack(net)).context = context(tread, run_at())
        net(*inputs)
        assert seen == [48, 24, 24, 36, 36, 48]
        seen.clear()
        net.eval()
        net(*inputs)
        assert seen == [48] * 6

    def test_checkpointing_recomputes_the_same_tokens(self) -> None:
        net, inputs = network()
        trampoline, run = install(net, ToyStack(net)), run_at()
        gradients = []
        for checkpointing in (False, True):
            trampoline.context = context(plugin((0.5, 1, 4)), run, checkpointing=checkpointing)
            run.step = 3
            loss = net(*inputs).square().mean()
            run.step = 4
            loss.backward()
            gradients.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
            net.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_the_work_falls_to_the_predicted_share(self) -> None:
        net, inputs = network()
        tread = plugin((0.5, 1, 2), (0.25, 3, -2))

        def flops(router: bool) -> int:
            install(net, ToyStack(net)).context = context(tread, run_at()) if router else StepContext()
            with FlopCounterMode(display=False) as counter:
                net(*inputs)
            # Per-token work: what one token costs in a block's feed-forward.
            return sum(
                sum(counts.values())
                for name, counts in counter.get_flop_counts().items()
                if name.endswith(".feed_forward")
            )

        settings = tread.config.tread_config
        assert settings is not None
        share, _ = remaining_share(resolve(settings, 6), 6)
        assert flops(True) / flops(False) == pytest.approx(share, abs=1e-12)


def test_nothing_waits_for_the_device() -> None:
    """On the meta device every read of a value fails: choosing, gathering and scattering read none."""
    torch.manual_seed(0)
    net = ToyTransformer(ToyDimensions(blocks=6)).to("meta")
    install(net, ToyStack(net)).context = context(plugin((0.5, 1, 4)), run_at(), checkpointing=True)
    inputs = (torch.empty(2, 12, 3, 8, 8), torch.empty(2), torch.empty(2, 8, 16))
    assert net(*(each.to("meta") for each in inputs)).shape == (2, 12, 3, 8, 8)
    forced = torch.empty(2, 48, dtype=torch.bool, device="meta")
    asked = request(48, tokens=torch.empty(2, 48, 4, device="meta"), forced=forced, keep_at_least=3)
    assert kept(run_at(), asked).shape == (2, 24)


def test_another_selector_decides_which_tokens_stay_and_forced_ones_stay_all_the_same() -> None:
    def first(run: Run, asked: RouteRequest, purpose: str) -> Tensor:
        return torch.arange(asked.tokens.shape[1]).float().expand(asked.tokens.shape[:2])

    run = run_at()
    run.token_selectors = {"uniform": uniform, "first": first}
    config = TreadConfig(
        tread_config=TreadSettings(routes=(RouteSettings(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2),)),
        tread_selector="first",
    )
    tread = TreadPlugin("tread", config)
    (route,) = tread.route_tokens(run=run, request=request(8))
    assert route.keep.tolist() == [[0, 1, 2, 3]] * 2
    forced = torch.zeros(2, 8, dtype=torch.bool)
    forced[1, 7] = True
    (route,) = tread.route_tokens(run=run, request=request(8, forced=forced))
    assert route.keep.tolist() == [[0, 1, 2, 3], [0, 1, 2, 7]]
