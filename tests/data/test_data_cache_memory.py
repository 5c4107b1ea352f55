"""Text encoder, VAE and denoiser are never in memory together, whatever ``offload_during_startup`` says."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import pipeline, transforms
from tuner.assembly import assemble
from tuner.model import Model, Network
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner_wan.tiny import build_tiny_t2v


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Two clips and a tiny Wan with its real classes: one step of LoRA."""
    (tmp_path / "clips").mkdir()
    for index in range(2):
        render_clip(tmp_path / f"clips/{index}.mp4", width=64, height=48, frames=5, fps=16, seed=index)
        (tmp_path / f"clips/{index}.txt").write_text(f"clip {index}")
    clips = {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": str(tmp_path / "clips"),
        "resolution": 48,
        "video": {"num_frames": 5},
    }
    return {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(build_tiny_t2v(tmp_path / "tiny-wan")),
        "output_dir": str(tmp_path / "output"),
        "mixed_precision": "no",
        "max_train_steps": 1,
        "lora_rank": 2,
        "offload_during_startup": True,
        "data_backend_config": [clips, {"id": "text", "dataset_type": "text_embeds", "default": True}],
    }


def test_each_is_gone_before_the_next_is_loaded(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    alive: dict[str, weakref.ref[Any]] = {}
    events: list[str] = []
    use, prepare = Model.use, transforms.prepare

    def in_memory() -> list[str]:
        return [name for name, reference in alive.items() if reference() is not None]

    @contextmanager
    def watched_use(self: Model, *names: str) -> Iterator[tuple[Any, ...]]:
        if not set(names) <= self._held.keys():
            events.extend(names)
            assert in_memory() == [], f"{in_memory()} still there when {names} is loaded"
        assert all(each.is_meta for network in self.networks.values() for each in network.module.parameters())
        with use(self, *names) as held:
            for name, each in zip(names, held, strict=True):
                alive[name] = weakref.ref(getattr(each, "model", each))
            yield held

    def watched_prepare(run: Run, network: Network, edits: Any) -> Any:
        events.append(network.name)
        assert in_memory() == [], f"{in_memory()} still there when the denoiser is read"
        return prepare(run, network, edits)

    monkeypatch.setattr(Model, "use", watched_use)
    monkeypatch.setattr(transforms, "prepare", watched_prepare)
    pipeline.run(assemble(config))
    assert events == ["text_encoder", "vae", "transformer"]
