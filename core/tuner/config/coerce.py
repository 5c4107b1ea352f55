"""Bring values as people write them into what a field's type accepts, before pydantic judges them.

Flags and environment variables are always text, YAML reads ``1e-4`` as text and ``no`` as false, and
users' files have ``"true"``, ``1e6`` for a count and ``9`` for a list of one. What cannot be brought is
left as it is, so that the error shows what was found. JSON inside text is read only where the field is
a list or an object: a prompt may begin with a brace.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from tuner.config.describe import members

_LISTS = (list, tuple, set, frozenset)
_NOTHING = frozenset({"none", "null", ""})
_SPOKEN = {True: ("yes", "true", "on"), False: ("no", "false", "off", "none")}


def coerce_fields(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``values`` with each value brought towards the type of the field it is for."""
    fields = model.model_fields
    return {name: coerce(value, fields[name].annotation) if name in fields else value for name, value in values.items()}


def coerce(value: Any, annotation: Any) -> Any:
    """``value`` as ``annotation`` accepts it, or unchanged where that is not possible."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return coerce(value, get_args(annotation)[0])
    if value is None or annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _for_union(value, annotation)
    if origin is Literal:
        return _for_literal(value, get_args(annotation))
    kind = origin or annotation
    if not isinstance(kind, type) or kind is bool:
        return value
    if issubclass(kind, int | float):
        return _for_number(value, kind)
    if issubclass(kind, str):
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if issubclass(kind, _LISTS):
        return _for_list(value, get_args(annotation))
    if issubclass(kind, dict | BaseModel):
        return _parsed(value)
    return value


def _for_union(value: Any, annotation: Any) -> Any:
    choices = members(annotation)
    if len(choices) == 1:
        words = str in choices or get_origin(choices[0]) is Literal
        if isinstance(value, str) and value.strip().lower() in _NOTHING and not words and Path not in choices:
            return None
        return coerce(value, choices[0])
    if isinstance(value, str) and any(_is_container(choice) for choice in choices):
        return _parsed(value)
    return value


def _for_literal(value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, bool):
        return next((word for word in _SPOKEN[value] if word in choices), value)
    return value if value in choices else next((each for each in choices if str(each) == str(value)), value)


def _for_number(value: Any, kind: type) -> Any:
    if isinstance(value, bool):
        # pydantic would take true for 1: a flag without its value must not become a number.
        return "true" if value else "false"
    if issubclass(kind, int) and isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else value
    return value


def _for_list(value: Any, items: tuple[Any, ...]) -> Any:
    item = items[0] if items else Any
    value = _parsed(value)
    if isinstance(value, str) and not any(_is_container(choice) for choice in members(item)):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, str | int | float | Mapping):
        value = [value]
    return [coerce(each, item) for each in value] if isinstance(value, _LISTS) else value


def _is_container(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, (*_LISTS, dict, BaseModel))


def _parsed(value: Any) -> Any:
    """A list or object written as JSON in text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        import json5

        with suppress(ValueError):
            return json5.loads(value)
    return value
