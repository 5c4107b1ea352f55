"""Folders of real clips, and a small real encoder in place of a model family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.config.keys import CoreConfig
from tuner.model import Batch, Component, EncodeBatch, Encoded, Model, SampleRequest
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec
from tuner.testing.clips import render_clip

SPEC = ModelSpec(
    family="fake",
    flavour="fake-tiny",
    base="none",
    networks=(),
    latents=LatentGeometry(channels=4, stride_time=4, stride_space=8),
    size_multiple=16,
    fps=16.0,
    adapter_targets=(),
    encoders={"text": ("text_encoder",), "video": ("vae",)},
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips with captions: two landscape of 20 and 17 frames, one portrait of 9."""
    folder = tmp_path_factory.mktemp("clips")
    for name, width, height, frames, fps in [
        ("wide", 96, 64, 20, 16),
        ("wide two", 96, 64, 17, 16),
        ("tall", 64, 96, 9, 24),
    ]:
        render_clip(folder / f"{name}.mp4", width=width, height=height, frames=frames, fps=fps, seed=len(name))
        (folder / f"{name}.txt").write_text(f"{name}, first\n{name}, second\n", encoding="utf-8")
    return folder


MakeCore = Callable[..., CoreConfig]


@pytest.fixture
def make_core(tmp_path: Path) -> MakeCore:
    """A core config with one video dataset; keyword arguments go to its entry, ``core`` to the config."""

    def make(folder: Path, *, core: dict[str, Any] | None = None, **entry: Any) -> CoreConfig:
        video = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(folder),
            "resolution": 64,
            "video": {"num_frames": 9},
            "cache_dir_vae": str(tmp_path / "cache" / "vae"),
        } | entry
        text = {
            "id": "text",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(tmp_path / "cache" / "text"),
        }
        return CoreConfig(data_backend_config=[video, text], output_dir=tmp_path / "output", **(core or {}))

    return make


class FakeModel(Model):
    """Real modules with random weights: a strided projection as VAE, an embedding of bytes as text encoder."""

    def __init__(self, folder: Path) -> None:
        self.loads: list[str] = []
        super().__init__(
            SPEC,
            [],
            {name: self._component(folder, name, module) for name, module in _modules().items()},
            active="none",
        )

    def _component(self, folder: Path, name: str, module: nn.Module) -> Component:
        path = folder / f"{name}.safetensors"
        save_file(module.state_dict(), path)

        def load() -> nn.Module:
            self.loads.append(name)
            return module

        return Component(load, (path,), {"precision": "float32"})

    def predict(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def sample(self, request: SampleRequest) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def _modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"vae": nn.Conv2d(3, 4, 8, stride=8), "text_encoder": nn.Embedding(256, 6)}


class FakeHooks:
    """``encode_batch`` of the fake family. ``poison`` makes it fail on chosen pixels."""

    def __init__(self, poison: Callable[[Tensor], bool] = lambda _: False) -> None:
        self.batches: list[EncodeBatch] = []
        self.poison = poison

    def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        assert not torch.is_grad_enabled()
        self.batches.append(batch)
        if batch.kind == "text":
            with model.use("text_encoder") as (encoder,):
                return [{"states": encoder(torch.tensor([*b"^", *text.encode()]))} for text in batch.captions]
        assert batch.pixels is not None
        with model.use("vae") as (vae,):
            frames = batch.pixels[:, :, ::4]
            latents = torch.stack([vae(clip.transpose(0, 1)).transpose(0, 1) for clip in frames])
            if self.poison(batch.pixels):
                latents = latents * float("nan")
            return [{"latents": each, "first_frame": each[:, 0]} for each in latents]


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    return FakeModel(tmp_path)


@pytest.fixture
def hooks() -> FakeHooks:
    return FakeHooks()


@pytest.fixture
def spec() -> ModelSpec:
    return SPEC


MakeRun = Callable[[CoreConfig], Run]


@pytest.fixture
def make_hooks() -> type[FakeHooks]:
    return FakeHooks


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[[], FakeModel]:
    """A model as a second start would build it: same files, nothing loaded yet."""
    return lambda: FakeModel(tmp_path)
