"""Logins: taken from the environment where a user says so, and kept out of every message."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SECRET = re.compile(r"key|secret|token|password|credential|account|sas|auth|header|cookie|connection", re.IGNORECASE)
_LOGIN = re.compile(r"(\w+://)[^/\s'\"@]+@")
_QUERY = re.compile(r"(\w+://[^\s'\"?]+)\?[^\s'\"]*")
_SHORTEST = 4
"""Values shorter than this are no secret worth hiding, and hiding them would garble every message."""


def resolved(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``options`` with each value ``$NAME`` or ``${NAME}`` replaced by that environment variable's.

    Raises ConfigError naming a variable that is not set.
    """
    return {name: _resolved(value, f"{where}.{name}" if where else name) for name, value in options.items()}


def _resolved(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return resolved(value, where)
    if isinstance(value, list | tuple):
        return [_resolved(each, where) for each in value]
    match = _VARIABLE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    variable = match[1] or match[2]
    if variable not in os.environ:
        raise ConfigError(
            f"{where} is taken from the environment variable {variable}, and there is none",
            remedy=f"set {variable}, or write the value itself",
        )
    return os.environ[variable]


def shown(address: str) -> str:
    """An address without its login and its query, where signatures stand."""
    return _QUERY.sub(r"\1", _LOGIN.sub(r"\1", address))


def said(error: BaseException, options: Mapping[str, Any]) -> str:
    """What an error says, on one line, without the secrets of ``options`` and without those in addresses."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in sorted(set(_secrets(options)), key=len, reverse=True):
        text = text.replace(secret, "***")
    return shown(text)


def _secrets(options: Any, name: str = "") -> Iterator[str]:
    """Texts in ``options`` that stand under a name such as ``secret`` or ``headers``."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _secrets(value, f"{name}.{key}")
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _secrets(value, name)
    elif isinstance(options, str) and len(options) >= _SHORTEST and _SECRET.search(name):
        yield options
