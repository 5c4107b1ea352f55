"""Moving files that cannot be decoded out of a dataset's folder: never deleted, never overwritten, listed."""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tuner.builtin.datasets.captions import caption_file
from tuner.builtin.datasets.judge import UNDECODABLE
from tuner.data.report import Dropped
from tuner.errors import DataError

FOLDER = "quarantine"
MOVED = "moved.jsonl"
"""One line for each file: where it was, where it is, why, and when."""


def quarantine(root: Path, cache: Path, dropped: Sequence[Dropped]) -> list[str]:
    """Move those of ``dropped`` that cannot be decoded, with their caption files, to a folder beside the cache.

    Arguments
        root: the dataset's folder; below the quarantine a file keeps its path inside it.
        cache: the dataset's cache folder, which the quarantine lies in.
    Returns a note on what was moved. Raises DataError when a file cannot be moved.
    """
    broken = [each for each in dropped if each.reason == UNDECODABLE]
    if not broken:
        return []
    folder = cache / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MOVED).open("a", encoding="utf-8") as record:
        for each in broken:
            for path in [each.path, *_own_words(each.path)]:
                target = _moved(path, folder / path.relative_to(root))
                line = {"from": str(path), "to": str(target), "reason": each.detail, "time": _now()}
                record.write(json.dumps(line, ensure_ascii=False) + "\n")
                record.flush()
    return [f"{len(broken)} files that cannot be decoded were moved to {folder}; {MOVED} there says where each was"]


def _own_words(path: Path) -> list[Path]:
    """The caption file of ``path``, where there is one that no other file shares."""
    words = caption_file(path)
    same_stem = set(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    return [words] if same_stem == {path, words} else []


def _moved(path: Path, target: Path) -> Path:
    """Move ``path`` to ``target``, or beside it where something is there already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    free, count = target, 1
    while free.exists():
        free, count = target.with_name(f"{target.stem}.{count}{target.suffix}"), count + 1
    try:
        shutil.move(path, free)
    except OSError as error:
        raise DataError(
            f"a file cannot be moved to the quarantine: {error.strerror}",
            where=path,
            remedy="make its folder writable, or set quarantine_problematic_files to false",
        ) from error
    return free


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
