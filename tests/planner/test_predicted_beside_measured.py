"""After the first step: the predicted peak of device memory beside the counted one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import pipeline
from tuner.assembly import assemble, new_run
from tuner.builtin.planner.beside import Beside, compared
from tuner.builtin.planner.memory import CONTEXT, Memory
from tuner.data.samples import Bucket
from tuner.testing.clips import render_clip
from tuner.testing.project import flat_config, video_entry
from tuner_wan.tiny import build_tiny

GIB = 2**30
HELD = Memory({"base weights": 3 * GIB, "block at work": 7 * GIB, "CUDA context": CONTEXT}, {"block inputs": 20 * GIB})


def test_both_peaks_are_in_one_line_without_the_context() -> None:
    assert list(compared(HELD, int(9.5 * GIB), "cuda")) == [
        "device memory of the first step: 10.00 GiB predicted, 9.50 GiB measured (-5.0%)"
    ]


def test_a_prediction_that_is_off_is_said_with_its_largest_part() -> None:
    _, off = compared(HELD, 12 * GIB, "cuda")
    assert "off by more than 10%" in off
    assert "'block at work' with 7.00 GiB" in off


def test_a_device_that_does_not_count_is_not_compared() -> None:
    (line,) = compared(HELD, None, "cpu")
    assert line.startswith("device memory of the first step: 10.00 GiB predicted; not measured: cpu does not count")


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    build_tiny(folder / "model", layers=4)
    for index in range(2):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=32, height=32, frames=5, fps=16, seed=index)
    videos = video_entry(folder / "clips", resolution=32, frames=5)
    return flat_config(folder, videos, family="wan", **({"max_train_steps": 3, "lora_rank": 2} | keys))


def test_a_run_says_it_once_after_its_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device stands in for one that counts: what it counted by the end of each step."""
    asked: list[int] = []

    def measured(self: Beside) -> int:
        asked.append(1)
        return round(1.02 * (self.predicted.on_device - CONTEXT))

    monkeypatch.setattr(Beside, "measured", measured)
    caplog.set_level(logging.INFO, "tuner")
    pipeline.run(assemble(settings(tmp_path)))
    said = [each.getMessage() for each in caplog.records if "device memory of the first step" in each.getMessage()]
    assert len(said) == len(asked) == 1
    assert said[0].endswith("measured (+2.0%)")


def test_it_is_kept_for_the_report(tmp_path: Path) -> None:
    pipeline.run(assemble(settings(tmp_path) | {"max_train_steps": 1}))
    kept = json.loads((tmp_path / "output" / "memory.json").read_text(encoding="utf-8"))
    assert kept["measured"] is None  # a CPU does not count
    assert kept["predicted"]["base weights"] > 0
    assert "CUDA context" not in kept["predicted"]


@pytest.mark.gpu
def test_the_device_counts_the_step_and_not_what_came_before() -> None:
    """What was held before counting began, and freed, is not in the peak."""
    before = torch.empty(GIB // 4, device="cuda")
    del before
    run = new_run(assembly := assemble({"model_family": "wan", "model_flavour": "t2v-480p-1.3b-2.1"}))
    spec = pipeline.describe(run, assembly.manager)
    assert run.estimate is not None
    beside = Beside(torch.device("cuda"), [run.estimate(spec.networks[0], Bucket(1, 480, 832), 1)], first=True)
    held = torch.empty(GIB // 16, device="cuda")
    measured = beside.measured()
    assert measured is not None
    assert GIB // 4 <= measured < GIB // 2
    del held
