"""``tuner check`` ends with what will happen, and with a warning where the disk is too small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tuner.cli import app, outlook
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.project import flat_config, video_entry
from tuner.testing.toy import build_toy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("outlook")
    build_toy(folder / "model")
    for seed in range(3):
        path = folder / "clips" / f"clip {seed}.mp4"
        render_clip(path, width=96, height=64, frames=9 if seed else 17, fps=16, seed=seed)
    with importable(toy_distribution(folder / "site")):
        yield folder


def checked(place: Path, **keys: Any) -> str:
    usual = {"max_train_steps": 10, "train_batch_size": 2, "checkpoint_step_interval": 4, "mixed_precision": "bf16"}
    config = flat_config(place, video_entry(place / "clips", resolution_type="pixel_area"), **(usual | keys))
    path = place / "config.json"
    path.write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["check", "--config", str(path)], env={"COLUMNS": "200"})
    assert result.exception is None, result.exception
    return result.output


def test_it_says_what_will_happen(place: Path) -> None:
    said = checked(
        place, validation_prompt="a red square moving over grey ground", validation_step_interval=5, push_to_hub=True
    )
    for words in (
        "3 samples of 80x48, 9 frames",
        "10 steps of 2 samples: 5.0 epochs",
        "GiB on the device while training",
        "TFLOP a step; for times set plan_card",
        "every 5 steps, and at the end: 2 times",
        "to output, private where it is new",
    ):
        assert words in said, words
    assert "3 of about" in said  # steps 4, 8 and 10
    assert "2 of about" in checked(place, checkpoints_total_limit=2)


def test_a_cache_that_does_not_fit_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning: the cache will take" not in checked(place)
    monkeypatch.setattr(outlook, "_free", lambda folder: 10.0)
    assert "warning: the cache will take about" in checked(place)


def test_times_are_of_the_card_that_is_named(place: Path) -> None:
    assert "h of training at least" in checked(place, plan_card="H100")
