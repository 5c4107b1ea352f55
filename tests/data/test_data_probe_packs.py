"""Unchanged folders are known at once; whatever changed is found all the same."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tuner.builtin.datasets import probe_index
from tuner.builtin.datasets.probe import Probed, probe
from tuner.builtin.datasets.probe_index import INDEX_NAME, Index
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, Files, local_listing
from tuner.data.source import Listing
from tuner.testing.clips import render_picture

ALL_SUFFIXES = VIDEO_SUFFIXES | PICTURE_SUFFIXES


def probed(folder: Path, index: Path, **wanted: bool) -> list[Probed]:
    return list(probe(local_listing(folder, ALL_SUFFIXES), index, processes=1, show_progress=False, **wanted))


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    """Three clips, a picture, and a file that is neither."""
    folder = tmp_path / "files"
    shutil.copytree(clips, folder)
    render_picture(folder / "inside" / "a picture.png", width=64, height=48, seed=1)
    (folder / "bad.mp4").write_text("no video")
    return folder


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From then on, reading the index file by file fails."""

    def forbid() -> None:
        def rows(index: Index) -> None:
            raise AssertionError("the index was read file by file")

        monkeypatch.setattr(Index, "rows", rows)

    return forbid


def test_an_unchanged_folder_is_known_without_reading_the_index_file_by_file(
    folder: Path, tmp_path: Path, no_rows: Callable[[], None]
) -> None:
    first = {wanted: probed(folder, tmp_path / "index", **dict(wanted)) for wanted in ((), (("pictures", False),))}
    no_rows()
    again = {wanted: probed(folder, tmp_path / "index", **dict(wanted)) for wanted in first}
    assert again == first
    assert [each.name for each in again[()] if each.reason] == ["bad.mp4"]
    others = [each.name for each in again[("pictures", False),] if each.reason]
    assert others == ["bad.mp4", os.path.join("inside", "a picture.png")]  # noqa: PTH118
    known = probe(local_listing(folder, ALL_SUFFIXES), tmp_path / "index", show_progress=False)
    assert (len(known), known[1], known[-2:]) == (5, first[()][1], first[()][-2:])
    clip = next(each.facts for each in known if each.name == "wide.mp4")
    assert clip is not None
    assert (clip.frames, clip.fps, clip.variable, clip.still) == (20, 16.0, False, False)


def swap(folder: Path) -> None:
    """Two files of the same folder change places: the same names, sizes and times are there."""
    (folder / "wide.mp4").rename(folder / "other")
    (folder / "tall.mp4").rename(folder / "wide.mp4")
    (folder / "other").rename(folder / "tall.mp4")


def appended(folder: Path) -> None:
    """Another size at the same time."""
    status = (folder / "bad.mp4").stat()
    with (folder / "bad.mp4").open("a") as file:
        file.write(" at all")
    os.utime(folder / "bad.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "another time": lambda folder: os.utime(folder / "wide.mp4", ns=(1, 1)),
    "another size": appended,
    "other content": lambda folder: shutil.copy(folder / "tall.mp4", folder / "bad.mp4"),
    "appeared": lambda folder: shutil.copy(folder / "tall.mp4", folder / "inside" / "tall.mp4"),
    "vanished": lambda folder: (folder / "wide two.mp4").unlink(),
    "renamed": lambda folder: (folder / "wide two.mp4").rename(folder / "inside" / "wide two.mp4"),
    "swapped": swap,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_found(folder: Path, tmp_path: Path, change: str, no_rows: Callable[[], None]) -> None:
    probed(folder, tmp_path / "index")
    CHANGES[change](folder)
    found = probed(folder, tmp_path / "index")
    assert found == probed(folder, tmp_path / "afresh")
    no_rows()
    assert probed(folder, tmp_path / "index") == found


def execute(index: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(index / INDEX_NAME)) as connection, connection:
        connection.execute(statement, values)


def test_an_index_from_before_packs_is_read_and_not_probed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_rows: Callable[[], None]
) -> None:
    first = probed(folder, tmp_path)
    execute(tmp_path, "DROP TABLE packs")
    monkeypatch.setattr("tuner.builtin.datasets.probe.probe_all", lambda *_: pytest.fail("a file was opened"))
    assert probed(folder, tmp_path) == first
    no_rows()
    assert probed(folder, tmp_path) == first


DAMAGE = {
    "a column cut short": ("UPDATE packs SET width = ?", b"\0" * 9),
    "text that is none": ("UPDATE packs SET sha256 = ?", b"\xff\0\0\0\0"),
    "a column of fewer files": ("UPDATE packs SET container = ?", b"mp4\0mp4"),
    "nothing": ("UPDATE packs SET fps = ?", None),
    "reasons cut short": ("UPDATE packs SET reasons = ?", '{"0": "can'),
    "another kind of reasons": ("UPDATE packs SET reasons = ?", "[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_pack_is_not_used_and_made_again(
    folder: Path, tmp_path: Path, damage: str, no_rows: Callable[[], None]
) -> None:
    first = probed(folder, tmp_path)
    execute(tmp_path, *DAMAGE[damage])
    assert probed(folder, tmp_path) == first
    no_rows()
    assert probed(folder, tmp_path) == first


def test_a_pack_that_cannot_be_written_is_said_and_nothing_is_lost(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probed(folder, tmp_path)
    execute(tmp_path, "DELETE FROM packs")
    monkeypatch.setattr(probe_index, "_connect", read_only)
    monkeypatch.setattr(logging.getLogger("tuner"), "propagate", True)
    with caplog.at_level(logging.INFO):
        assert probed(folder, tmp_path) == first
    assert "the next start reads it file by file" in caplog.text


def read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True)


def test_a_listing_of_any_source_is_packed(folder: Path, tmp_path: Path, no_rows: Callable[[], None]) -> None:
    files = [each for each in local_listing(folder, ALL_SUFFIXES).files if "wide" in each.path]
    listing = Listing(folder, files)
    assert list(Files.of(listing)) == files
    first = list(probe(listing, tmp_path, show_progress=False))
    assert [each.name for each in first] == ["wide two.mp4", "wide.mp4"]
    no_rows()
    assert list(probe(listing, tmp_path, show_progress=False)) == first


def test_a_folder_without_files_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert probed(tmp_path / "empty", tmp_path) == []
    assert probed(tmp_path / "empty", tmp_path) == []
