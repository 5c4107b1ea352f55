"""Decoding still pictures: upright, over white, in 8 bits, and resized just like the frames of clips."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tuner.builtin.datasets.decode import decode_file
from tuner.data.samples import Bucket, Framing, View
from tuner.errors import DataError
from tuner.testing.clips import render_picture


def uint8(path: Path, width: int, height: int) -> torch.Tensor:
    """(height, width, 3): the whole picture, resized."""
    pixels = decode_file(path, View(Framing(width, height, 0, 0)), Bucket(1, height, width))
    return ((pixels[:, 0] + 1) * 127.5).round().permute(1, 2, 0)


def photograph(height: int, width: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    fine = interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return (fine * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp"])
def test_what_is_stored_is_what_is_decoded(tmp_path: Path, name: str) -> None:
    picture = photograph(48, 64)
    Image.fromarray(picture).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    assert torch.equal(uint8(tmp_path / name, 64, 48), torch.from_numpy(picture).float())


def test_a_picture_equals_the_frame_of_a_still_clip(tmp_path: Path) -> None:
    picture = photograph(192, 256)
    Image.fromarray(picture).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 256, 192, "bgr0"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    of_picture, of_clip = uint8(tmp_path / "a.png", 112, 84), uint8(tmp_path / "a.mkv", 112, 84)
    assert (of_picture - of_clip).abs().max() <= 1
    whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    exact = interpolate(whole, (84, 112), mode="bicubic", antialias=True).clamp(0, 255)[0].permute(1, 2, 0)
    assert (of_picture - exact).abs().max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, name: str, orientation: int) -> None:
    render_picture(tmp_path / "flat.png", width=64, height=48, seed=3)
    render_picture(tmp_path / name, width=64, height=48, seed=3, orientation=orientation)
    flat = np.asarray(Image.open(tmp_path / "flat.png"))
    turned = {
        1: flat,
        2: flat[:, ::-1],
        3: flat[::-1, ::-1],
        4: flat[::-1],
        5: flat.transpose(1, 0, 2),
        6: np.rot90(flat, -1),
        7: flat[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(flat),
    }
    height, width, _ = turned[orientation].shape
    assert torch.equal(uint8(tmp_path / name, width, height), torch.from_numpy(turned[orientation].copy()).float())


def test_what_is_transparent_lies_over_white(tmp_path: Path) -> None:
    layers = Image.new("RGBA", (64, 48), (255, 0, 0, 255))
    layers.paste((0, 0, 0, 0), (0, 0, 32, 48))
    layers.paste((0, 0, 0, 128), (32, 0, 64, 24))
    layers.save(tmp_path / "a.png")
    found = uint8(tmp_path / "a.png", 64, 48)
    assert found[10, 10].tolist() == [255, 255, 255]
    assert found[40, 60].tolist() == [255, 0, 0]
    assert found[10, 60].sub(127).abs().max() <= 1
    grey = Image.new("LA", (64, 48), (0, 0))
    grey.save(tmp_path / "grey.png")
    assert (uint8(tmp_path / "grey.png", 64, 48) == 255).all()
    indexed = Image.new("P", (64, 48), 0)
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.paste(1, (0, 0, 32, 48))
    indexed.save(tmp_path / "indexed.png", transparency=0)
    found = uint8(tmp_path / "indexed.png", 64, 48)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 63].tolist() == [255, 255, 255]


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    """Masks and depth maps are stored so; Pillow's own conversion would cut all above 255 to white."""
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).round().astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        found = uint8(tmp_path / name, 64, 48)
        assert (found - torch.from_numpy(values / 257)[..., None]).abs().max() <= 0.51


def test_other_kinds_of_colour(tmp_path: Path) -> None:
    Image.new("L", (64, 48), 100).save(tmp_path / "grey.jpg")
    assert uint8(tmp_path / "grey.jpg", 64, 48).sub(100).abs().max() <= 1
    Image.new("1", (64, 48), 1).save(tmp_path / "bits.png")
    assert (uint8(tmp_path / "bits.png", 64, 48) == 255).all()
    Image.new("CMYK", (64, 48), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = uint8(tmp_path / "print.jpg", 64, 48)[0, 0].tolist()
    assert red > 250
    assert max(green, blue) < 5
    Image.fromarray(np.ones((48, 64), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"32-bit values(.|\n)*float\.tiff"):
        uint8(tmp_path / "float.tiff", 64, 48)


def test_a_picture_that_became_unreadable_is_named(tmp_path: Path) -> None:
    render_picture(tmp_path / "gone.png", width=64, height=48, seed=1)
    whole = (tmp_path / "gone.png").read_bytes()
    (tmp_path / "gone.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be read as a picture(.|\n)*gone\.png"):
        uint8(tmp_path / "gone.png", 64, 48)
    (tmp_path / "gone.png").unlink()
    with pytest.raises(DataError, match=r"is not there any more(.|\n)*gone\.png"):
        uint8(tmp_path / "gone.png", 64, 48)
