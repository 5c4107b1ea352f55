"""Captions: what people really have in their text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.builtin.datasets import captions
from tuner.builtin.datasets.captions import read_alternatives
from tuner.builtin.datasets.entries import VideoDataset
from tuner.data.source import Listing
from tuner.errors import DataError
from tuner.testing.datasets import make_entry


def dataset(folder: Path, **values: object) -> VideoDataset:
    return make_entry(VideoDataset, instance_data_dir=str(folder), **values)


def captions_of(dataset: VideoDataset, clips: list[Path]) -> dict[Path, tuple[str, ...]]:
    return dict(captions.captions_of(dataset, Listing(Path(), ()), clips).by_clip)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one caption", ("one caption",)),
        (b"\xef\xbb\xbffirst\r\n\r\n  second  \r\n", ("first", "second")),
        ("两只猫在打拳击\n".encode(), ("两只猫在打拳击",)),
        ("a line\u2028with an odd separator".encode(), ("a line\u2028with an odd separator",)),
    ],
    ids=["plain", "bom-crlf", "chinese", "line-separator"],
)
def test_alternatives(tmp_path: Path, content: bytes, expected: tuple[str, ...]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    assert read_alternatives(file) == expected


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00a"], ids=["empty", "blank", "not-utf8"])
def test_a_file_without_words_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "silent.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"silent\.txt"):
        read_alternatives(file)


def test_a_missing_file_names_clip_and_expected_file(tmp_path: Path) -> None:
    clip = tmp_path / "my clip.v2 😀.mp4"
    with pytest.raises(DataError) as caught:
        captions_of(dataset(tmp_path), [clip])
    assert "my clip.v2 😀.mp4" in str(caught.value)
    assert str(tmp_path / "my clip.v2 😀.txt") in str(caught.value)


def test_many_missing_files_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"30 clips have no caption file.*and 20 more"):
        captions_of(dataset(tmp_path), [tmp_path / f"{i}.mp4" for i in range(30)])


def test_other_strategies(tmp_path: Path) -> None:
    clip = tmp_path / "a_red_ball.mp4"
    assert captions_of(dataset(tmp_path, caption_strategy="filename"), [clip]) == {clip: ("a red ball",)}
    by_prompt = dataset(tmp_path, caption_strategy="instanceprompt", instance_prompt="a <token> ball")
    assert captions_of(by_prompt, [clip]) == {clip: ("a <token> ball",)}
