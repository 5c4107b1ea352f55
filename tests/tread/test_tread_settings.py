"""What users may write in ``tread_config``, and what they are told when it does not fit."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuner.config.faults import build
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_tread import TreadConfig, TreadPlugin, TreadSettings
from tuner_tread.ranges import BlockRange, remaining_share, resolve

SEED = Path(__file__).parent / "seed"


def settings(*routes: tuple[float, int, int]) -> TreadSettings:
    names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    config = build(
        TreadConfig, {"tread_config": {"routes": [dict(zip(names, route, strict=True)) for route in routes]}}
    )
    assert config.tread_config is not None
    return config.tread_config


def written(**changed: object) -> dict[str, object]:
    return {"selection_ratio": 0.1, "start_layer_idx": 2, "end_layer_idx": 3, **changed}


def spec(**blocks: int) -> ModelSpec:
    networks = tuple(
        NetworkSpec(name, count, dim=8, heads=2, ffn_dim=16, text_dim=4, text_tokens=4, in_channels=4)
        for name, count in blocks.items()
    )
    return ModelSpec("toy", "toy-2", "none", networks, LatentGeometry(4, 4, 8), 16, 16.0, ())


def run_of(plugin: TreadPlugin) -> Run:
    run = Run(CoreConfig(), {plugin.name: plugin})
    run.token_selectors = plugin.token_selectors(run=run)
    return run


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("tread-simple", [(2, 29, 0.1)]),
        ("tread-progressive", [(2, 9, 0.1), (9, 12, 0.25), (12, 16, 0.35), (16, 24, 0.25), (24, 29, 0.1)]),
    ],
)
def test_files_of_users_pass_as_they_are(file: str, expected: list[tuple[int, int, float]]) -> None:
    config = build(TreadConfig, json.loads((SEED / f"{file}.fragment.json").read_text()))
    assert config.tread_config is not None
    assert resolve(config.tread_config, 30) == tuple(BlockRange(*each) for each in expected)


def test_both_ends_are_inclusive_and_negative_counts_from_the_end() -> None:
    assert resolve(settings((0.5, 0, 0), (0.5, 1, -2), (0.5, -1, -1)), 6) == (
        BlockRange(0, 1, 0.5),
        BlockRange(1, 5, 0.5),
        BlockRange(5, 6, 0.5),
    )


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        ([(0.1, 2, 8), (0.1, 9, -40)], "routes[1]: end_layer_idx -40 is block -10 of 30"),
        ([(0.1, 2, 30)], "routes[0]: end_layer_idx 30 is block 30 of 30"),
        ([(0.1, 31, -2)], "routes[0]: start_layer_idx 31 is block 31 of 30"),
        (
            [(0.1, 8, -25)],
            "routes[0]: it ends before it starts: start_layer_idx 8 is block 8, end_layer_idx -25 is",
        ),
        (
            [(0.1, 2, 8), (0.2, 8, 9)],
            "routes[1]: start_layer_idx 8 is block 8 of 30, but routes[0] covers blocks 2",
        ),
        (
            [(0.1, 9, 12), (0.2, 2, 8)],
            "routes[1]: start_layer_idx 2 is block 2 of 30, but routes[0] covers blocks 9",
        ),
    ],
)
def test_routes_that_do_not_fit_are_refused_in_the_users_numbers(routes: list[Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(settings(*routes), 30)
    assert says in str(caught.value)
    assert "allowed: blocks 0 to 29, or -30 to -1 from the end" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"routes": [written(selection_ration=0.1)]}, ["selection_ration", "did you mean 'selection_ratio'?"]),
        ({"route": []}, ["tread_config", "did you mean 'routes'?"]),
        ({"routes": []}, ["tread_config.routes"]),
        ({"routes": [{"selection_ratio": 0.1, "start_layer_idx": 2}]}, ["routes[0].end_layer_idx", "missing"]),
        ({"routes": [written(selection_ratio=1.0)]}, ["tread_config.routes[0].selection_ratio", "1.0", "< 1"]),
        ({"routes": [written(selection_ratio=-0.1)]}, ["tread_config.routes[0].selection_ratio", "-0.1", "≥ 0"]),
        ({"routes": [written(start_layer_idx=True)]}, ["tread_config.routes[0].start_layer_idx", "true"]),
        ({"routes": [written(start_layer_idx=2.5)]}, ["tread_config.routes[0].start_layer_idx", "2.5", "whole number"]),
    ],
)
def test_malformed_routes_are_one_clear_error(value: object, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(TreadConfig, {"tread_config": value})
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_every_network_of_the_model_is_checked() -> None:
    plugin = TreadPlugin("tread", TreadConfig(tread_config=settings((0.1, 2, 25))))
    plugin.check_model(run=run_of(plugin), spec=spec(high=30, low=30))
    with pytest.raises(ConfigError, match=r"end_layer_idx 25 is block 25 of 20") as caught:
        plugin.check_model(run=run_of(plugin), spec=spec(high=30, low=20))
    assert "'low' of toy-2" in str(caught.value)


def test_a_selector_that_nobody_offers_is_refused_with_the_nearest() -> None:
    plugin = TreadPlugin("tread", TreadConfig(tread_config=settings((0.1, 2, 25)), tread_selector="unifrom"))
    with pytest.raises(ConfigError, match="unifrom") as caught:
        plugin.check_model(run=run_of(plugin), spec=spec(net=30))
    assert caught.value.nearest == "uniform"


def test_without_routes_the_plugin_is_idle() -> None:
    plugin = TreadPlugin("tread", TreadConfig())
    assert not plugin.is_active(CoreConfig())
    plugin.check_model(run=run_of(plugin), spec=spec(net=2))
    assert TreadPlugin("tread", TreadConfig(tread_config=settings((0.1, 0, 1)))).is_active(CoreConfig())


def test_a_second_token_router_conflicts() -> None:
    assert TreadPlugin.conflicts & TreadPlugin.provides == {"token-router"}
    assert TreadPlugin.requires == {"model-family"}


def test_remaining_share_is_the_mean_over_the_blocks() -> None:
    ranges = resolve(settings((0.5, 2, 3), (0.25, 5, -1)), 8)
    kept = [1, 1, 0.5, 0.5, 1, 0.75, 0.75, 0.75]
    linear, attention = remaining_share(ranges, 8)
    assert linear == pytest.approx(sum(kept) / 8)
    assert attention == pytest.approx(sum(k * k for k in kept) / 8)


def test_the_start_says_what_work_is_left(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass
    class Holder:
        spec: NetworkSpec

    @dataclass
    class OneNetwork:
        network: Holder

    plugin = TreadPlugin("tread", TreadConfig(tread_config=settings((0.5, 2, -2))))
    with caplog.at_level(logging.INFO, logger="tuner"):
        plugin.on_train_start(run=run_of(plugin), model=OneNetwork(Holder(spec(net=30).networks[0])))  # type: ignore[arg-type]
    assert caplog.messages == [
        "TREAD routes over 27 of 30 blocks leave 55 % of the per-token work and 32 % of the self-attention"
    ]


def test_the_entry_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, tuner_tread; heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy; print(tuner_tread.TreadPlugin.__doc__.splitlines()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TREAD token routing")
