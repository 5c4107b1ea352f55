"""Which frames are decoded: from any frame on the very ones of a full decode, and at any rate those on the screen."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.builtin.datasets.decode import _at_rate, decode_file
from tuner.builtin.datasets.pictures import Unreadable
from tuner.builtin.datasets.seek import WORTHWHILE, frames_from, locate
from tuner.data.samples import Bucket, Framing, View
from tuner.errors import DataError
from tuner.testing.clips import Encoding, render_clip, render_picture, turn_clip

WHOLE = Framing(64, 48, 0, 0)
FRAMES = 50
B_FRAMES = Encoding("libx264", options={"bf": "3", "g": "15"})
ENCODINGS = {
    # name, encoding, whether keyframes are jumped to
    "b-frames.mp4": (B_FRAMES, True),
    "b-frames.mkv": (B_FRAMES, True),
    "open groups.mp4": (
        Encoding("libx264", options={"bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}),
        True,
    ),
    "refreshed.mp4": (Encoding("libx264", options={"x264-params": "intra-refresh=1:keyint=10:bframes=0"}), None),
    "a.mov": (Encoding("libx264", options={"bf": "2", "g": "12"}), True),
    "hevc.mp4": (
        Encoding("libx265", options={"preset": "ultrafast", "x265-params": "log-level=none:keyint=12"}),
        True,
    ),
    "a.webm": (Encoding("libvpx-vp9", options={"g": "16", "lag-in-frames": "16", "auto-alt-ref": "1"}), True),
    "av1.mkv": (Encoding("libsvtav1", options={"g": "16", "preset": "12"}), True),
    "a.gif": (Encoding("gif", "rgb8"), False),
    "a.avi": (Encoding("mpeg4", options={"bf": "2", "g": "12"}), False),
    "a.ts": (Encoding("libx264", options={"bf": "2", "g": "12"}), False),
}
UNEVEN = [index * 40 + (index % 7) * 5 + (index > 20) * 300 for index in range(FRAMES)]


def rendered(folder: Path, name: str, **more: object) -> Path:
    path = folder / name
    size = 128 if "av1" in name else None
    render_clip(path, width=size or 64, height=size or 48, frames=FRAMES, fps=25, seed=2, **more)  # type: ignore[arg-type]
    return path


def all_frames(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def content(frame: av.VideoFrame) -> tuple[int | None, bytes]:
    return frame.pts, frame.to_ndarray(format="rgb24").tobytes()


@pytest.mark.parametrize("name", ENCODINGS)
def test_from_any_frame_on_the_frames_are_those_of_a_full_decode(tmp_path: Path, name: str) -> None:
    encoding, jumps = ENCODINGS[name]
    path = rendered(tmp_path, name, encoding=encoding)
    expected = [content(frame) for frame in all_frames(path)]
    assert len(expected) == FRAMES
    assert len(set(expected)) == FRAMES, "a test where frames look alike shows nothing"
    for start in (*range(0, FRAMES, 7), WORTHWHILE, 30, 36, FRAMES - 1):
        found = [content(frame) for _, frame in zip(range(6), frames_from(path, start), strict=False)]
        assert found == expected[start : start + 6], start
    with av.open(str(path)) as container:
        place = locate(container, container.streams.video[0], FRAMES - 1)
    assert jumps is None or (place is not None) == jumps


def test_frames_of_a_variable_rate_are_found_too(tmp_path: Path) -> None:
    path = rendered(tmp_path, "uneven.mkv", encoding=B_FRAMES, times=UNEVEN)
    expected = [content(frame) for frame in all_frames(path)]
    for start in range(FRAMES):
        assert content(next(frames_from(path, start))) == expected[start]


def test_decoding_starts_at_the_view(tmp_path: Path) -> None:
    path = rendered(tmp_path, "a.mp4", encoding=B_FRAMES)
    whole = decode_file(path, View(WHOLE), Bucket(FRAMES, 48, 64))
    for start in (0, 1, 17, 33):
        part = decode_file(path, View(WHOLE, start=start), Bucket(9, 48, 64))
        assert torch.equal(part, whole[:, start : start + 9])


@pytest.mark.parametrize("fps", [5.0, 12.5, 16.0, 24.0, 25.0, 29.97, 60.0])
@pytest.mark.parametrize("times", [None, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("start", [0, 19])
def test_at_a_rate_each_frame_is_the_one_on_the_screen(
    tmp_path: Path, fps: float, times: list[int] | None, start: int
) -> None:
    path = rendered(tmp_path, "a.mkv", encoding=B_FRAMES, times=times)
    frames = all_frames(path)
    whole = decode_file(path, View(WHOLE), Bucket(FRAMES, 48, 64))
    shown = [frame.pts for frame in frames]  # milliseconds
    count = int((shown[-1] + 40 - shown[start]) * fps // 1000)
    found = decode_file(path, View(WHOLE, start, fps), Bucket(count, 48, 64))
    on_screen = [
        max(index for index in range(FRAMES) if shown[index] <= shown[start] + k * 1000 / fps + 0.5)
        for k in range(count)
    ]
    assert torch.equal(found, whole[:, on_screen])
    if fps == 60 and times is None:
        assert len(set(on_screen)) < count, "some are repeated"


def test_the_own_rate_takes_every_frame_once(tmp_path: Path) -> None:
    """At 24 frames per second times rounded to milliseconds are early and late in turns."""
    path = tmp_path / "a.mkv"
    render_clip(path, width=64, height=48, frames=FRAMES, fps=24, seed=2)
    bucket = Bucket(FRAMES, 48, 64)
    assert torch.equal(decode_file(path, View(WHOLE, 0, 24.0), bucket), decode_file(path, View(WHOLE), bucket))


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(1, 500), min_size=0, max_size=30),
    last=st.integers(1, 500),
    fps=st.sampled_from([1.0, 7.0, 16.0, 23.976, 24.0, 30.0, 120.0]),
)
def test_every_moment_has_one_frame(gaps: list[int], last: int, fps: float) -> None:
    frames, pts = [], 1000
    for length in (*gaps, last):
        frame = av.VideoFrame(16, 16, "rgb24")
        frame.pts, frame.time_base, frame.duration = pts, Fraction(1, 1000), length
        frames.append(frame)
        pts += length
    times = [frame.pts for frame in frames]
    found = [frame.pts for frame, count in _at_rate(frames, fps) for _ in range(count)]
    seconds = (sum(gaps) + last) / 1000
    assert len(found) >= int(seconds * fps)
    for k, shown in enumerate(found):
        moment = 1000 + k * 1000 / fps
        latest = max(time for time in times if time <= moment + 0.5)
        assert shown == latest or abs(moment + 0.5 - latest) < 1e-6


def test_frames_without_times_are_not_resampled() -> None:
    with pytest.raises(Unreadable, match="times of its frames"):
        list(_at_rate([av.VideoFrame(16, 16, "rgb24")] * 2, 8.0))


def test_what_is_too_short_says_from_where(tmp_path: Path) -> None:
    path = rendered(tmp_path, "a.mp4")
    with pytest.raises(DataError, match=r"ends after 5 frames where 9 are needed \(.*from frame 45\)"):
        decode_file(path, View(WHOLE, start=45), Bucket(9, 48, 64))
    with pytest.raises(DataError, match=r"ends after 0 frames where 1 .*from frame 500"):
        decode_file(path, View(WHOLE, start=500), Bucket(1, 48, 64))
    with pytest.raises(DataError, match=r"ends after 1\d frames where 30 are needed \(.*from frame 10 at 8 fps\)"):
        decode_file(path, View(WHOLE, 10, 8.0), Bucket(30, 48, 64))


@pytest.mark.parametrize("name", ["one.png", "one.mp4", "one.webm", "one.gif"])
def test_one_picture_stays_for_the_whole_clip(tmp_path: Path, name: str) -> None:
    if name.endswith("png"):
        render_picture(tmp_path / name, width=64, height=48, seed=1)
    else:
        codec = {"webm": Encoding("libvpx-vp9"), "gif": Encoding("gif", "rgb8"), "mp4": Encoding("libx264")}
        encoding = codec[name.split(".")[1]]
        render_clip(tmp_path / name, width=64, height=48, frames=1, fps=10, seed=1, encoding=encoding)
    one = decode_file(tmp_path / name, View(WHOLE), Bucket(1, 48, 64))
    for view in (View(WHOLE), View(WHOLE, start=20), View(WHOLE, 3, 16.0)):
        several = decode_file(tmp_path / name, view, Bucket(5, 48, 64))
        assert torch.equal(several, one.expand(3, 5, 48, 64))


def test_a_phone_clip_is_upright_from_any_frame(tmp_path: Path) -> None:
    path = rendered(tmp_path, "phone.mp4", encoding=B_FRAMES)
    flat = decode_file(path, View(WHOLE, start=31), Bucket(2, 48, 64))
    turn_clip(path)
    upright = decode_file(path, View(Framing(48, 64, 0, 0), start=31), Bucket(2, 64, 48))
    assert torch.equal(upright, flat.rot90(-1, (2, 3)))


@pytest.mark.parametrize("name", ["b-frames.mp4", "a.gif"])
def test_a_region_of_any_frame_is_that_of_the_whole(tmp_path: Path, name: str) -> None:
    path = rendered(tmp_path, name, encoding=ENCODINGS[name][0])
    whole = decode_file(path, View(Framing(32, 24, 0, 0)), Bucket(4, 24, 32))
    part = decode_file(path, View(Framing(32, 24, 7, 3)), Bucket(4, 16, 20))
    assert torch.equal(part, whole[:, :, 3:19, 7:27])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    path = rendered(tmp_path, "a.mp4", encoding=B_FRAMES)
    render_picture(tmp_path / "a.png", width=64, height=48, seed=1)
    decode_file(path, View(WHOLE, start=40), Bucket(2, 48, 64))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for start in (0, 3, 40):
        decode_file(path, View(WHOLE, start=start), Bucket(2, 48, 64))
        with pytest.raises(DataError):
            decode_file(path, View(WHOLE, start=start), Bucket(70, 48, 64))
    decode_file(tmp_path / "a.png", View(WHOLE), Bucket(1, 48, 64))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "rgb24", "bgra", "gray", "nv12"])
def test_planes_of_colours_hold_what_rgb24_holds(pixels: str) -> None:
    """What is decoded is taken from planes because that is fast; it must be what everyone calls the picture."""
    from tuner.builtin.datasets.decode import SWSCALE, Scaler

    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, "rgb24").reformat(format=pixels)
    values = np.empty((3, 1, 24, 40), np.float32)
    Scaler(Framing(40, 24, 0, 0), Bucket(1, 24, 40)).draw(frame, values)
    colours = {} if frame.format.is_rgb else {"src_colorspace": 5}
    expected = frame.reformat(40, 24, "rgb24", interpolation=SWSCALE, **colours).to_ndarray()
    assert np.abs(np.rint((values[:, 0] + 1) * 127.5) - expected.transpose(2, 0, 1)).max() == 0
