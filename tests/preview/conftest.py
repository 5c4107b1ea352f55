"""Toy runs that are previewed, and tiny autoencoders with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution, write_distribution
from tuner.testing.project import flat_config
from tuner.testing.toy import build_toy
from tuner_preview.layout import Layout

Settings = Callable[..., dict[str, Any]]

LISTENER = '''
"""Writes down which previews were announced."""

from tuner import Plugin, PluginConfig, hookimpl

HEARD = []

class Listener(Plugin[PluginConfig]):
    """Writes down which previews were announced."""

    @hookimpl
    def on_preview(self, run, preview):
        HEARD.append((run.step, preview, preview.path.is_file(), bool(preview.sheet and preview.sheet.is_file())))
        raise RuntimeError("a listener that fails must not end the run")
'''


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy model and clips, and a plugin that listens."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("previews")
    build_toy(folder / "model", blocks=2)
    (folder / "clips").mkdir()
    for index in range(3):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=96, height=64, frames=9, fps=16, seed=index)
    listener = write_distribution(
        folder / "listener",
        "listener",
        {"listener": "preview_listener:Listener"},
        modules={"preview_listener": LISTENER},
    )
    with importable(toy_distribution(folder / "site"), listener):
        yield folder


@pytest.fixture
def make_settings(folder: Path, tmp_path: Path) -> Settings:
    """A flat config that renders two prompts at the end."""
    (tmp_path / "library.json").write_text('{"red": "a red square", "a cat": "a cat walks"}', encoding="utf-8")

    def make(output: str = "output", **keys: Any) -> dict[str, Any]:
        usual = {
            "output_dir": str(tmp_path / output),
            "max_train_steps": 2,
            "lora_rank": 2,
            "lora_dropout": 0.2,
            "learning_rate": 1e-2,
            "user_prompt_library": str(tmp_path / "library.json"),
            "disable_benchmark": True,
            "validation_num_inference_steps": 20,
            "validation_resolution": "96x64",
            "validation_num_video_frames": 9,
            "validation_preview": True,
            "validation_preview_steps": 5,
        }
        return flat_config(folder, **(usual | keys))

    return make


@pytest.fixture
def write_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny autoencoder of a layout with random weights, with other tensors beside it."""

    def write(layout: Layout, name: str = "tiny.safetensors", **changed: torch.Tensor | None) -> Path:
        draw = torch.Generator().manual_seed(0)
        tensors = {
            parameter: torch.randn(shape, generator=draw) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
            for parameter, shape in layout.shapes().items()
        }
        tensors |= {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
        for parameter, tensor in changed.items():
            tensors.pop(parameter, None)
            if tensor is not None:
                tensors[parameter] = tensor
        path = tmp_path / name
        save_file(tensors, path)
        return path

    return write
