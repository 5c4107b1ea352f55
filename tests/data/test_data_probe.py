"""Probing: right about good files and calm about bad ones."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tuner.builtin.datasets import probe as probing
from tuner.builtin.datasets.probe import Probed
from tuner.builtin.datasets.probe_file import VideoFacts, probe_file
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, local_listing, scan
from tuner.errors import DataError
from tuner.testing.clips import Encoding, render_clip, render_picture, turn_clip

ALL_SUFFIXES = VIDEO_SUFFIXES | PICTURE_SUFFIXES
SIZE = {"width": 64, "height": 48}


def probe_folder(folder: Path, index: Path, *, processes: int = 0, **wanted: bool) -> list[Probed]:
    return list(probing.probe(local_listing(folder, ALL_SUFFIXES), index, processes=processes, **wanted))


def encode(path: Path, frames: int, *, codec: str = "libx264", **stream: object) -> None:
    """A clip of grey frames."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=16)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for name, value in stream.items():
            setattr(video.codec_context, name, value)
        for index in range(frames):
            picture = np.full((48, 64, 3), index * 5 % 255, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(video.encode())


def test_facts_of_a_clip(clips: Path) -> None:
    facts = probe_file(clips / "wide two.mp4")
    assert isinstance(facts, VideoFacts)
    assert (facts.width, facts.height, facts.frames, facts.fps) == (96, 64, 17, 16.0)
    assert facts.duration == pytest.approx(17 / 16)
    assert facts.sha256 == hashlib.sha256((clips / "wide two.mp4").read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("a.mov", "libx264"), ("a.mkv", "mpeg4")])
def test_other_containers(tmp_path: Path, name: str, codec: str) -> None:
    encode(tmp_path / name, 11, codec=codec)
    (found,) = probe_folder(tmp_path, tmp_path / "index")
    assert found.facts is not None
    assert (found.facts.width, found.facts.height, found.facts.frames) == (64, 48, 11)


def test_stored_pixels_that_are_not_square_count_as_displayed(tmp_path: Path) -> None:
    encode(tmp_path / "anamorphic.mp4", 3, sample_aspect_ratio=Fraction(2, 1))
    facts = probe_file(tmp_path / "anamorphic.mp4")
    assert isinstance(facts, VideoFacts)
    assert (facts.width, facts.height) == (128, 48)


def test_bad_files_are_recorded_with_their_reason(clips: Path, tmp_path: Path) -> None:
    whole = (clips / "wide.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("this is no video")
    shutil.copy(clips / "wide.mp4", tmp_path / "good one 😀.mp4")
    results = {each.name: each for each in probe_folder(tmp_path, tmp_path / "index")}
    assert "empty" in results["empty.mp4"].reason
    assert "cannot be read" in results["text.mp4"].reason
    assert "cannot be read" in results["cut.mp4"].reason
    good = results["good one 😀.mp4"].facts
    assert good is not None
    assert good.frames == 20


def test_a_file_cut_behind_its_index_counts_the_frames_it_has(tmp_path: Path) -> None:
    """With the index in front (`faststart`) a cut file opens, and claims frames that are gone."""
    path = tmp_path / "front.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("mpeg4", rate=16)
        video.width, video.height, video.pix_fmt, video.bit_rate = 64, 64, "yuv420p", 4_000_000
        for index in range(40):
            noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(video.encode())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    facts = probe_file(path)
    assert isinstance(facts, VideoFacts)
    assert 10 < facts.frames < 30


PICTURES = ("a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "a.tiff", "a.avif")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path: Path, name: str) -> None:
    render_picture(tmp_path / name, width=80, height=48, seed=1)
    facts = probe_file(tmp_path / name)
    assert isinstance(facts, VideoFacts), facts
    assert facts[1:6] == (80, 48, 1, 0.0, 0.0)
    assert facts.still
    assert facts.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
def test_a_picture_taken_with_an_upright_phone_is_as_high_as_it_is_shown(tmp_path: Path, name: str) -> None:
    render_picture(tmp_path / name, width=80, height=48, seed=1, orientation=6)
    facts = probe_file(tmp_path / name)
    assert isinstance(facts, VideoFacts), facts
    assert (facts.width, facts.height) == (48, 80)


def test_an_animated_webp_is_its_first_picture(tmp_path: Path) -> None:
    first, *others = [Image.new("RGB", (40, 24), colour) for colour in ("red", "green", "blue")]
    first.save(tmp_path / "moving.webp", save_all=True, append_images=others)
    facts = probe_file(tmp_path / "moving.webp")
    assert isinstance(facts, VideoFacts)
    assert (facts.width, facts.height, facts.frames, facts.still) == (40, 24, 1, True)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp"])
def test_a_picture_cut_short_is_a_reason(tmp_path: Path, name: str) -> None:
    render_picture(tmp_path / name, width=320, height=240, seed=1)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    reason = probe_file(tmp_path / name)
    assert isinstance(reason, str)
    assert "picture" in reason


def test_a_picture_too_large_to_be_honest_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_picture(tmp_path / "bomb.png", width=320, height=240, seed=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    reason = probe_file(tmp_path / "bomb.png")
    assert isinstance(reason, str)
    assert "decompression bomb" in reason


@pytest.mark.parametrize(
    ("name", "encoding", "container"),
    [
        ("a.mp4", Encoding("libx264", options={"bf": "3"}), "mp4"),
        ("a.webm", Encoding("libvpx-vp9"), "webm"),
        ("a.mov", Encoding("libx264"), "mov"),
        ("a.gif", Encoding("gif", "rgb8"), "gif"),
        ("a.avi", Encoding("mpeg4", options={"bf": "2"}), "avi"),
        ("a.ts", Encoding("libx264"), "mpegts"),
    ],
)
def test_clips(tmp_path: Path, name: str, encoding: Encoding, container: str) -> None:
    render_clip(tmp_path / name, **SIZE, frames=15, fps=10, seed=1, encoding=encoding)
    facts = probe_file(tmp_path / name)
    assert isinstance(facts, VideoFacts), facts
    assert facts[1:5] == (64, 48, 15, 10.0)
    assert facts.duration == pytest.approx(1.5, abs=0.01)
    assert (facts.variable, facts.still, facts.container) == (False, False, container)


def test_a_phone_clip_is_as_high_as_it_is_shown(tmp_path: Path) -> None:
    render_clip(tmp_path / "phone.mov", **SIZE, frames=3, fps=16, seed=1)
    turn_clip(tmp_path / "phone.mov")
    facts = probe_file(tmp_path / "phone.mov")
    assert isinstance(facts, VideoFacts)
    assert (facts.width, facts.height) == (48, 64)


def test_a_variable_rate_is_averaged_and_said(tmp_path: Path) -> None:
    times = [0, 40, 80, 120, 400, 440, 1000, 1040]
    render_clip(tmp_path / "uneven.mkv", **SIZE, frames=8, fps=25, seed=1, times=times)
    facts = probe_file(tmp_path / "uneven.mkv")
    assert isinstance(facts, VideoFacts)
    assert facts.variable
    assert facts.duration == pytest.approx(1.08, abs=0.002)
    assert facts.fps == pytest.approx(8 / 1.08, rel=0.002)


@pytest.mark.parametrize("fps", [24, 30, 60])
def test_rounding_to_milliseconds_is_no_variable_rate(tmp_path: Path, fps: int) -> None:
    render_clip(tmp_path / "even.mkv", **SIZE, frames=20, fps=fps, seed=1)
    facts = probe_file(tmp_path / "even.mkv")
    assert isinstance(facts, VideoFacts)
    assert (facts.fps, facts.variable) == (fps, False)


def test_a_song_is_no_clip_even_with_a_cover(tmp_path: Path) -> None:
    cover = tmp_path / "cover.png"
    render_picture(cover, width=48, height=48, seed=1)
    for name, covered in (("plain.mp4", False), ("covered.mp4", True)):
        with av.open(str(tmp_path / name), "w") as container, av.open(str(cover)) as picture:
            audio = container.add_stream("aac", rate=44100)
            if covered:
                image = container.add_stream_from_template(picture.streams.video[0])
                image.disposition = 1024
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44100
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
            if covered:
                packet = next(picture.demux(video=0))
                packet.stream = image
                container.mux(packet)
        assert probe_file(tmp_path / name) == "has no video stream, only sound", name


def test_what_a_file_is_counts_and_not_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    render_clip(folder / "a clip.mp4", **SIZE, frames=5, fps=16, seed=1)
    (folder / "a clip.mp4").rename(folder / "clip.png")
    render_picture(folder / "a picture.jpg", **SIZE, seed=1)
    (folder / "a picture.jpg").rename(folder / "picture.mp4")
    both = {each.name: each.facts for each in probe_folder(folder, tmp_path / "index")}
    assert both["clip.png"] is not None
    assert both["picture.mp4"] is not None
    assert (both["clip.png"].frames, both["picture.mp4"].still) == (5, True)
    for_clips = {each.name: each for each in probe_folder(folder, tmp_path / "index", pictures=False)}
    assert for_clips["clip.png"].facts
    assert for_clips["picture.mp4"].reason.startswith("is a picture (jpeg), not a clip")
    for_pictures = {each.name: each for each in probe_folder(folder, tmp_path / "index", clips=False)}
    assert for_pictures["clip.png"].reason.startswith("is a clip (mov), not a picture")


def test_a_picture_of_a_kind_that_is_not_read_is_no_clip(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "old.pcx")
    (tmp_path / "old.pcx").rename(tmp_path / "old.png")
    reason = probe_file(tmp_path / "old.png")
    assert isinstance(reason, str)
    assert "kind that is not read here" in reason


def test_names_of_all_kinds(tmp_path: Path) -> None:
    names = ["two words.mp4", "猫 in the box.mp4", "😀 emoji/ünï.mp4", "50%d 'quoted' [x].mp4", "-dash.mp4"]
    folder = tmp_path / "файлы"
    for name in names:
        render_clip(folder / name, **SIZE, frames=3, fps=16, seed=1)
    probed = probe_folder(folder, tmp_path / "index")
    assert sorted(each.name for each in probed) == sorted(names)
    assert all(each.facts for each in probed)
    assert probe_folder(folder, tmp_path / "index") == probed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are always text")
def test_a_name_that_is_no_text_is_a_reason(clips: Path, tmp_path: Path) -> None:
    shutil.copy(clips / "wide.mp4", os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4"))  # noqa: PTH118
    (found,) = probe_folder(tmp_path, tmp_path / "index")
    assert "UTF-8" in found.reason
    assert found.name == "caf\\udce9.mp4"
    assert probe_folder(tmp_path, tmp_path / "index") == [found], "nor on a second start"


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read: No such file(.|\n)*nowhere"):
        local_listing(tmp_path / "nowhere", VIDEO_SUFFIXES)


def test_scanning_is_recursive_and_leaves_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ["b.mp4", "sub/a.MOV", ".hidden/c.mp4", "sub/._b.mp4", "b.txt", "picture.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone")
    assert [each.path.removeprefix(f"{tmp_path}/") for each in scan(tmp_path)] == ["b.mp4", "sub/a.MOV"]


def test_files_and_folders_that_alternate_are_sorted_by_path(tmp_path: Path) -> None:
    for name in ["b.mp4", "a/z.mp4", "a.mp4", "a b.mp4", "a/a/y.mp4", "c/x.mp4", "a0.mp4", "b/b.webm"]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    files = scan(tmp_path)
    expected = sorted(
        os.path.join(folder, name)  # noqa: PTH118
        for folder, _, names in os.walk(tmp_path)
        for name in names
    )
    assert [each.path for each in files] == expected
    for each in files:
        status = Path(each.path).stat()
        assert (each.size, each.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert [files[2], *files[3:5]] == list(files)[2:5]


def test_a_folder_inside_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    original = os.open

    def refused(path: str, flags: int) -> int:
        if path.rstrip(os.sep).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return original(path, flags)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied(.|\n)*locked"):
        local_listing(tmp_path, VIDEO_SUFFIXES)
