"""The prompts that validation renders, and the file names they get."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, ConfigErrors, TunerError, nearest

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


OWN = (
    "negative_prompt",
    "seed",
    "resolution",
    "num_video_frames",
    "num_inference_steps",
    "guidance",
    "guidance_2",
    "noise_scheduler",
    "flow_shift",
)
"""Settings that a prompt of a library may have for itself: core keys without ``validation_``."""


@dataclass(frozen=True)
class Entry:
    """What a library holds for a nickname."""

    text: str
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One prompt to render."""

    nickname: str
    slug: str
    """The nickname as a file name without suffix."""
    text: str
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Core keys that this prompt has its own values for."""
    picture: str = ""
    """What its pictures are named by, where that is not the slug."""
    frame: str = ""
    """What its encoded starting frame is found by, where that is not the slug."""


def validation_prompts(core: CoreConfig, *, builtin: bool = False) -> tuple[Prompt, ...]:
    """All prompts of the config: ``validation_prompt`` first, then the user's library, then the built-in one.

    Raises ConfigError for a library that cannot be read, for a prompt that is no text, and for two nicknames
    that would be written to one file.
    """
    found: list[tuple[str, Entry]] = []
    if core.validation_prompt:
        found.append((VALIDATION, Entry(core.validation_prompt)))
    if core.user_prompt_library is not None:
        found.extend(_library(core.user_prompt_library))
    if builtin:
        found.extend((f"library_{nickname}", Entry(text)) for nickname, text in built_in().items())
    return tuple(_named(found, core.user_prompt_library))


def built_in() -> dict[str, str]:
    """The prompts that come with the package, by nickname."""
    from json import loads

    text = resources.files("tuner.builtin.sampling").joinpath("prompts.json").read_text(encoding="utf-8")
    return dict(loads(text))


def placeholders(prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """What looks like a placeholder nobody filled in, such as ``<token>``, in the order found."""
    return tuple(dict.fromkeys(match for prompt in prompts for match in _PLACEHOLDER.findall(prompt.text)))


def slug(nickname: str) -> str:
    """``nickname`` as a file name on every system; empty where no letter or digit is left."""
    cleaned = _UNSAFE.sub("_", _PLACEHOLDER.sub(lambda match: match[0][1:-1], nickname)).strip("._-")[:LONGEST]
    return f"{cleaned}_" if _RESERVED.fullmatch(cleaned) else cleaned


def _named(found: Iterable[tuple[str, Entry]], library: Path | None) -> Iterator[Prompt]:
    owner: dict[str, str] = {}
    for nickname, entry in found:
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
        yield Prompt(nickname, name, entry.text, entry.own)


def _library(path: Path) -> list[tuple[str, Entry]]:
    """(nickname, prompt and its settings) of a library file."""
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
    found, wrong = [], list[TunerError]()
    for nickname, value in entries.items():
        try:
            found.append((nickname, _entry(nickname, value, path)))
        except ConfigErrors as errors:
            wrong += errors.errors
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else ConfigErrors(wrong)
    return found


def _entry(nickname: str, value: Any, path: Path) -> Entry:
    """A prompt, or a mapping of ``prompt`` and settings of its own. Raises ConfigError."""
    own = dict(value) if isinstance(value, Mapping) else {}
    text = own.pop("prompt", None) if isinstance(value, Mapping) else value
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"the prompt {nickname!r} is {_kind(text)}, not a text",
            where=path,
            allowed=f'a text, or {{"prompt": "a text"}} with any of {", ".join(OWN)}',
            remedy="write it in quotes",
        )
    for name in own:
        if name not in OWN:
            raise ConfigError(
                f"the prompt {nickname!r} has the unknown setting {name!r}",
                where=path,
                allowed=("prompt", *OWN),
                nearest=nearest(name, OWN),
            )
    return Entry(text, _checked(nickname, own, path))


def _checked(nickname: str, own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings as core keys, of the types that those have."""
    from tuner.config.faults import build
    from tuner.config.validation_keys import ValidationKeys

    keys = {f"validation_{name}": value for name, value in own.items()}
    values = build(ValidationKeys, keys, where=f"{path}, {nickname!r}")
    return {name: getattr(values, name) for name in keys}


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "empty"
    return {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}.get(type(value), "a number")
