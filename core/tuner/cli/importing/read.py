"""Reading the files of other tools, whatever their suffix."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config.load import plain_data
from tuner.errors import ConfigError

SCRIPTS = (".sh", ".bash", ".bat", ".ps1", ".txt")
DATA = (".json", ".json5", ".jsonc", ".toml", ".yaml", ".yml", ".example")


@dataclass(frozen=True)
class Read:
    """A file, and what is in it."""

    path: Path
    data: Any
    """an object or a list; of a script the arguments of its training command"""
    kind: str
    """``data``, ``script`` or ``environment``"""


def read(path: Path) -> Read:
    """The content of a file. Raises ConfigError when it is missing, malformed, or of no known kind."""
    from tuner.cli.importing.musubi import arguments

    if path.is_dir():
        raise ConfigError("this is a folder, and a file is needed", where=path, remedy="name the config files in it")
    suffix = path.suffix.lower()
    if path.name == ".env" or suffix == ".env":
        return Read(path, _environment(read_text(path)), "environment")
    if suffix in SCRIPTS:
        found = arguments(read_text(path))
        if not found:
            raise ConfigError(
                "no training command is in this script", where=path, allowed="a line with `train` and `--` arguments"
            )
        return Read(path, found, "script")
    if suffix not in DATA:
        raise ConfigError(f"cannot tell the format of {path.name!r}", where=path, allowed=(*DATA, *SCRIPTS, ".env"))
    return Read(path, plain_data(path), "data")


def read_text(path: Path) -> str:
    """A text file. Raises ConfigError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("the file does not exist", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file cannot be read: {error}", where=path) from None


def _environment(text: str) -> dict[str, str]:
    """``NAME=value`` lines, as SimpleTuner's config.env has them."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if equals:
                found[name] = value
    return found
