"""Probing: right about good files, calm about bad ones, and idle on a second start."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tuner.builtin.datasets import probe as probing
from tuner.builtin.datasets.probe import INDEX_NAME, VIDEO_SUFFIXES, Probed, local_listing, scan
from tuner.data.probe_file import VideoFacts, probe_file


def probe_folder(folder: Path, index: Path, *, processes: int = 0) -> list[Probed]:
    return probing.probe(local_listing(folder, VIDEO_SUFFIXES), index, processes=processes)


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


def test_scanning_is_recursive_and_leaves_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ["b.mp4", "sub/a.MOV", ".hidden/c.mp4", "sub/._b.mp4", "b.txt", "picture.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone")
    assert [each.path.removeprefix(f"{tmp_path}/") for each in scan(tmp_path)] == ["b.mp4", "sub/a.MOV"]


def test_a_second_start_opens_only_what_changed(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "bad.mp4").write_text("no video")
    first = probe_folder(folder, tmp_path / "index")
    opened: list[str] = []

    def spy(path: Path) -> VideoFacts | str:
        opened.append(path.name)
        return probe_file(path)

    monkeypatch.setattr(probing, "probe_file", spy)
    assert probe_folder(folder, tmp_path / "index") == first
    assert opened == []
    os.utime(folder / "wide.mp4", ns=(1, 1))
    assert probe_folder(folder, tmp_path / "index") == first
    assert opened == ["wide.mp4"]


def test_several_processes_find_the_same(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = probe_folder(clips, tmp_path / "one", processes=1)
    monkeypatch.setattr(probing, "FEW", 0)
    assert probe_folder(clips, tmp_path / "two", processes=2) == alone


def test_what_was_probed_before_an_interruption_is_kept(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def interrupted(path: Path) -> VideoFacts | str:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return probe_file(path)

    monkeypatch.setattr(probing, "WRITE_EVERY", 1)
    monkeypatch.setattr(probing, "probe_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_folder(clips, tmp_path)
    again = probe_folder(clips, tmp_path)
    assert len(calls) == 4, "only the one that was not finished is probed again"
    assert all(each.facts for each in again)


def test_a_damaged_index_is_put_aside_and_made_again(clips: Path, tmp_path: Path) -> None:
    first = probe_folder(clips, tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(b"not a database" * 100)
    assert probe_folder(clips, tmp_path) == first
    assert list(tmp_path.glob(f"{INDEX_NAME}.damaged-*"))


def test_an_index_of_another_version_is_filled_afresh(clips: Path, tmp_path: Path) -> None:
    first = probe_folder(clips, tmp_path)
    connection = sqlite3.connect(tmp_path / INDEX_NAME)
    connection.execute("DROP TABLE files")
    connection.execute("CREATE TABLE files (path TEXT)")
    connection.execute("PRAGMA user_version = 999")
    connection.commit()
    connection.close()
    assert probe_folder(clips, tmp_path) == first


def test_probing_processes_import_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "pydantic", "rich")
    code = f"import sys, tuner.data.probe_file; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
