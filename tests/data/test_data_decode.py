"""Decoding: the right frames, upright, in the right colours, framed as the sample says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tuner.builtin.buckets import framing
from tuner.builtin.datasets.decode import decode
from tuner.builtin.datasets.probe_file import VideoFacts, probe_file
from tuner.data.samples import Bucket, Sample, View
from tuner.errors import DataError

QUARTER_RIGHT = b"".join(
    value.to_bytes(4, "big", signed=True) for value in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
)
"""The display matrix that phones write for a clip to be turned clockwise by 90 degrees."""


def write(path: Path, pictures: list[np.ndarray], *, aspect: Fraction | None = None) -> Path:
    """A nearly lossless clip of these RGB pictures (H, W, 3), all 4:4:4."""
    with av.open(str(path), "w") as container:
        height, width, _ = pictures[0].shape
        video = container.add_stream("libx264", rate=16, options={"qp": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv444p"
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            container.mux(video.encode(frame.reformat(format="yuv444p", dst_colorspace=5)))
        container.mux(video.encode())
    return path


def sample_of(path: Path, bucket: Bucket) -> Sample:
    facts = probe_file(path)
    assert isinstance(facts, VideoFacts), facts
    framed = framing(facts.width, facts.height, bucket)
    width, height, views = facts.width, facts.height, (View(framed),)
    return Sample("s", "d", path, facts.sha256, ("",), width, height, facts.frames, facts.fps, bucket, views, path)


def decoded(sample: Sample) -> torch.Tensor:
    return decode(sample, sample.views[0])


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some detail, (height, width, 3) uint8."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    fine = interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return (fine * 255).round().to(torch.uint8).numpy()


def uint8(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round()


def test_frames_come_from_the_beginning_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "steps.mp4", [np.full((64, 64, 3), 20 * index, np.uint8) for index in range(10)])
    pixels = decoded(sample_of(path, Bucket(5, 64, 64)))
    assert pixels.shape == (3, 5, 64, 64)
    assert pixels.dtype == torch.float32
    assert torch.allclose(uint8(pixels).mean((0, 2, 3)), torch.tensor([0.0, 20, 40, 60, 80]), atol=2)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_resizing_equals_antialiased_bicubic(tmp_path: Path) -> None:
    picture = photograph(192, 256)
    path = write(tmp_path / "photo.mp4", [picture] * 2)
    sample = sample_of(path, Bucket(1, 80, 112))
    whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    size = (sample.views[0].framing.height, sample.views[0].framing.width)
    expected = interpolate(whole, size, mode="bicubic", antialias=True).clamp(0, 255)[0]
    top, left = sample.views[0].framing.top, sample.views[0].framing.left
    error = (uint8(decoded(sample))[:, 0] - expected[:, top : top + 80, left : left + 112]).abs()
    assert error.mean() < 1
    assert error.max() < 6


def test_a_phone_clip_is_turned_upright(tmp_path: Path) -> None:
    picture = photograph(64, 96)
    path = write(tmp_path / "phone.mp4", [picture] * 2)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40
    path.write_bytes(data[:at] + QUARTER_RIGHT + data[at + 36 :])
    sample = sample_of(path, Bucket(1, 96, 64))
    assert (sample.width, sample.height) == (64, 96)
    clockwise = torch.from_numpy(np.rot90(picture, k=-1).copy()).permute(2, 0, 1)
    assert (uint8(decoded(sample))[:, 0] - clockwise).abs().mean() < 1


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    picture = photograph(64, 64)
    path = write(tmp_path / "anamorphic.mp4", [picture] * 2, aspect=Fraction(2, 1))
    sample = sample_of(path, Bucket(1, 64, 128))
    assert (sample.width, sample.height) == (128, 64)
    whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
    expected = interpolate(whole, (64, 128), mode="bicubic", antialias=True).clamp(0, 255)[0]
    assert (uint8(decoded(sample))[:, 0] - expected).abs().mean() < 1.5


@pytest.mark.parametrize(
    ("width", "height", "tag", "written"),
    [(96, 64, None, 5), (96, 64, 1, 1), (1280, 64, None, 1)],
    ids=["small and untagged is BT.601", "tagged BT.709", "large and untagged is BT.709"],
)
def test_colours(tmp_path: Path, width: int, height: int, tag: int | None, written: int) -> None:
    """Saturated colours come back as they went in, whichever matrix they were stored with."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2] = (200, 30, 40)
    picture[:, width // 2 :] = (20, 180, 60)
    path = tmp_path / "colours.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16, options={"qp": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv444p"
        if tag is not None:
            video.codec_context.colorspace = tag
        stored = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv444p", dst_colorspace=written)
        stored.colorspace = 2 if tag is None else tag
        container.mux(video.encode(stored))
        container.mux(video.encode())
    pixels = uint8(decoded(sample_of(path, Bucket(1, height, width))))[:, 0]
    assert torch.allclose(pixels[:, 8, 8], torch.tensor([200.0, 30, 40]), atol=4)
    assert torch.allclose(pixels[:, 8, -8], torch.tensor([20.0, 180, 60]), atol=4)


def test_a_clip_that_ends_too_early_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "short one.mp4", [photograph(64, 64)] * 3)
    with pytest.raises(DataError, match=r"ends after 3 frames where 5 are needed(.|\n)*short one\.mp4"):
        decoded(sample_of(path, Bucket(5, 64, 64)))


def test_a_clip_that_became_unreadable_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "gone.mp4", [photograph(64, 64)] * 3)
    sample = sample_of(path, Bucket(1, 64, 64))
    path.write_bytes(b"overwritten")
    with pytest.raises(DataError, match=r"cannot be decoded after frame 0(.|\n)*gone\.mp4"):
        decoded(sample)


def test_pixels_of_a_stored_clip_stay_what_they_are() -> None:
    """Golden: when this fails, `ENCODING` in `builtin/encoding` must be raised, or old entries are read as new."""
    pixels = decoded(sample_of(Path(__file__).parent / "golden_clip.mp4", Bucket(5, 48, 64)))
    halves = torch.nn.functional.adaptive_avg_pool3d(pixels, (2, 2, 2)).flatten()
    red = [0.7176, 0.7175, 0.3417, 0.3546, 0.6326, 0.6466, 0.3795, 0.386]
    green = [0.0475, 0.0494, -0.2079, -0.1959, -0.0267, -0.0129, -0.1646, -0.1595]
    blue = [-0.6586, -0.6659, -0.4921, -0.5451, -0.4967, -0.54, -0.6444, -0.6672]
    assert torch.allclose(halves, torch.tensor(red + green + blue), atol=2e-3)
