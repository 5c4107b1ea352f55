"""Taking texts out of captions (``caption_filter_list``), and tidying what is left of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import ConfigError

COMMAS = ",，、"
_EXPRESSION = re.compile(r"s/((?:\\.|[^\\/])+)/((?:\\.|[^\\/])*)/")
_SPACES = re.compile(r"[ \t\u3000]{2,}")
_SPACE_BEFORE_COMMA = re.compile(rf"[ \t\u3000]+(?=[{COMMAS}])")
_COMMAS = re.compile(rf"([{COMMAS}])(?:\s*[{COMMAS}])+")


@dataclass(frozen=True)
class Filter:
    """One thing to replace wherever it stands."""

    pattern: re.Pattern[str]
    replacement: str


def read_filters(listed: Sequence[str] | Path | None, where: str) -> tuple[Filter, ...]:
    """The filters of a ``caption_filter_list``: the texts themselves, or a UTF-8 file of them, one a line.

    Raises ConfigError for a file that cannot be read, and for an invalid expression, by its line.
    """
    if listed is None:
        return ()
    if isinstance(listed, Path):
        lines: Iterable[str] = _lines(listed, where)
        place = f"{listed}, line"
    else:
        lines, place = listed, f"{where}: caption_filter_list, text"
    return tuple(_filter(line, f"{place} {number}") for number, line in enumerate(lines, 1) if line.strip())


def filtered(caption: str, filters: Iterable[Filter]) -> str:
    """``caption`` without what the filters take out; one that has nothing of it stays exactly as it is."""
    left = caption
    for each in filters:
        left = each.pattern.sub(each.replacement, left)
    return caption if left == caption else _tidied(left)


def _tidied(text: str) -> str:
    """Without the spaces and commas that stood around what was taken out."""
    text = _SPACE_BEFORE_COMMA.sub("", _SPACES.sub(" ", text))
    return _COMMAS.sub(r"\1", text).strip(f" \t\u3000{COMMAS}")


def _lines(file: Path, where: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError(
            f"caption_filter_list {str(file)!r} cannot be read: {reason}",
            where=where,
            allowed="a text file with one text a line, or a list of texts",
        ) from error


def _filter(line: str, where: str) -> Filter:
    line = line.strip()
    if not line.startswith("s/"):
        return Filter(re.compile(re.escape(line)), "")
    parts = _EXPRESSION.fullmatch(line)
    if parts is None:
        raise ConfigError(
            f"{line!r} is no expression", where=where, allowed=r"s/pattern/replacement/, with \/ for a slash"
        )
    pattern, replacement = (part.replace(r"\/", "/") for part in parts.groups())
    try:
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")  # reads the replacement, whether or not anything matches
    except (re.error, IndexError) as error:
        raise ConfigError(
            f"the expression {line!r} is invalid: {error}", where=where, allowed="Python's regular expressions"
        ) from error
    return Filter(compiled, replacement)
