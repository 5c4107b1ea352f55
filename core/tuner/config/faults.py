"""From what pydantic found to errors a person can act on: key, value, what is allowed, the nearest name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tuner.config.describe import allowed, members, model_in, type_words
from tuner.errors import ConfigError, ConfigErrors, TunerError, nearest

M = TypeVar("M", bound=BaseModel)
_LONGEST = 100


def build(model: type[M], values: Mapping[str, Any], *, where: object = None) -> M:
    """Make a config model from a user's values.

    ``where`` names their origin: a text for all of them, or a mapping of key to text.
    Raises :class:`ConfigErrors` with everything that is wrong, one error per key.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigErrors(faults(error, model, where)) from None


def join(errors: Iterable[TunerError]) -> TunerError | None:
    """One error for several found in one reading; the error itself when there is one; None when there is none."""
    flat = [each for error in errors for each in (error.errors if isinstance(error, ConfigErrors) else [error])]
    return flat[0] if len(flat) == 1 else ConfigErrors(flat) if flat else None


def shown(value: Any) -> str:
    """A found value as JSON, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def faults(error: ValidationError, model: type[BaseModel], where: object = None) -> list[ConfigError]:
    """One ConfigError per faulty key of ``model``."""
    found = [(_path(model, details["loc"], details["type"]), details) for details in error.errors(include_url=False)]
    deepest: dict[tuple[str | int, ...], list[Any]] = {}
    for path, details in found:
        # A union reports every branch it tried; the branch that came furthest says what is wrong.
        if not any(other[: len(path)] == path and len(other) > len(path) for other, _ in found):
            deepest.setdefault(path, []).append(details)
    return [_fault(model, path, details, _origin(where, path)) for path, details in deepest.items()]


def _origin(where: object, path: tuple[str | int, ...]) -> object:
    return where.get(path[0]) if isinstance(where, Mapping) and path else where


def _fault(model: type[BaseModel], path: tuple[str | int, ...], details: list[Any], where: object) -> ConfigError:
    first, name = details[0], _spelt(path)
    siblings = _siblings(model, path)
    if first["type"] == "extra_forbidden":
        parent = _spelt(path[:-1])
        what = f"{parent} has no key {path[-1]!r}" if parent else f"there is no key {path[-1]!r}"
        return ConfigError(what, where=where, allowed=siblings, nearest=nearest(str(path[-1]), siblings))
    if first["type"] == "missing":
        return ConfigError(f"{name} is missing", where=where, allowed=siblings)
    value = shown(first["input"])
    if len(details) == 1 and first["type"] in ("value_error", "assertion_error"):
        return ConfigError(f"{name or 'this'} is {value}: {first['msg'].removeprefix('Value error, ')}", where=where)
    choices = _choices(model, path)
    return ConfigError(
        f"{name} cannot be {value}",
        where=where,
        allowed=choices or _field(model, path),
        nearest=nearest(str(first["input"]), choices),
        remedy=_json_fault(first["input"]),
    )


def _json_fault(value: Any) -> str | None:
    """Why a text that looks like JSON was not read as such."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return None
    import json5

    try:
        json5.loads(value)
    except ValueError as error:
        return f"mend the JSON: {str(error).removeprefix('<string>:')}"
    return None


def _spelt(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _path(model: type[BaseModel], location: tuple[str | int, ...], kind: str) -> tuple[str | int, ...]:
    """A pydantic location without the names of the union branches that it passes through."""
    path: list[str | int] = []
    here: Any = model
    for index, part in enumerate(location):
        inner = _step(here, part)
        if inner is None and not (kind == "extra_forbidden" and index == len(location) - 1):
            continue
        path.append(part)
        here = inner
    return tuple(path)


def _step(annotation: Any, part: str | int) -> Any:
    """The type found under ``part`` of a value of this type; None when there is no such place."""
    for member in members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
            return member.model_fields[str(part)].annotation
        if isinstance(part, int) and origin in (list, tuple, set, frozenset):
            return arguments[0] if arguments else Any
        if isinstance(part, str) and origin is dict and len(members(annotation)) == 1:
            return arguments[1]
    return None


def _parent(model: type[BaseModel], path: tuple[str | int, ...]) -> Any:
    here: Any = model
    for part in path[:-1]:
        here = _step(here, part)
    return here


def _siblings(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    inner = model_in(_parent(model, path)) if path else None
    return list(inner.model_fields) if inner else []


def _info(model: type[BaseModel], path: tuple[str | int, ...]) -> FieldInfo | None:
    inner = model_in(_parent(model, path)) if path and isinstance(path[-1], str) else None
    return inner.model_fields.get(str(path[-1])) if inner else None


def _field(model: type[BaseModel], path: tuple[str | int, ...]) -> str | None:
    """What is allowed at ``path``, in words."""
    if info := _info(model, path):
        return allowed(info)
    inner = _step(_parent(model, path), path[-1]) if path else None
    return type_words(inner) if inner is not None else None


def _choices(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The values of a field that only takes certain words."""
    inner = _step(_parent(model, path), path[-1]) if path else None
    kinds = members(inner) if inner is not None else ()
    words = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    flags = ["true", "false"] if bool in kinds else []
    return [*flags, *words] if all(kind is bool or get_origin(kind) is Literal for kind in kinds) and words else []
