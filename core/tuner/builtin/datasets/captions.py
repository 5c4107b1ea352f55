"""Where the words of a clip come from: a text file beside it, its name, or one prompt for all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tuner.builtin.datasets.entries import Trained
from tuner.data.source import Listing
from tuner.errors import DataError

NAMED = 10
"""Clips named in one error before it only counts."""


def caption_file(clip: Path) -> Path:
    """The text file that belongs to a clip: the same name with the suffix ``.txt``."""
    return clip.with_suffix(".txt")


def read_alternatives(file: Path) -> tuple[str, ...]:
    """Every non-empty line of a caption file, stripped; a byte-order mark and CRLF are no part of it.

    Raises DataError when the file is not UTF-8 or has no words in it.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "a caption file is not UTF-8 text", where=f"{file}, byte {error.start}", remedy="save it as UTF-8"
        ) from error
    lines = tuple(stripped for line in text.split("\n") if (stripped := line.strip()))
    if not lines:
        raise DataError(
            "a caption file has no words in it", where=file, remedy="write a caption, one alternative per line"
        )
    return lines


def captions_of(
    dataset: Trained, listing: Listing, clips: Iterable[Path], *, seed: int = 0
) -> dict[Path, tuple[str, ...]]:
    """The captions of each clip, by the dataset's ``caption_strategy``; at least one for each.

    Raises DataError naming the clips whose caption file is missing and the file that was expected.
    """
    clips = list(clips)
    if dataset.caption_strategy == "instanceprompt":
        return dict.fromkeys(clips, (dataset.instance_prompt or "",))
    if dataset.caption_strategy == "filename":
        return {clip: (clip.stem.replace("_", " ").strip(),) for clip in clips}
    missing = [clip for clip in clips if not caption_file(clip).is_file()]
    if missing:
        raise _missing_captions(dataset.id, missing)
    return {clip: read_alternatives(caption_file(clip)) for clip in clips}


def _missing_captions(dataset_id: str, missing: list[Path]) -> DataError:
    named = "; ".join(f"{clip.name} needs {caption_file(clip)}" for clip in missing[:NAMED])
    more = f"; and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    count = "a clip has" if len(missing) == 1 else f"{len(missing)} clips have"
    return DataError(
        f"{count} no caption file: {named}{more}",
        where=f"dataset {dataset_id!r} (caption_strategy textfile)",
        remedy="write the file, or set caption_strategy to `filename` or `instanceprompt`",
    )
