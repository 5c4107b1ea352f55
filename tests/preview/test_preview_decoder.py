"""The tiny autoencoder: the layout of the public files, what is refused, and that frame by frame is the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tuner.errors import ModelError
from tuner.spec import LatentGeometry, ModelSpec
from tuner_preview.layout import Layout, check_fit, read_layout
from tuner_preview.tiny import TinyDecoder

Write = Callable[..., Path]

WAN_21 = Layout(16, (256, 128, 64, 64), (1, 2, 2), 1)
WAN_22 = Layout(48, (256, 128, 64, 64), (1, 2, 2), 2)
SMALL = Layout(4, (12, 8, 6, 5), (1, 2, 2), 2)


def spec(channels: int, time: int, space: int) -> ModelSpec:
    return ModelSpec("wan", "some Wan", "base", (), LatentGeometry(channels, time, space), 16, 16.0, ())


def public_names(latent_channels: int, pixels: int) -> dict[str, tuple[int, ...]]:
    """The decoder of taew2_1 (16 channels, 3 outputs) and taew2_2 (48, 12) as the public files have it."""
    found: dict[str, tuple[int, ...]] = {
        "decoder.1.weight": (256, latent_channels, 3, 3),
        "decoder.1.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (pixels, 64, 3, 3),
        "decoder.22.bias": (pixels,),
    }
    for blocks, width in (((3, 4, 5), 256), ((9, 10, 11), 128), ((15, 16, 17), 64)):
        for block in blocks:
            found[f"decoder.{block}.conv.0.weight"] = (width, 2 * width, 3, 3)
            found[f"decoder.{block}.conv.2.weight"] = (width, width, 3, 3)
            found[f"decoder.{block}.conv.4.weight"] = (width, width, 3, 3)
            found |= {f"decoder.{block}.conv.{index}.bias": (width,) for index in (0, 2, 4)}
    return found


@pytest.mark.parametrize(("layout", "channels", "pixels"), [(WAN_21, 16, 3), (WAN_22, 48, 12)])
def test_names_and_shapes_are_those_of_the_public_files(layout: Layout, channels: int, pixels: int) -> None:
    expected = public_names(channels, pixels)
    assert layout.shapes() == expected
    assert len(expected) == 64
    with torch.device("meta"):
        state = TinyDecoder(layout).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


@pytest.mark.parametrize("layout", [WAN_21, SMALL, Layout(8, (4, 4, 4, 4), (2, 2, 2), 4)])
def test_a_layout_is_read_off_its_file(layout: Layout, write_tiny: Write) -> None:
    assert read_layout(write_tiny(layout)) == layout


def test_each_wan_has_its_own() -> None:
    check_fit(WAN_21, spec(16, 4, 8), Path("a"))
    check_fit(WAN_22, spec(48, 4, 16), Path("a"))
    with pytest.raises(ModelError, match=r"latents of 48 channels(.|\n)*taew2_1\.safetensors"):
        check_fit(WAN_22, spec(16, 4, 8), Path("a"))
    with pytest.raises(ModelError, match=r"taew2_2\.safetensors"):
        check_fit(WAN_21, spec(48, 4, 16), Path("a"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"decoder.1.weight": None}, r"it has no decoder\.1\.weight"),
        ({"decoder.7.conv.weight": torch.zeros(3)}, r"it has a 3 decoder\.7\.conv\.weight"),
        ({"decoder.4.conv.2.bias": None}, r"it has no decoder\.4\.conv\.2\.bias"),
        ({"decoder.9.conv.0.weight": torch.zeros(8, 8, 3, 3)}, r"decoder\.9\.conv\.0\.weight is 8x8x3x3 and not 8x16"),
        ({"decoder.22.weight": torch.zeros(2, 5, 3, 3)}, r"decoder\.22\.weight is 2x5x3x3"),
        ({"decoder.23.weight": torch.zeros(1)}, r"it has decoder\.23\.weight"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_network_is_refused_by_its_header(changed: dict[str, Tensor], said: str, write_tiny: Write) -> None:
    with pytest.raises(ModelError, match=said):
        read_layout(write_tiny(SMALL, **changed))


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(b"\x09\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ModelError, match=r"cannot be read(.|\n)*half\.safetensors"):
        read_layout(path)


def reference(tensors: dict[str, Tensor], latents: Tensor, layout: Layout) -> Tensor:
    """All frames of ``latents`` (F', C, h, w) at once, with plain functions."""

    def convolved(x: Tensor, name: str) -> Tensor:
        weight = tensors[f"decoder.{name}.weight"]
        return functional.conv2d(x, weight, tensors.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = convolved(3 * torch.tanh(latents / 3), "1").relu()
    for level, first in enumerate((3, 9, 15)):
        for block in (first, first + 1, first + 2):
            y = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            for index in (0, 2, 4):
                y = convolved(y if index == 0 else y.relu(), f"{block}.conv.{index}")
            x = (x + y).relu()
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        count, width, height, across = x.shape
        x = convolved(x, f"{first + 4}.conv").reshape(count * layout.grows[level], width, height, across)
        x = convolved(x, f"{first + 5}")
    return functional.pixel_shuffle(convolved(x.relu(), "22"), layout.patch).clamp(0, 1)[layout.stride_time - 1 :]


@pytest.mark.parametrize("layout", [SMALL, Layout(3, (8, 6, 4, 4), (2, 2, 2), 1)])
def test_frame_by_frame_is_the_whole_at_once(layout: Layout, write_tiny: Write) -> None:
    path = write_tiny(layout)
    latents = torch.randn(4, layout.channels, 3, 5, generator=torch.Generator().manual_seed(1))
    decoder = TinyDecoder.read(path, layout, torch.float32)
    with torch.no_grad():
        pieces = list(decoder.frames(latents))
    frames = torch.cat(pieces)
    assert [len(piece) for piece in pieces] == [1, *[layout.stride_time] * 3]
    assert frames.shape == (3 * layout.stride_time + 1, 3, 3 * layout.stride_space, 5 * layout.stride_space)
    torch.testing.assert_close(frames, reference(load_file(path), latents, layout), atol=1e-5, rtol=1e-4)
    assert frames.std() > 0.05


@pytest.mark.gpu
def test_half_precision_on_a_gpu_shows_the_same(write_tiny: Write) -> None:
    path = write_tiny(SMALL)
    latents = torch.randn(3, SMALL.channels, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = torch.cat(list(TinyDecoder.read(path, SMALL, torch.float32).frames(latents)))
        half = TinyDecoder.read(path, SMALL, torch.float16).to("cuda")
        shown = torch.cat([piece.float().cpu() for piece in half.frames(latents.to("cuda", torch.float16))])
    assert (shown - exact).abs().mean() < 0.01
