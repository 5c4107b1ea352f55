"""The whole job on the toy family: real clips, real files, a run in under a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.testing.clips import render_clip
from tuner.testing.local_log import timeless_lines
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.toy import build_toy


class Job:
    """A folder with a toy model, clips and a distribution of the toy plugin; runs configs over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.distribution = toy_distribution(folder / "site")
        self.model = build_toy(folder / "model")
        clips = folder / "clips"
        clips.mkdir()
        for index, (width, height, frames) in enumerate([(96, 64, 9), (96, 64, 13), (64, 96, 9), (96, 64, 9)]):
            render_clip(clips / f"clip {index}.mp4", width=width, height=height, frames=frames, fps=16, seed=index)
            (clips / f"clip {index}.txt").write_text(f"shapes number {index}", encoding="utf-8")

    def config(self, output: str, **keys: Any) -> dict[str, Any]:
        """A config over this job's model and clips, with ``keys`` on top."""
        return {
            "model_family": "toy",
            "pretrained_model_name_or_path": str(self.model),
            "output_dir": str(self.folder / output),
            "mixed_precision": "no",
            "max_train_steps": 6,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "lora_rank": 4,
            "caption_dropout_probability": 0.2,
            "data_backend_config": [
                {
                    "id": "clips",
                    "type": "local",
                    "dataset_type": "video",
                    "instance_data_dir": str(self.folder / "clips"),
                    "cache_dir_vae": str(self.folder / "cache" / "vae"),
                    "caption_strategy": "textfile",
                    "resolution": 64,
                    "resolution_type": "pixel_area",
                    "video": {"num_frames": 9, "min_frames": 9},
                },
                {
                    "id": "text",
                    "type": "local",
                    "dataset_type": "text_embeds",
                    "default": True,
                    "cache_dir": str(self.folder / "cache" / "text"),
                },
            ],
            **keys,
        }

    def run(self, output: str, **keys: Any) -> Path:
        """Run the config in this process; returns the output folder."""
        from tuner import pipeline
        from tuner.assembly import assemble

        without = keys.pop("without", ())
        with self.on_path():
            pipeline.run(assemble(self.config(output, **keys), without=without))
        return self.folder / output

    @contextmanager
    def on_path(self) -> Iterator[None]:
        """The toy plugin can be found."""
        with importable(self.distribution):
            yield


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One toy job for all tests; each test writes to an output folder of its own."""
    torch.set_num_threads(1)
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def steps_of() -> Callable[[Path], list[dict[str, Any]]]:
    """The local log of an output folder, without what depends on the clock."""
    return timeless_lines


@pytest.fixture(scope="session")
def state_of() -> Callable[[Path, int], dict[str, dict[str, bytes]]]:
    """Every tensor of a checkpoint, bit for bit, by file and name (files name their folder in their metadata)."""

    def read(output: Path, step: int) -> dict[str, dict[str, bytes]]:
        files = sorted((output / f"checkpoint-{step}").rglob("*.safetensors"))
        assert len(files) >= 3  # adapter, optimizer, LoRA
        return {
            path.name: {
                name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in load_file(path).items()
            }
            for path in files
        }

    return read
