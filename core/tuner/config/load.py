"""Read files that people write: JSON with comments and trailing commas, TOML, YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.config.owners import KeyIndex

DEFAULT_PATH = Path("config/config.json")
_SUFFIXES = {
    ".json": "json",
    ".json5": "json",
    ".jsonc": "json",
    ".example": "json",
    ".toml": "toml",
    ".yaml": "yaml",
    ".yml": "yaml",
}


def load_config(path: Path | None = None, index: KeyIndex | None = None) -> dict[str, Any]:
    """The flat config in a file, under the keys' own names; ``config/config.json`` when no path is given.

    Keys may have leading dashes and may be aliases. Raises ConfigError when the file is missing or
    malformed, when it is no object, or when one key comes under two spellings.
    """
    from tuner.config.owners import KeyIndex, canonical
    from tuner.selection import Catalog, Wanted

    raw = raw_config(path)
    if index is None:
        catalog = Catalog()
        index = KeyIndex(catalog, Wanted.read(raw).certain(catalog))
    return canonical(raw, index, path or DEFAULT_PATH)


def raw_config(path: Path | None = None) -> dict[str, Any]:
    """The flat config in a file, with leading dashes taken from its keys. Raises ConfigError as :func:`load_config`."""
    file = DEFAULT_PATH if path is None else path
    if path is None and not file.is_file():
        raise ConfigError(
            f"there is no {DEFAULT_PATH} in this folder", where=Path.cwd(), remedy="name a config with --config PATH"
        )
    raw = plain_data(file)
    if not isinstance(raw, Mapping):
        raise ConfigError("a config must be one object of keys and values", where=file)
    config: dict[str, Any] = {}
    for name, value in raw.items():
        if (bare := bare_name(str(name))) in config:
            raise ConfigError(f"the key {bare!r} is given twice, once with leading dashes", where=file)
        config[bare] = value
    config.pop("$schema", None)  # for editors
    return config


def bare_name(name: str) -> str:
    """A key as users' files and flags may spell it, without leading dashes and with underscores."""
    return name.lstrip("-").replace("-", "_")


def plain_data(path: Path) -> Any:
    """The content of a JSON, TOML or YAML file, chosen by its suffix, as plain Python values.

    ``.json``, ``.json5``, ``.jsonc`` (and ``.example``) may have comments and trailing commas. Raises
    ConfigError naming file, line and column when the file cannot be read or is malformed.
    """
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(f"cannot tell the format of {path.name!r}", where=path, allowed=sorted(_SUFFIXES))
    text = _text(path)
    return {"json": _json, "toml": _toml, "yaml": _yaml}[kind](text, path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("the file does not exist", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file cannot be read: {error}", where=path) from None


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except ValueError:
        pass  # not strict JSON: json5 is slow, so it reads only what needs it
    import json5

    try:
        return json5.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        found = re.match(r"<string>:(\d+) (.*?)(?: at column (\d+))?$", str(error), re.DOTALL)
        if found is None:
            raise ConfigError(f"malformed JSON: {error}", where=path) from None
        raise _malformed("JSON", found[2].replace("\n", "\\n"), path, found[1], found[3]) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice in one object")
    return seen


def _toml(text: str, path: Path) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        what = str(error)[: place.start()] if place else str(error)
        raise _malformed("TOML", what, path, *(place.groups() if place else (None, None))) from None


def _yaml(text: str, path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, which YAML forbids and PyYAML lets pass."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, name in enumerate(names):
                if name in names[:number]:
                    mark = node.value[number][0].start_mark
                    raise yaml.MarkedYAMLError(problem=f"the key {name!r} comes twice", problem_mark=mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = (str(mark.line + 1), str(mark.column + 1)) if mark else (None, None)
        raise _malformed("YAML", str(error.problem or error), path, *place) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"malformed YAML: {error}", where=path) from None


def _malformed(kind: str, what: str, path: Path, line: str | None, column: str | None) -> ConfigError:
    place = ", ".join(f"{word} {number}" for word, number in (("line", line), ("column", column)) if number)
    return ConfigError(f"malformed {kind}: {what}", where=f"{path}, {place}" if place else path)
