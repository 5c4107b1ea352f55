"""The toy model itself: what its folder says, what its autoencoder keeps, and what a wrong folder is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, ModelError
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.family import FamilyBench
from tuner.testing.toy import ToyConfig, ToyPlugin, build_toy


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> FamilyBench:
    folder = build_toy(tmp_path_factory.mktemp("toy") / "model")
    return FamilyBench(ToyPlugin("toy", ToyConfig()), {"pretrained_model_name_or_path": str(folder)}, (9, 32, 48))


def describe(**keys: Any) -> Any:
    return ToyPlugin("toy", ToyConfig()).describe_model(Run(CoreConfig(**keys), {}))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (build_toy(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    files = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert len(files) == 6
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert any((first / file).read_bytes() != (other / file).read_bytes() for file in files)


def test_building_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build_toy(tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_folder_decides_the_dimensions(tmp_path: Path) -> None:
    folder = build_toy(tmp_path / "model", blocks=7, dim=24, heads=4)
    network = describe(pretrained_model_name_or_path=str(folder)).networks[0]
    assert (network.blocks, network.dim, network.heads) == (7, 24, 4)


def test_latents_are_mean_colours(bench: FamilyBench) -> None:
    """Each channel is the mean of one colour over one quadrant of a cell, against plain pooling."""
    latents = torch.stack([each["latents"] for each in bench.encode_clips(bench.hand_over(), bench.pixels)])
    pooled = torch.nn.functional.avg_pool3d(bench.pixels[:, :, 1:], (4, 4, 4))
    for channel in range(12):
        colour, row, column = channel // 4, channel // 2 % 2, channel % 2
        expected = pooled[:, colour, :, row::2, column::2]
        torch.testing.assert_close(latents[:, channel, 1:], expected, rtol=1e-4, atol=1e-6)


def test_a_clip_survives_encoding_and_decoding(bench: FamilyBench, tmp_path: Path) -> None:
    """Colours of a rendered clip come back: a decoded frame is close to the original at a quarter of its size."""
    import av

    clip = render_clip(tmp_path / "clip.mp4", width=96, height=64, frames=9, fps=16, seed=0)
    del clip
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = torch.stack([torch.from_numpy(each.to_ndarray(format="rgb24")) for each in container.decode(video=0)])
    pixels = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    model = bench.hand_over()
    latents = bench.encode_clips(model, pixels)[0]["latents"]
    decoded = model.decode(latents[None])
    assert decoded.shape == frames.shape
    small = [torch.nn.functional.avg_pool2d(each.float().permute(0, 3, 1, 2), 4) for each in (frames[1:], decoded[1:])]
    pairs = [each.unflatten(0, (-1, 4)).mean(1) for each in small]
    torch.testing.assert_close(pairs[1], pairs[0], rtol=0, atol=1.5)


def test_without_a_path_it_says_what_to_name() -> None:
    with pytest.raises(ConfigError, match="build_toy"):
        describe()


@pytest.mark.parametrize("missing", ["transformer/config.json", "vae/model.safetensors"])
def test_a_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    folder = build_toy(tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        describe(pretrained_model_name_or_path=str(folder))


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    folder = build_toy(tmp_path / "model")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({"dim": 48}), encoding="utf-8")
    with pytest.raises(ModelError, match="config"):
        describe(pretrained_model_name_or_path=str(folder))
