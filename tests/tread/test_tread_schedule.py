"""Ramps of the ratio: which share counts when, what users are told, and that a share of 0 is an unrouted step."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tuner.blocks import RouteRequest
from tuner.config.faults import build
from tuner.config.keys import CoreConfig
from tuner.data.report import DataReport
from tuner.data.samples import Bucket, Framing, Prepared, Sample, View
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_tread import TreadConfig, TreadPlugin
from tuner_tread.ranges import keep_count
from tuner_tread.schedule import share_at

HALF = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]}
SPEC = ModelSpec(
    "toy",
    "toy-2",
    "none",
    (NetworkSpec("net", 4, dim=8, heads=2, ffn_dim=16, text_dim=4, text_tokens=4, in_channels=4),),
    LatentGeometry(4, 4, 8),
    16,
    16.0,
    (),
)


def plugin(**keys: Any) -> TreadPlugin:
    return TreadPlugin("tread", build(TreadConfig, keys))


def run_of(tread: TreadPlugin, step: int = 0, total: int = 0) -> Run:
    run = Run(CoreConfig(), {"tread": tread}, explicit=frozenset(tread.config.model_fields_set), step=step)
    run.total_steps, run.token_selectors = total, tread.token_selectors(run=run)
    return run


def data(*buckets: Bucket) -> Prepared:
    samples = tuple(
        Sample(str(bucket), "d", None, "0", ("",), 1, 1, 1, 16.0, bucket, (View(Framing(16, 16, 0, 0)),), None)  # type: ignore[arg-type]
        for bucket in buckets
    )
    return Prepared(samples, {}, None, DataReport(()), None)  # type: ignore[arg-type]


def shares(*arguments: Any, steps: int) -> list[float]:
    schedule, total, warmup = arguments
    return [share_at(schedule, step, total, warmup) for step in range(steps)]


# --- the share at a step ------------------------------------------------------------------------------------


def test_constant_counts_in_full_at_every_step() -> None:
    assert set(shares("constant", 100, None, steps=100)) == {1.0}


def test_linear_grows_evenly_from_nothing_to_all_of_it_and_stays() -> None:
    assert shares("linear", 100, 4, steps=7) == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    ramp = shares("linear", 1000, 320, steps=1000)
    assert ramp[0] == 0
    assert set(ramp[320:]) == {1.0}
    assert all(abs(share - step / 320) <= 1 / 32 for step, share in enumerate(ramp[:320]))


@pytest.mark.parametrize(("total", "warmup"), [(1000, 100), (19, 1), (5, 1), (1, 1)])
def test_without_a_length_the_ramp_is_a_tenth_of_the_run(total: int, warmup: int) -> None:
    assert shares("linear", total, None, steps=total) == shares("linear", total, warmup, steps=total)


def test_cosine_falls_from_all_of_it_to_nothing_at_the_last_step() -> None:
    fall = shares("cosine", 1001, None, steps=1001)
    assert (fall[0], fall[500], fall[-1]) == (1, 0.5, 0)
    assert fall == sorted(fall, reverse=True)
    # Half a cosine: three quarters of the ratio are left at a third of the run, a quarter at two thirds.
    assert (fall[333], fall[667]) == (0.75, 0.25)
    assert shares("cosine", 1, None, steps=1) == [1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_ramp_goes_through_sixteen_levels_however_long_it_is(schedule: str) -> None:
    assert sorted(set(shares(schedule, 5000, 5000, steps=5001))) == [level / 16 for level in range(17)]


# --- through the plugin ----------------------------------------------------------------------------------


def request(size: int = 64) -> RouteRequest:
    return RouteRequest(4, torch.zeros(2, size, 2), (1, 8, size // 8), None, 0, (0, 1))


def kept(tread: TreadPlugin, step: int, total: int) -> list[int]:
    routes = tread.route_tokens(run=run_of(tread, step, total), request=request())
    return [route.keep.shape[1] for route in routes or ()]


def test_the_ratio_of_the_moment_decides_how_many_tokens_are_kept() -> None:
    tread = plugin(tread_config=HALF, tread_ratio_schedule="linear", tread_warmup_steps=8)
    assert [kept(tread, step, 100) for step in (0, 1, 4, 8, 99)] == [[], [60], [48], [32], [32]]
    tread = plugin(tread_config=HALF, tread_ratio_schedule="cosine")
    assert [kept(tread, step, 9) for step in (0, 4, 8)] == [[32], [48], []]
    assert keep_count(64, 0.25) == 48


def test_of_a_step_the_tokens_are_the_same_whatever_came_before() -> None:
    """A resumed run comes to the step with a new plugin."""
    keys = {"tread_config": HALF, "tread_ratio_schedule": "linear", "tread_warmup_steps": 8}
    first, second = plugin(**keys), plugin(**keys)
    for step in range(6):
        first.route_tokens(run=run_of(first, step, 20), request=request())
    routes = [each.route_tokens(run=run_of(each, 6, 20), request=request()) or () for each in (first, second)]
    assert torch.equal(routes[0][0].keep, routes[1][0].keep)


# --- what users are told -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_that_nothing_uses_is_refused(schedule: str) -> None:
    tread = plugin(tread_config=HALF, tread_ratio_schedule=schedule, tread_warmup_steps=50)
    with pytest.raises(ConfigError, match=f"tread_warmup_steps is 50, and tread_ratio_schedule '{schedule}'") as caught:
        tread.configure(run=run_of(tread))
    assert caught.value.remedy is not None
    assert "linear" in caught.value.remedy


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tread_ratio_schedule": "liner"}, ["tread_ratio_schedule", "did you mean 'linear'?"]),
        ({"tread_warmup_steps": 0}, ["tread_warmup_steps", "0", "≥ 1"]),
    ],
)
def test_values_that_are_none_are_one_clear_error(keys: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TreadConfig, keys)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    tread = plugin(tread_config=HALF, tread_ratio_schedule="linear", tread_warmup_steps=50)
    clips = data(Bucket(9, 64, 64))
    tread.data_ready(run=run_of(tread, total=50), spec=SPEC, data=clips, plan=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tread_warmup_steps is 50, and the run has 49 steps"):
        tread.data_ready(run=run_of(tread, total=49), spec=SPEC, data=clips, plan=None)  # type: ignore[arg-type]


def test_a_route_that_keeps_nothing_of_a_clip_is_refused_before_any_weight_is_read() -> None:
    route = {"selection_ratio": 0.9, "start_layer_idx": 1, "end_layer_idx": 2}
    tread = plugin(tread_config={"routes": [route]}, tread_ratio_schedule="linear")
    run = run_of(tread, total=9)
    tread.data_ready(run=run, spec=SPEC, data=data(Bucket(9, 64, 64)), plan=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"routes\[0\]: selection_ratio 0.9 keeps none of the 2 tokens") as caught:
        tread.data_ready(run=run, spec=SPEC, data=data(Bucket(9, 64, 64), Bucket(1, 16, 32)), plan=None)  # type: ignore[arg-type]
    assert "32x16, 1 frame" in str(caught.value)


def test_keys_without_routes_are_said_to_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tread = plugin(tread_selector="motion", tread_ratio_schedule="linear")
    with caplog.at_level(logging.WARNING, logger="tuner"):
        tread.configure(run=run_of(tread))
    assert caplog.messages == ["without effect, as there is no tread_config: tread_ratio_schedule, tread_selector"]
    caplog.clear()
    tread = plugin(tread_config=HALF, tread_selector="motion")
    tread.configure(run=run_of(tread))
    assert not caplog.messages


@pytest.mark.parametrize(("schedule", "ramp"), [("constant", False), ("linear", True), ("cosine", True)])
def test_memory_is_planned_for_the_steps_of_a_ramp_that_drop_nothing(schedule: str, ramp: bool) -> None:
    from dataclasses import replace

    from tuner.builtin.planner.memory import predict
    from tuner.workload import Workload

    network = NetworkSpec("net", 4, 64, 2, 128, 16, 8, 16)
    workload = Workload(network, LatentGeometry(16, 4, 8), shape=(17, 256, 256), samples=1)
    routes = [{"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": -1}]
    tread = plugin(tread_config={"routes": routes}, tread_ratio_schedule=schedule)
    answer = tread.estimate(run=run_of(tread), spec=None, workload=workload)  # type: ignore[arg-type]
    assert any(answer["dropped"])
    planned = predict(replace(workload, **answer)).on_device
    assert (planned == predict(workload).on_device) == ramp
    assert planned <= predict(workload).on_device
