"""Rendered clips are real videos that show what their captions say."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tuner.testing.clips import COLOURS, FOLDER_CLIPS, Scene, Shape, draw_frame, render_clip, render_folder, scene


def decoded(path: Path) -> tuple[list[np.ndarray], float, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.average_rate), stream.codec_context.name


def test_a_clip_has_the_size_length_and_rate_asked_for(tmp_path: Path) -> None:
    caption = render_clip(tmp_path / "clip.mp4", width=96, height=64, frames=13, fps=12, seed=3)
    frames, rate, codec = decoded(tmp_path / "clip.mp4")
    assert (len(frames), frames[0].shape, rate, codec) == (13, (64, 96, 3), 12.0, "h264")
    assert caption == scene(3).caption
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 100, "something moves"


def test_what_is_drawn_is_what_the_caption_says() -> None:
    drawn = Scene("blue", (Shape("square", "red", "from left to right", 0.5, 0.2),))
    assert drawn.caption == "A red square moving from left to right over a blue background."
    centres = []
    for time in (0.0, 0.5, 1.0):
        picture = np.asarray(draw_frame(drawn, time, 96, 64)).astype(int)
        red = np.abs(picture - COLOURS["red"]).sum(-1) < 30
        assert red.any()
        centres.append(np.argwhere(red).mean(0))
    assert centres[0][1] < centres[1][1] - 20 < centres[2][1] - 40
    assert abs(centres[0][0] - centres[2][0]) < 2


def test_a_folder_holds_captioned_clips_of_different_sizes_lengths_and_rates(tmp_path: Path) -> None:
    paths = render_folder(tmp_path / "clips")
    assert len(paths) == 8
    shapes = set()
    for path, (width, height, length, fps) in zip(paths, FOLDER_CLIPS, strict=True):
        frames, rate, _ = decoded(path)
        assert (len(frames), frames[0].shape[:2], rate) == (length, (height, width), fps)
        shapes.add((frames[0].shape, len(frames), rate))
        captions = path.with_suffix(".txt").read_text().splitlines()
        assert len(captions) == 2
        assert all(captions)
    assert len(shapes) == 8


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, second, other = (render_folder(tmp_path / name, 2, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.read_bytes() for path in first] != [path.read_bytes() for path in other]


def test_an_interrupted_folder_is_completed_and_nothing_overwritten(tmp_path: Path) -> None:
    first = render_folder(tmp_path, 1)[0]
    first.with_suffix(".txt").write_text("my own caption\n")
    stamp = first.stat().st_mtime_ns
    paths = render_folder(tmp_path, 3)
    assert len(paths) == 3
    assert first.stat().st_mtime_ns == stamp
    assert first.with_suffix(".txt").read_text() == "my own caption\n"
    with pytest.raises(FileExistsError):
        render_clip(first, width=32, height=32, frames=1, fps=16, seed=0)


@pytest.mark.parametrize(("width", "height", "frames"), [(33, 32, 5), (32, 31, 5), (8, 32, 5), (32, 32, 0)])
def test_sizes_that_the_codec_does_not_have_are_refused(tmp_path: Path, width: int, height: int, frames: int) -> None:
    with pytest.raises(ValueError, match="sizes are even"):
        render_clip(tmp_path / "clip.mp4", width=width, height=height, frames=frames, fps=16, seed=0)
    assert not list(tmp_path.iterdir())
