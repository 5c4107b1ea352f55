"""Every config key as a flag and, for some, as an environment variable; which of them wins.

A flag on the command line stands over ``TRAINER_EXTRA_ARGS``, that over single environment variables,
those over the config file, and the file over the default.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.config.describe import facts
from tuner.config.load import DEFAULT_PATH, bare_name, raw_config
from tuner.config.owners import KeyIndex, canonical, raise_all
from tuner.errors import ConfigError, TunerError, nearest
from tuner.selection import Catalog, Wanted

EXTRA = "TRAINER_EXTRA_ARGS"
"""Environment variable that holds more flags, split as a shell would."""


class Settings(dict[str, Any]):
    """A flat config whose ``sources`` say for each key where it was set."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, str] = {}

    def put(self, values: Mapping[str, Any], source: str) -> None:
        """Set keys, over what was there."""
        self.update(values)
        self.sources.update(dict.fromkeys(values, source))


def read_settings(
    path: Path | None,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    plugins: Sequence[str] | None = None,
    without: Sequence[str] = (),
    catalog: Catalog | None = None,
    file: Mapping[str, Any] | None = None,
) -> Settings:
    """The flat config of a command: file, environment and flags, the later over the earlier.

    ``arguments`` are the flags that the command itself does not know; ``file`` is what the file at ``path`` holds,
    where that is known already. Raises ConfigError.
    """
    catalog = catalog or Catalog()
    flags = parse_flags(arguments, "command line")
    extra = parse_flags(_split_extra(environ), EXTRA)
    file = raw_config(path) if file is None else file
    wanted = Wanted.read({**file, **extra, **flags}, plugins, without)
    wanted.check(catalog)
    index = KeyIndex(catalog, wanted.certain(catalog))
    settings = Settings()
    source = str(path or DEFAULT_PATH)
    settings.put(canonical(file, index, source), source)
    for key, variable in _environment(index, environ, everywhere=wanted.plugins is None).items():
        settings.put({key: environ[variable]}, f"environment variable {variable}")
    for given, source in ((extra, EXTRA), (flags, "command line")):
        raise_all(_unknown(given, index, source))
        settings.put(canonical(given, index, source), source)
    return settings


def parse_flags(arguments: Sequence[str], source: str) -> dict[str, str | bool]:
    """``--key value``, ``--key=value`` and a bare ``--key`` (true), with dashes or underscores; the last one counts.

    Values stay text: what a key's type is, its owner knows. Raises ConfigError for anything else.
    """
    flags: dict[str, str | bool] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise _stray(word, source)
        name, separator, value = word.removeprefix("--").partition("=")
        if separator:
            flags[bare_name(name)] = value
        elif rest and not rest[0].startswith("--"):
            flags[bare_name(name)] = rest.pop(0)
        else:
            flags[bare_name(name)] = True
    return flags


def _stray(word: str, source: str) -> ConfigError:
    remedy = "put quotes around a value with spaces; write a list as --key '[1, 2]' or --key 1,2"
    if Path(word).suffix in (".json", ".json5", ".toml", ".yaml", ".yml"):
        remedy = f"to name a config file, write --config {word}"
    return ConfigError(f"{word!r} is no flag and no flag's value", where=source, remedy=remedy)


def _split_extra(environ: Mapping[str, str]) -> list[str]:
    try:
        return shlex.split(environ.get(EXTRA, ""))
    except ValueError as error:
        raise ConfigError(f"cannot be split into flags: {error}", where=EXTRA) from None


def _environment(index: KeyIndex, environ: Mapping[str, str], *, everywhere: bool) -> dict[str, str]:
    """Keys that an environment variable sets, with the variable's name."""
    named = ((place.key, facts(place.field).environment) for place in index.places(everywhere=everywhere))
    return {key: variable for key, variable in named if variable and environ.get(variable)}


def _unknown(flags: Mapping[str, Any], index: KeyIndex, source: str) -> list[TunerError]:
    return [
        ConfigError(
            f"there is no flag --{name}", where=source, nearest=(close := nearest(name, index.known())) and f"--{close}"
        )
        for name in flags
        if index.find(name) is None
    ]
