"""What a config key says about itself: its facts, and its type in words a user knows."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    dict: "object",
    Any: "anything",
}
_BOUNDS = {
    "gt": "> {}",
    "ge": "≥ {}",
    "lt": "< {}",
    "le": "≤ {}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


@dataclass(frozen=True)
class KeyFacts:
    """What :func:`tuner.plugin.key` recorded beside type and default."""

    effect: str | None = None
    aliases: tuple[str, ...] = ()
    environment: str | None = None
    pending: str | None = None
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def facts(described: FieldInfo) -> KeyFacts:
    """The facts of a field made with ``key``; empty ones for any other field."""
    extra = described.json_schema_extra
    recorded: Any = extra.get("tuner") if isinstance(extra, dict) else None
    if not isinstance(recorded, dict):
        return KeyFacts()
    names = ("environment", "pending", "needs")
    return KeyFacts(recorded["effect"], tuple(recorded["aliases"]), *(recorded[name] for name in names))


def members(annotation: Any) -> tuple[Any, ...]:
    """The types a value may have: the members of a union without ``None``, or the type alone."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for each in get_args(annotation) if each is not type(None) for inner in members(each))
    return (annotation,)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The nested model that a field holds, directly or as the items of a list."""
    for member in members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            return member
        if get_origin(member) in (list, tuple) and (inner := model_in(get_args(member)[0])):
            return inner
    return None


def type_words(annotation: Any) -> str:
    """The type in words: ``whole number``, ``list of number``, or the values of a Literal."""
    return " or ".join(dict.fromkeys(_member_words(member) for member in members(annotation)))


def _member_words(member: Any) -> str:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (list, tuple, set, frozenset):
        return f"list of {type_words(arguments[0])}" if arguments else "list"
    if isinstance(member, type) and issubclass(member, BaseModel):
        return f"object with {', '.join(member.model_fields)}"
    return _WORDS.get(origin or member, getattr(member, "__name__", str(member)))


def allowed(field: FieldInfo) -> str:
    """Type and bounds of a field, for an error's ``allowed`` line and for the table of keys."""
    bounds = [
        text.format(getattr(rule, name))
        for rule in field.metadata
        for name, text in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([type_words(field.annotation), *bounds])


def shown_default(field: FieldInfo) -> str:
    """A field's default as a config file would have it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=str)
