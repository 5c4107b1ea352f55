"""Clips with masks over them, on the toy family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.toy import build_toy

Frames = Sequence[np.ndarray]
WIDTH, HEIGHT, FRAMES = 96, 64, 9


class MaskFolder:
    """Writes masks, pictures and clips, pixel for pixel as they are given: (H, W) or (H, W, 3) uint8."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def picture(self, name: str, pixels: np.ndarray) -> Path:
        """A PNG."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    def clip(self, name: str, frames: Frames, fps: int = 16) -> Path:
        """A lossless clip (FFV1) of grey frames."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=fps)
            stream.height, stream.width = frames[0].shape
            stream.pix_fmt = "gray"
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="gray")))
            container.mux(stream.encode())
        return path


def half(value: int = 255, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A mask whose left half is bright."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = value
    return pixels


@pytest.fixture
def bright_half() -> Callable[..., np.ndarray]:
    return half


@pytest.fixture
def masks(tmp_path: Path) -> MaskFolder:
    return MaskFolder(tmp_path / "masks")


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy model, and two clips of 96x64 and 9 frames in the folder ``clips``."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("toy")
    build_toy(folder / "model")
    (folder / "clips").mkdir()
    for index in range(2):
        path = folder / "clips" / f"clip {index}.mp4"
        render_clip(path, width=WIDTH, height=HEIGHT, frames=FRAMES + 4 * index, fps=16, seed=index)
        path.with_suffix(".txt").write_text(f"shapes number {index}", encoding="utf-8")
    with importable(toy_distribution(folder / "site")):
        yield folder


@pytest.fixture
def make_settings(toy_folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A flat config over the clips and their masks; ``entry`` and ``conditioning`` go to the datasets of these."""

    def make(
        *,
        entry: dict[str, Any] | None = None,
        conditioning: dict[str, Any] | None = None,
        more: Sequence[dict[str, Any]] = (),
        **keys: Any,
    ) -> dict[str, Any]:
        clips = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(toy_folder / "clips"),
            "cache_dir_vae": str(tmp_path / "cache"),
            "resolution": 64,
            "resolution_type": "pixel",
            "conditioning_data": "masks",
            "video": {"num_frames": FRAMES},
        }
        mask = {
            "id": "masks",
            "dataset_type": "conditioning",
            "conditioning_type": "mask",
            "instance_data_dir": str(tmp_path / "masks"),
        }
        text = {
            "id": "text",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(tmp_path / "text"),
        }
        return {
            "model_family": "toy",
            "pretrained_model_name_or_path": str(toy_folder / "model"),
            "output_dir": str(tmp_path / "output"),
            "mixed_precision": "no",
            "max_train_steps": 4,
            "train_batch_size": 2,
            "lora_rank": 4,
            "data_backend_config": [clips | (entry or {}), mask | (conditioning or {}), text, *more],
            **keys,
        }

    return make
