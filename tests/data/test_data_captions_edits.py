"""What is done to captions: texts taken out, parts shuffled, prefix and suffix, captions from tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.builtin.datasets.caption_filters import filtered, read_filters
from tuner.builtin.datasets.caption_shuffles import shuffled
from tuner.builtin.datasets.captions import Captions, captions_of
from tuner.builtin.datasets.entries import CaptionShuffle, VideoDataset
from tuner.data.source import Listing
from tuner.errors import ConfigError, DataError, TunerError
from tuner.testing.datasets import make_entry

TAGS = "red ball, blue sky, green grass, white dog"


def read(folder: Path, captions: dict[str, str], seed: int = 0, **values: Any) -> Captions:
    """The captions of clips whose text files hold ``captions``."""
    clips = [folder / f"{name}.mp4" for name in captions]
    for clip, text in zip(clips, captions.values(), strict=True):
        clip.with_suffix(".txt").write_text(text, encoding="utf-8")
    dataset = make_entry(VideoDataset, instance_data_dir=str(folder), **values)
    return captions_of(dataset, Listing(folder, ()), clips, seed=seed)


def one(folder: Path, caption: str, seed: int = 0, **values: Any) -> tuple[str, ...]:
    (found,) = read(folder, {"clip": caption}, seed, **values).by_clip.values()
    return found


# Prefix and suffix


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"caption_prepend": "photo of"}, "photo of a cat"),
        ({"caption_prepend": "photo of "}, "photo of a cat"),
        ({"caption_append": "in rain"}, "a cat in rain"),
        ({"caption_append": ", 4k"}, "a cat, 4k"),
        ({"caption_append": "，高清"}, "a cat，高清"),
        ({"caption_prepend": "  ", "caption_append": ""}, "a cat"),
        ({"prepend_instance_prompt": True, "instance_prompt": "<token>"}, "<token> a cat"),
        (
            {"prepend_instance_prompt": "true", "instance_prompt": "<token>", "caption_prepend": "photo:"},
            "photo: <token> a cat",
        ),
        ({"only_instance_prompt": True, "instance_prompt": "<token>"}, "<token>"),
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "<token>", "prepend_instance_prompt": True},
            "<token>",
        ),
    ],
)
def test_prefix_and_suffix(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    assert one(tmp_path, "a cat", **values) == (expected,)


# Taking texts out


@pytest.mark.parametrize(
    ("listed", "caption", "expected"),
    [
        (["watermark"], "a cat, watermark, a dog", "a cat, a dog"),
        (["watermark"], "watermark, a cat", "a cat"),
        (["watermark"], "a cat, watermark", "a cat"),
        ([" art "], "art, a party", "a py"),
        ([r"s/\bart\b//"], "art, a party", "a party"),
        (["very"], "a very old cat", "a old cat"),
        (["水印"], "一只猫，水印，一只狗", "一只猫，一只狗"),
        ([r"s/\bdog\b/hound/"], "a dog and a dogma", "a hound and a dogma"),
        ([r"s/(\w+) cat/cat \1/"], "a red cat", "a cat red"),
        ([r"s/ and\/or / or /"], "cats and/or dogs", "cats or dogs"),
        (["(tm)", "[x]"], "a cat(tm) [x]", "a cat"),
        (["nothing here"], "kept  as , it is,", "kept  as , it is,"),
    ],
)
def test_what_is_listed_is_taken_out_and_the_rest_tidied(
    tmp_path: Path, listed: list[str], caption: str, expected: str
) -> None:
    assert one(tmp_path, caption, caption_filter_list=listed) == (expected,)


def test_a_list_may_be_a_file_with_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    file = tmp_path / "filters.list"
    file.write_bytes("\ufeffwatermark\r\n\r\ns/dog/hound/\r\n水印\r\n".encode())
    assert one(tmp_path, "a dog, watermark, 水印", caption_filter_list=str(file)) == ("a hound",)


@pytest.mark.parametrize("line", ["s/(/x/", "s/a/\\9/", "s/a", "s/a/b/c", "s//b/"])
def test_an_invalid_expression_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "filters.list"
    file.write_text(f"fine\n\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_filters(file, "d")
    assert f"{file}, line 3" in str(caught.value)
    assert repr(line) in str(caught.value)
    with pytest.raises(ConfigError, match="text 2"):
        read_filters(["fine", line], "d")


def test_a_list_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)gone\.txt.* cannot be read: No such file.*'d'"):
        one(tmp_path, "a cat", caption_filter_list=str(tmp_path / "gone.txt"))


def test_a_clip_that_nothing_is_left_of_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"fine": "a cat", "bare": "watermark, "}, caption_filter_list=["watermark"])
    assert "a clip has a caption without words after caption_filter_list: bare.mp4" in str(caught.value)
    assert "fine" not in str(caught.value)


def test_alternatives_that_become_equal_are_one(tmp_path: Path) -> None:
    assert one(tmp_path, "a cat\na cat, watermark\n", caption_filter_list=["watermark"]) == ("a cat",)


@given(st.text(), st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip()) and text[:2] != "s/")))
def test_no_listed_text_makes_words_up(caption: str, listed: list[str]) -> None:
    left = filtered(caption, read_filters(listed, "d"))
    assert not Counter(left) - Counter(caption + " " * len(caption)), "only characters of the caption are left"


# Shuffling


def test_shuffles_are_alternatives_of_the_same_parts_beside_the_original(tmp_path: Path) -> None:
    found = one(tmp_path, TAGS, caption_shuffle={"count": 3})
    assert found[0] == TAGS
    assert len(set(found)) == len(found) == 4
    assert {tuple(sorted(each.split(", "))) for each in found} == {tuple(sorted(TAGS.split(", ")))}


def test_true_is_one_shuffle_and_false_or_disabled_is_none(tmp_path: Path) -> None:
    assert len(one(tmp_path, TAGS, caption_shuffle=True)) == 2
    assert one(tmp_path, TAGS, caption_shuffle=False) == (TAGS,)
    assert one(tmp_path, TAGS, caption_shuffle={"enable": False, "count": 3}) == (TAGS,)


def test_leading_parts_keep_their_place_and_the_original_may_be_left_out(tmp_path: Path) -> None:
    asked = {"count": 5, "position_start": 1, "include_original": False}
    found = one(tmp_path, TAGS, caption_shuffle=asked)
    assert len(found) == 5
    assert TAGS not in found
    assert all(each.startswith("red ball, ") for each in found)


def test_no_more_alternatives_than_there_are_orders() -> None:
    asked = CaptionShuffle(count=50)
    assert sorted(shuffled(["a, b, c"], asked, "clip", 0)) == sorted(
        ["a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"]
    )
    assert shuffled(["a, a, a"], asked, "clip", 0) == ("a, a, a",)


def test_a_caption_of_one_part_stays_even_without_originals_and_that_is_said(tmp_path: Path) -> None:
    asked = {"include_original": False}
    captions = read(tmp_path, {"x": "one sentence", "y": "another"}, caption_shuffle=asked)
    assert list(captions.by_clip.values()) == [("one sentence",), ("another",)]
    assert captions.notes == ("caption_shuffle does nothing: no caption has two parts to shuffle (split_on comma)",)
    assert read(tmp_path, {"x": "one sentence", "y": TAGS}, caption_shuffle=asked).notes == ()


def test_the_order_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    def first(names: list[str], run_seed: int, **more: int) -> str:
        found = read(
            tmp_path, dict.fromkeys(names, TAGS), run_seed, caption_shuffle={"include_original": False, **more}
        )
        return found.by_clip[tmp_path / "a.mp4"][0]

    assert first(["a"], 0) == first(["b", "a", "c"], 0)
    assert len({first(["a"], seed) for seed in range(8)}) > 2
    assert len({first(["a"], seed, seed=5) for seed in range(8)}) == 1, "a seed of its own stands above the run's"
    names = [f"clip {index}" for index in range(8)]
    captions = read(tmp_path, dict.fromkeys(names, TAGS), caption_shuffle={"include_original": False})
    assert len(set(captions.by_clip.values())) > 2, "files have orders of their own"


@pytest.mark.parametrize(
    ("split_on", "caption", "expected"),
    [
        ("comma", "猫，狗", "狗，猫"),
        ("comma", "cat,dog", "dog, cat"),
        ("comma", "猫，cat, dog，cat, dog，猫", None),
        ("space", "cat  dog", "dog cat"),
        ("period", "It is 3.5 m. It is red.", "It is red. It is 3.5 m."),
        ("period", "一只猫。两只狗。", "两只狗。一只猫。"),
        ("newline", "cat\ndog", "dog\ncat"),
    ],
)
def test_separators(split_on: str, caption: str, expected: str | None) -> None:
    asked = CaptionShuffle.model_validate({"split_on": split_on, "include_original": False})
    (found,) = shuffled([caption], asked, "clip", 0)
    if expected is None:
        assert sorted(found.split(", ")) == sorted(caption.replace("，", ", ").split(", "))
    else:
        assert found == expected


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 3))
def test_shuffles_hold_the_same_parts(parts: list[str], count: int, start: int) -> None:
    asked = CaptionShuffle(count=count, position_start=start)
    found = shuffled([", ".join(parts)], asked, "clip", 0)
    assert len(set(found)) == len(found) <= count + 1
    for each in found:
        assert Counter(each.split(", ")) == Counter(parts)
        assert each.split(", ")[:start] == parts[:start]


def test_filter_then_shuffle_then_prefix(tmp_path: Path) -> None:
    found = one(
        tmp_path,
        "a, watermark, b",
        caption_filter_list=["watermark"],
        caption_shuffle={"include_original": False},
        caption_prepend="first,",
    )
    assert found == ("first, b, a",)


# Tables


def table(folder: Path, captions: dict[str, tuple[str, ...]], names: list[str], **values: object) -> Captions:
    dataset = make_entry(VideoDataset, type="parquet", **values)
    listing = Listing(folder, (), {str(folder / name): each for name, each in captions.items()})
    return captions_of(dataset, listing, [folder / name for name in names], table="clips.parquet")


@pytest.mark.parametrize("strategy", ["parquet", "csv", "jsonl", "manifest", None])
def test_captions_from_the_table_that_lists_the_files(tmp_path: Path, strategy: str | None) -> None:
    values = {} if strategy is None else {"caption_strategy": strategy}
    known = {"in/a.mp4": ("一只猫", "a cat"), "b.mp4": ("a dog",)}
    found = table(tmp_path, known, ["in/a.mp4", "b.mp4"], caption_append="runs", **values)
    assert found.by_clip == {tmp_path / "in/a.mp4": ("一只猫 runs", "a cat runs"), tmp_path / "b.mp4": ("a dog runs",)}


def test_a_chosen_strategy_stands_above_the_table(tmp_path: Path) -> None:
    found = table(tmp_path, {"a_cat.mp4": ("another",)}, ["a_cat.mp4"], caption_strategy="filename")
    assert found.by_clip == {tmp_path / "a_cat.mp4": ("a cat",)}


def test_files_that_the_table_has_no_caption_for_are_named_with_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, {"0.mp4": ("a cat",)}, [f"{index}.mp4" for index in range(13)], caption_strategy="parquet")
    text = str(caught.value)
    for part in ["12 clips have no caption in clips.parquet: 1.mp4; 2.mp4", "10.mp4; and 2 more", "'d'"]:
        assert part in text


def test_a_name_without_words_is_no_caption(tmp_path: Path) -> None:
    dataset = make_entry(VideoDataset, caption_strategy="filename")
    with pytest.raises(TunerError, match=r"caption without words: __\.mp4"):
        captions_of(dataset, Listing(tmp_path, ()), [tmp_path / "__.mp4"])
