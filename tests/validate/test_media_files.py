"""Clips and pictures, read back by a decoder."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tuner.builtin.sampling import media
from tuner.builtin.sampling.media import evenly, write_mp4, write_png
from tuner.builtin.sampling.sheet import Row, contact_sheet, write_contact_sheet

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 220), (230, 220, 60))


def clip(frames=9, height=48, width=64):
    """Frames whose colour changes with time, with a bright square that moves right."""
    pixels = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        pixels[index] = COLOURS[index % len(COLOURS)]
        left = index * (width - 12) // max(1, frames - 1)
        pixels[index, 18:30, left : left + 12] = 255
    return pixels


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream.average_rate, stream.codec_context


@pytest.mark.parametrize("fps", [16, 24, 23.976])
def test_a_clip_decodes_to_what_was_written(tmp_path, fps):
    pixels = clip()
    write_mp4(tmp_path / "clip.mp4", pixels, fps)
    decoded, rate, codec = decode(tmp_path / "clip.mp4")
    assert decoded.shape == pixels.shape
    assert rate == Fraction(fps).limit_denominator(1001)
    assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def test_colours_are_tagged_as_written(tmp_path):
    pixels = np.full((3, 32, 32, 3), (220, 40, 40), np.uint8)
    write_mp4(tmp_path / "clip.mp4", pixels, 16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (int(frame.colorspace), int(frame.color_range)) == (1, 1)  # BT.709, limited
        plane = frame.to_ndarray(format="yuv420p")
    y, u, v = int(plane[8, 8]), int(plane[32:40].flat[0]), int(plane[40:].flat[0])
    red, green, blue = (channel / 255 for channel in (220, 40, 40))
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = (
        16 + 219 * luma,
        128 + 224 * (blue - luma) / 1.8556,
        128 + 224 * (red - luma) / 1.5748,
    )
    assert (y, u, v) == pytest.approx(expected, abs=2.5)


def test_odd_sizes_get_their_last_row_and_column_twice(tmp_path):
    write_mp4(tmp_path / "clip.mp4", clip(height=33, width=51), 16)
    decoded, _, _ = decode(tmp_path / "clip.mp4")
    assert decoded.shape == (9, 34, 52, 3)
    assert np.abs(decoded[:, 33].astype(int) - decoded[:, 32]).mean() < 6


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3), np.float32)],
)
def test_what_is_no_clip_is_refused(tmp_path, pixels):
    with pytest.raises(ValueError, match="frames must be"):
        write_mp4(tmp_path / "clip.mp4", pixels, 16)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_leaves_the_old_clip(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"the clip of before")

    def broken(frames):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media.np, "ascontiguousarray", broken)
    with pytest.raises(OSError, match="No space left"):
        write_mp4(path, clip(), 16)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"the clip of before"]


def test_a_picture_is_exact(tmp_path):
    write_png(tmp_path / "picture.png", clip()[0])
    with Image.open(tmp_path / "picture.png") as picture:
        assert np.array_equal(np.asarray(picture), clip()[0])


def test_frames_of_a_sheet_are_spread_from_first_to_last():
    frames = np.arange(21).reshape(21, 1, 1, 1)
    assert evenly(frames, 6).flatten().tolist() == [0, 4, 8, 12, 16, 20]
    assert evenly(frames[:3], 6).flatten().tolist() == [0, 1, 2]


def test_the_sheet_shows_every_prompt_in_its_row(tmp_path):
    red, blue = np.full((9, 48, 64, 3), (250, 0, 0), np.uint8), np.full((9, 64, 48, 3), (0, 0, 250), np.uint8)
    rows = [Row("wide", "a long prompt " * 30, red), Row("tall", "short", blue)]
    sheet = np.asarray(contact_sheet(rows, title="step 10", subtitle="details"))

    def shown(colour):
        mask = (np.abs(sheet.astype(int) - colour) < 6).all(-1)
        return mask.sum(), np.nonzero(mask.any(1))[0]

    reds, red_rows = shown((250, 0, 0))
    blues, blue_rows = shown((0, 0, 250))
    assert reds == 6 * 208 * 156
    assert blues == 6 * 208 * 156
    assert red_rows.max() < blue_rows.min()
    labels = sheet[red_rows.min() : red_rows.max(), :260]
    assert (labels > 150).any()  # the words are beside their row

    write_contact_sheet(tmp_path / "sheet.png", rows, title="step 10")
    assert Image.open(tmp_path / "sheet.png").size == (sheet.shape[1], sheet.shape[0])


@pytest.mark.parametrize("text", ["一只猫坐在窗台上，看着外面的雨", "w" * 500, "", "emoji 🎬"])
def test_any_prompt_fits_a_sheet(text):
    contact_sheet([Row("name" * 40, text, clip(1, 16, 16))], title="step 0")
