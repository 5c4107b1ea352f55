"""Clips that teach, and the same clips holding the model to its base, in one bucket."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy model of six blocks, and two clips with captions in the folder ``clips``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("toy")
    build_toy(folder / "model", blocks=6)
    for index in range(2):
        path = folder / "clips" / f"clip {index}.mp4"
        path.parent.mkdir(exist_ok=True)
        render_clip(path, width=96, height=64, frames=9, fps=16, seed=index)
        path.with_suffix(".txt").write_text(f"shapes number {index}", encoding="utf-8")
    with importable(toy_distribution(folder / "site")):
        yield folder


@pytest.fixture
def make_settings(folder: Path, tmp_path: Path) -> Settings:
    """A flat config over datasets ``teach`` and ``hold``; ``datasets`` says which of them."""

    def make(datasets: tuple[str, ...] = ("teach", "hold"), **keys: Any) -> dict[str, Any]:
        # Each dataset by itself must fill a batch.
        shared = {"cache_dir_vae": str(folder / "cache"), "repeats": len(datasets) - 1}
        entries = [
            video_entry(
                folder / "clips", id=name, **shared, **({"is_regularisation_data": True} if name == "hold" else {})
            )
            for name in datasets
        ]
        usual = {
            "output_dir": str(tmp_path / "output"),
            "cache_dir": str(tmp_path / "cache"),
            "max_train_steps": 3,
            "train_batch_size": 2 * len(datasets),
            "learning_rate": 1e-2,
        }
        return flat_config(folder, *entries, **(usual | keys))

    return make
