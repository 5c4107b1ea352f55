"""Probing: right about good files, calm about bad ones, and idle on a second start."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tuner.builtin.datasets import probe as probing
from tuner.builtin.datasets import probe_pool
from tuner.builtin.datasets.probe import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Probed, forget_missing, local_listing, scan
from tuner.builtin.datasets.probe_index import INDEX_NAME, open_index
from tuner.builtin.datasets.probe_pool import CRASHED
from tuner.data.probe_file import VideoFacts, probe_file
from tuner.errors import DataError
from tuner.testing.clips import Encoding, render_clip, render_picture, turn_clip

ALL_SUFFIXES = VIDEO_SUFFIXES | PICTURE_SUFFIXES
SIZE = {"width": 64, "height": 48}


def probe_folder(folder: Path, index: Path, *, processes: int = 0, **wanted: bool) -> list[Probed]:
    return probing.probe(local_listing(folder, ALL_SUFFIXES), index, processes=processes, **wanted)


def write_worker(folder: Path, code: str) -> Path:
    """A module ``own_probe`` for the probing processes: ``code`` runs before each file; its names go to a log."""
    log = folder / "probed names.log"
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    (folder / "own_probe.py").write_text(
        "import os, signal, time\nfrom tuner.data import probe_file as module\noriginal = module.probe_file\n"
        f"def probe_file(path):\n    open({str(log)!r}, 'a').write(path.name + '\\n')\n{indented}"
        "    return original(path)\n"
        "module.probe_file = probe_file\nmodule.serve()\n"
    )
    return log


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], list[str]]]:
    """Have ``code`` run in the probing processes before each file; the answer says which names were probed."""

    def write(code: str) -> Callable[[], list[str]]:
        log = write_worker(tmp_path, code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(probe_pool, "WORKER", "own_probe")
        return lambda: log.read_text().splitlines() if log.exists() else []

    return write


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


def test_a_second_start_opens_only_what_changed(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    (folder / "bad.mp4").write_text("no video")
    first = probe_folder(folder, tmp_path / "index")
    probed = written("pass")
    assert probe_folder(folder, tmp_path / "index") == first
    assert probed() == []
    os.utime(folder / "wide.mp4", ns=(1, 1))
    assert probe_folder(folder, tmp_path / "index") == first
    assert probed() == ["wide.mp4"]


def test_several_processes_find_the_same(clips: Path, tmp_path: Path) -> None:
    alone = probe_folder(clips, tmp_path / "one", processes=1)
    assert probe_folder(clips, tmp_path / "two", processes=2) == alone
    assert [each.name for each in alone] == sorted(each.name for each in alone)


def test_what_was_probed_before_an_interruption_is_kept(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = probing.probe_all

    def interrupted(*args: object) -> object:
        nonlocal calls
        for result in original(*args):  # type: ignore[arg-type]
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(probing, "probe_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_folder(clips, tmp_path)
    with open_index(tmp_path) as index:
        assert len(index.rows()) == 2
    assert all(each.facts for each in probe_folder(clips, tmp_path))


def test_a_file_on_which_the_decoder_crashes_is_named_and_the_rest_is_kept(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    shutil.copy(folder / "wide.mp4", folder / "deadly 💥.mp4")
    shutil.copy(folder / "wide.mp4", folder / "lethal.mp4")
    probed = written("if path.name[0] in 'dl': os.kill(os.getpid(), signal.SIGSEGV)")
    results = {each.name: each for each in probe_folder(folder, tmp_path / "index", processes=2)}
    assert {name for name, each in results.items() if each.reason == CRASHED} == {"deadly 💥.mp4", "lethal.mp4"}
    assert all(each.facts for name, each in results.items() if name[0] not in "dl")
    assert probed().count("lethal.mp4") == 2, "it had a second chance"
    so_far = len(probed())
    probe_folder(folder, tmp_path / "index")
    assert len(probed()) == so_far, "it is not tried again"


def test_processes_that_do_not_start_are_an_error_and_no_reason_against_files(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_pool, "WORKER", "tuner.no_such_module")
    with pytest.raises(DataError, match="does not start"):
        probe_folder(clips, tmp_path)
    monkeypatch.undo()
    assert all(each.facts for each in probe_folder(clips, tmp_path))


def test_a_process_that_was_killed_once_is_no_reason(
    clips: Path, tmp_path: Path, written: Callable[[str], Callable[[], list[str]]]
) -> None:
    mark = tmp_path / "killed"
    written(f"if not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'w'); os.kill(os.getpid(), signal.SIGKILL)")
    assert all(each.facts for each in probe_folder(clips, tmp_path / "index", processes=1))
    assert mark.exists()


def test_two_runs_at_once_probe_each_file_once(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    log = write_worker(tmp_path, "time.sleep(0.2)")
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom tuner.builtin.datasets import probe, probe_pool\n"
        "probe_pool.WORKER = 'own_probe'\n"
        f"listing = probe.local_listing(Path({str(folder)!r}), probe.VIDEO_SUFFIXES)\n"
        f"print(probe.probe(listing, Path({str(tmp_path / 'index')!r}), processes=1, show_progress=False))\n"
    )
    runs = [
        subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert said[0] == said[1]
    assert sorted(log.read_text().splitlines()) == sorted(path.name for path in folder.glob("*.mp4"))


def test_an_interrupted_run_keeps_what_it_probed_and_leaves_no_process(clips: Path, tmp_path: Path) -> None:
    log = write_worker(tmp_path, f"open({str(tmp_path / 'ids')!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(0.3)")
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom tuner.builtin.datasets import probe, probe_pool\n"
        "probe_pool.WORKER = 'own_probe'\n"
        f"listing = probe.local_listing(Path({str(clips)!r}), probe.VIDEO_SUFFIXES)\n"
        f"probe.probe(listing, Path({str(tmp_path / 'index')!r}), processes=1, show_progress=False)\n"
    )
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert said.count("Traceback") == 1
    assert "KeyboardInterrupt" in said
    with open_index(tmp_path / "index") as index:
        assert 1 <= len(index.rows()) <= 2
    for process in map(int, (tmp_path / "ids").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_removed_files_are_forgotten(clips: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "clips", tmp_path / "index"
    shutil.copytree(clips, folder)
    names = [each.name for each in probe_folder(folder, index)]
    (folder / names[0]).unlink()
    assert forget_missing(index, local_listing(folder, VIDEO_SUFFIXES)) == 1
    with open_index(index) as opened:
        assert len(opened.rows()) == len(names) - 1
    for name in names[1:]:
        (folder / name).unlink()
    render_clip(folder / "new.mp4", **SIZE, frames=3, fps=16, seed=1)
    probe_folder(folder, index)
    with open_index(index) as opened:
        assert list(opened.rows()) == [str(folder / "new.mp4")], "most were gone"


def test_files_that_another_dataset_keeps_in_the_same_index_are_not_forgotten(clips: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "more", tmp_path / "index"
    probe_folder(clips, index)
    render_clip(folder / "new.mp4", **SIZE, frames=3, fps=16, seed=1)
    probe_folder(folder, index)
    with open_index(index) as opened:
        assert len(opened.rows()) == len(local_listing(clips, VIDEO_SUFFIXES).files) + 1


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
    heavy = ("torch", "diffusers", "numpy", "pydantic", "rich")
    code = f"import sys, tuner.data.probe_file; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
