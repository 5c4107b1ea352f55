"""Clips that are trained on and others that are held out, for the toy family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.project import flat_config, video_entry
from tuner.testing.toy import build_toy

Settings = Callable[..., dict[str, Any]]
Logged = Callable[[Path], dict[int, dict[str, float]]]


def render(folder: Path, count: int, seed: int) -> None:
    """Clips of two sizes with captions, of which held-out ones have two each."""
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"clip {index}.mp4"
        width, height = ((96, 64), (64, 64))[index % 2]
        render_clip(path, width=width, height=height, frames=9, fps=16, seed=seed + index)
        path.with_suffix(".txt").write_text(f"shapes number {seed + index}\nothers\n", encoding="utf-8")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy model, and the folders ``clips``, ``unseen`` and ``other``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("toy")
    build_toy(folder / "model", blocks=4)
    for name, count, seed in (("clips", 4, 0), ("unseen", 3, 10), ("other", 1, 20)):
        render(folder / name, count, seed)
    with importable(toy_distribution(folder / "site")):
        yield folder


@pytest.fixture
def make_settings(folder: Path, tmp_path: Path) -> Settings:
    """A flat config over the dataset ``clips`` and the held-out ones named."""

    def make(held_out: tuple[str, ...] = ("unseen",), output: str = "output", **keys: Any) -> dict[str, Any]:
        kinds = {"clips": "video", **dict.fromkeys(held_out, "eval")}
        entries = [video_entry(folder / name, dataset_type=kind) for name, kind in kinds.items()]
        usual = {
            "output_dir": str(tmp_path / output),
            "max_train_steps": 6,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
        }
        return flat_config(folder, *entries, **({"learning_rate": 1e-2} | usual | keys))

    return make


@pytest.fixture(scope="session")
def logged() -> Logged:
    """The numbers of the evaluation in an output folder's log, by step; steps without any are left out."""

    def read(output: Path) -> dict[int, dict[str, float]]:
        found = {}
        for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            own = {name: value for name, value in values.items() if name.startswith("evaluation/")}
            if own:
                found[values["step"]] = own
        return found

    return read
