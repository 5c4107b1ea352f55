"""The prompts that validation renders, and the file names they get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

VALIDATION = "validation"
"""Nickname of ``validation_prompt``."""
LIBRARY = "user_prompt_library"
LONGEST = 100
"""Characters of a file name made from a nickname."""
_PLACEHOLDER = re.compile(r"<[^<>\s]+>")
_UNSAFE = re.compile(r"[^\w.-]+")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|contact-sheet)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for itself, and our own."""


@dataclass(frozen=True)
class Prompt:
    """One prompt to render."""

    nickname: str
    slug: str
    """The nickname as a file name without suffix."""
    text: str


def validation_prompts(core: CoreConfig) -> tuple[Prompt, ...]:
    """All prompts of the config: ``validation_prompt`` first, then the library in its order.

    Raises ConfigError for a library that cannot be read, for a prompt that is no text, and for two nicknames
    that would be written to one file.
    """
    found: list[tuple[str, str]] = []
    if core.validation_prompt:
        found.append((VALIDATION, core.validation_prompt))
    if core.user_prompt_library is not None:
        found.extend(_library(core.user_prompt_library))
    return tuple(_named(found, core.user_prompt_library))


def placeholders(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """What looks like a placeholder nobody filled in, such as ``<token>``, in the order found."""
    return tuple(dict.fromkeys(match for prompt in prompts for match in _PLACEHOLDER.findall(prompt.text)))


def slug(nickname: str) -> str:
    """``nickname`` as a file name on every system; empty where no letter or digit is left."""
    cleaned = _UNSAFE.sub("_", _PLACEHOLDER.sub(lambda match: match[0][1:-1], nickname)).strip("._-")[:LONGEST]
    return f"{cleaned}_" if _RESERVED.fullmatch(cleaned) else cleaned


def _named(found: Iterable[tuple[str, str]], library: Path | None) -> Iterator[Prompt]:
    owner: dict[str, str] = {}
    for nickname, text in found:
        name = slug(nickname)
        if not name:
            raise ConfigError(
                f"the nickname {nickname!r} has no letter or digit to name a file by",
                where=library,
                remedy="give the prompt another nickname",
            )
        # Without case: on some systems A.mp4 and a.mp4 are one file.
        other = owner.get(name.casefold())
        owner[name.casefold()] = nickname
        if other is not None:
            raise ConfigError(
                f"the nicknames {other!r} and {nickname!r} would both be written to {name!r}",
                where=library,
                remedy="rename one of them"
                + (f"; {VALIDATION!r} stands for validation_prompt" if other == VALIDATION else ""),
            )
        yield Prompt(nickname, name, text)


def _library(path: Path) -> list[tuple[str, str]]:
    """(nickname, prompt) of a library file."""
    from tuner.config.load import plain_data

    if not path.is_file():
        raise ConfigError(
            f"{LIBRARY} names a file that does not exist",
            where=path,
            remedy="name an existing file of nicknames and prompts, or leave the key out",
        )
    entries = plain_data(path)
    if not isinstance(entries, Mapping):
        raise ConfigError(
            f"{LIBRARY} holds {_kind(entries)}, not nicknames with prompts",
            where=path,
            allowed='{"nickname": "prompt"}',
        )
    wrong = [
        ConfigError(f"the prompt {nickname!r} is {_kind(text)}, not a text", where=path, remedy="write it in quotes")
        for nickname, text in entries.items()
        if not isinstance(text, str) or not text.strip()
    ]
    if wrong:
        raise wrong[0] if len(wrong) == 1 else ConfigErrors(wrong)
    return list(entries.items())


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "empty"
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")
