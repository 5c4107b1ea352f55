"""Rates that were measured on a card take the place of the known ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.builtin.planner import PlannerConfig, PlannerPlugin
from tuner.errors import ConfigError

MEASURED: dict[str, Any] = {
    "device": "NVIDIA H100 80GB HBM3",
    "matmul_tflops": 700.0,
    "attention_forward_tflops": 500.0,
    "attention_backward_tflops": 400.0,
    "copy_tb_per_s": 2.5,
    "host_to_device_gb_per_s": 55.0,
    "device_to_host_gb_per_s": 54.0,
}


def card(path: Path, **changes: Any) -> Any:
    path.write_text(json.dumps({name: value for name, value in (MEASURED | changes).items() if value is not None}))
    return PlannerPlugin("planner", PlannerConfig(plan_card="L4", plan_ceilings=path)).card()


def test_they_are_the_cards_rates(tmp_path: Path) -> None:
    found = card(tmp_path / "gpu-ceilings.json")
    rates = (found.matmul, found.attention, found.attention_backward, found.bandwidth, found.pcie)
    assert rates == (700.0, 500.0, 400.0, 2.5, 55.0)
    assert found.name == MEASURED["device"]
    assert found.memory == 79
    assert "gpu-ceilings.json" in found.source


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"matmul_tflops": None}, "'matmul_tflops'"),
        ({"copy_tb_per_s": "fast"}, "no file of measured rates"),
        ({"attention_forward_tflops": 0}, "attention_forward_tflops must be above 0"),
    ],
)
def test_a_file_without_them_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        card(tmp_path / "rates.json", **changes)
    assert told in str(caught.value)
    assert "plan_ceilings" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make gpu PART=ceilings"):
        PlannerPlugin("planner", PlannerConfig(plan_ceilings=tmp_path / "none.json")).card()
