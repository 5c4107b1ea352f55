"""Where the words of a clip come from, and what is done to them before they are encoded.

As written (a text file beside the clip, its name, one prompt for all, a table) → what is listed taken out →
parts shuffled → prefix and suffix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.builtin.datasets.caption_filters import filtered, read_filters
from tuner.builtin.datasets.caption_shuffles import movable, shuffled
from tuner.builtin.datasets.entries import CaptionShuffle, Trained
from tuner.data.source import Listing
from tuner.errors import DataError

NAMED = 10
"""Clips named in one error before it only counts."""
PUNCTUATION = ",.;:!?，。；：！？、"
"""What needs no space before it."""
Written = Mapping[Path, tuple[str, ...]]
"""The alternatives of each clip."""


@dataclass(frozen=True)
class Captions:
    """The captions of a dataset."""

    by_clip: Written
    """at least one alternative for each clip"""
    notes: tuple[str, ...] = ()


def caption_file(clip: Path) -> Path:
    """The text file that belongs to a clip: the same name with the suffix ``.txt``."""
    return clip.with_suffix(".txt")


def read_alternatives(file: Path) -> tuple[str, ...]:
    """Every non-empty line of a caption file, stripped; a byte-order mark and CRLF are no part of it.

    Raises DataError when the file is not UTF-8 or has no words in it, FileNotFoundError when there is none.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "a caption file is not UTF-8 text", where=f"{file}, byte {error.start}", remedy="save it as UTF-8"
        ) from error
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(f"a caption file cannot be read: {error.strerror}", where=file) from error
    lines = tuple(stripped for line in text.split("\n") if (stripped := line.strip()))
    if not lines:
        raise DataError(
            "a caption file has no words in it", where=file, remedy="write a caption, one alternative per line"
        )
    return lines


def captions_of(
    dataset: Trained, listing: Listing, clips: Iterable[Path], *, seed: int = 0, table: str = ""
) -> Captions:
    """The captions of each clip, by the dataset's keys.

    Arguments
        listing: where the clips are, and the captions that their source knows.
        seed: the run's, for shuffles.
        table: where the source has its captions from, for an error.
    Raises DataError naming the clips that have no caption, or none left; ConfigError for a wrong filter.
    """
    clips = list(clips)
    strategy = strategy_of(dataset, listing)
    if strategy == "instanceprompt":
        captions: Written = dict.fromkeys(clips, (dataset.instance_prompt or "",))
    elif strategy == "filename":
        captions = {clip: (clip.stem.replace("_", " ").strip(),) for clip in clips}
    elif strategy == "textfile":
        captions = _from_files(dataset, clips)
    else:
        captions = _from_table(dataset, listing, clips, table)
    captions = _without_listed(dataset, captions)
    notes: tuple[str, ...] = ()
    if shuffle := dataset.shuffle:
        notes = _shuffle_notes(captions, shuffle)
        captions = {
            clip: shuffled(each, shuffle, clip.relative_to(listing.root).as_posix(), seed)
            for clip, each in captions.items()
        }
    return Captions(_affixed(dataset, captions, strategy), notes)


def strategy_of(dataset: Trained, listing: Listing) -> str:
    """``caption_strategy``, or the table where the source knows captions and the dataset does not say."""
    if dataset.only_instance_prompt:
        return "instanceprompt"
    if listing.captions and "caption_strategy" not in dataset.model_fields_set:
        return "manifest"
    return dataset.caption_strategy


def joined(*parts: str | None) -> str:
    """The parts that have words, with one space between them, but none before punctuation."""
    text = ""
    for part in parts:
        if words := (part or "").strip():
            text += (" " if text and words[0] not in PUNCTUATION else "") + words
    return text


def _from_files(dataset: Trained, clips: Sequence[Path]) -> Written:
    captions, missing = {}, []
    for clip in clips:
        # Tried, not asked for first: there may be a hundred thousand of them.
        try:
            captions[clip] = read_alternatives(caption_file(clip))
        except FileNotFoundError:
            missing.append(clip)
    if missing:
        named = [f"{clip.name} needs {caption_file(clip)}" for clip in missing]
        raise DataError(
            f"{_counted(missing)} no caption file: {_first(named)}",
            where=f"dataset {dataset.id!r} (caption_strategy textfile)",
            remedy="write the file, or set caption_strategy to `filename` or `instanceprompt`",
        )
    return captions


def _from_table(dataset: Trained, listing: Listing, clips: Sequence[Path], table: str) -> Written:
    known = listing.captions
    missing = [clip for clip in clips if not known.get(str(clip))]
    if missing:
        raise DataError(
            f"{_counted(missing)} no caption in {table or 'the table'}: {_first([clip.name for clip in missing])}",
            where=f"dataset {dataset.id!r} (caption_strategy {dataset.caption_strategy}, type {dataset.type})",
            remedy="add the captions there, or set caption_strategy to `textfile`, `filename` or `instanceprompt`",
        )
    return {clip: known[str(clip)] for clip in clips}


def _without_listed(dataset: Trained, captions: Written) -> Written:
    """Without what ``caption_filter_list`` lists; an error names the clips that nothing is left of."""
    filters = read_filters(dataset.caption_filter_list, f"dataset {dataset.id!r}")
    if filters:
        captions = {
            clip: tuple(dict.fromkeys(filtered(caption, filters) for caption in each))
            for clip, each in captions.items()
        }
    empty = [clip for clip, each in captions.items() if not all(caption.strip() for caption in each)]
    if empty:
        after = " after caption_filter_list" if filters else ""
        raise DataError(
            f"{_counted(empty)} a caption without words{after}: {_first([clip.name for clip in empty])}",
            where=f"dataset {dataset.id!r}",
            remedy="shorten the list, or give these clips other captions" if filters else "give these clips captions",
        )
    return captions


def _shuffle_notes(captions: Written, shuffle: CaptionShuffle) -> tuple[str, ...]:
    if any(movable(caption, shuffle) for each in captions.values() for caption in each):
        return ()
    return (f"caption_shuffle does nothing: no caption has two parts to shuffle (split_on {shuffle.split_on})",)


def _affixed(dataset: Trained, captions: Written, strategy: str) -> Written:
    """With prefix and suffix."""
    prompt = dataset.instance_prompt if dataset.prepend_instance_prompt and strategy != "instanceprompt" else None
    before, after = joined(dataset.caption_prepend, prompt), dataset.caption_append
    if not before and not after:
        return captions
    return {clip: tuple(joined(before, caption, after) for caption in each) for clip, each in captions.items()}


def _counted(clips: Sequence[Path]) -> str:
    return "a clip has" if len(clips) == 1 else f"{len(clips)} clips have"


def _first(named: Sequence[str]) -> str:
    more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
    return "; ".join(named[:NAMED]) + more
