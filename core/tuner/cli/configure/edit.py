"""Change values in a JSON file with comments, and leave everything else in it as its owner wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

OPEN = {"{": "}", "[": "]"}
INDENT = "  "


class Member(NamedTuple):
    """A member of an object, or an item of a list, by offsets into the text."""

    name: str
    """the key without quotes; empty for an item"""
    start: int
    value: int
    end: int


def container_at(text: str) -> int:
    """Where the outermost object or list begins. The text must be valid."""
    return _skip(text, 1 if text.startswith("\ufeff") else 0)


def members(text: str, at: int) -> tuple[list[Member], int]:
    """The members of the object or list that opens at ``at``, and where it closes. The text must be valid."""
    found: list[Member] = []
    keyed, here = text[at] == "{", _skip(text, at + 1)
    while text[here] != OPEN[text[at]]:
        start, name = here, ""
        if keyed:
            after = _value_end(text, here)
            name = text[here:after].strip("\"'")
            here = _skip(text, _skip(text, after) + 1)
        end = _value_end(text, here)
        found.append(Member(name, start, here, end))
        here = _skip(text, end)
        here = _skip(text, here + 1) if text[here] == "," else here
    return found, here


def changed(
    text: str,
    at: int,
    values: Mapping[str, Any],
    *,
    why: Mapping[str, str] = {},
    without: Collection[str] = (),
    name_of: Callable[[str], str] = str,
) -> str:
    """``text`` with members of the object at ``at`` set to ``values``, or taken out.

    Members that are not named stay as they are, with their comments; a comment behind a value that changes is replaced.

    Arguments
        why: comments of the values.
        without: members to take out.
        name_of: the name that a key as the file spells it goes by.
    """
    present, close = members(text, at)
    added = {name: value for name, value in values.items() if name not in {name_of(each.name) for each in present}}
    text = _with_added(text, at, present, close, added, why)
    for each in reversed(present):
        name = name_of(each.name)
        if name in values:
            tail = _tail(text, each.end)
            comma = "," if text[each.end : tail].lstrip().startswith(",") or each is not present[-1] or added else ""
            comment, rest = _comment(why.get(name)), text[tail:]
            if comment and rest.partition("\n")[0].strip():  # it must not swallow what follows in the line
                comment, rest = f"{comment}\n{_indent(text, present, at)}", rest.lstrip(" ")
            text = text[: each.value] + written(values[name]) + comma + comment + rest
        elif name in without:
            first = text.rfind("\n", 0, each.start) + 1
            first = first if not text[first : each.start].strip() else each.start
            last = _tail(text, each.end)
            text = text[:first] + text[last + (text[last : last + 1] == "\n" and first != each.start) :]
    return text


def written(value: Any, depth: int = 1) -> str:
    """A value as JSON; objects in lines of their own at ``depth``."""
    text = json.dumps(value, ensure_ascii=False, indent=2 if isinstance(value, dict) else None)
    return text.replace("\n", "\n" + INDENT * depth)


def fresh(values: Mapping[str, Any], why: Mapping[str, str], head: str = "") -> str:
    """A new object with a comment on each member."""
    lines = [f"{INDENT}{_member(name, value)},{_comment(why.get(name))}\n" for name, value in values.items()]
    return f"{head}{{\n{''.join(lines)}}}\n"


def indented(item: str) -> str:
    """An object from :func:`fresh` as an item of a list."""
    return "".join(f"{INDENT}{line}\n" for line in (item.rstrip() + ",").splitlines())


def appended(text: str, at: int, item: str) -> str:
    """``text`` with an object from :func:`fresh` at the end of the list that opens at ``at``."""
    present, close = members(text, at)
    line = text.rfind("\n", 0, close) + 1
    place, lead = (close, "\n") if text[line:close].strip() else (line, "")
    text = text[:place] + lead + indented(item) + text[place:]
    if present and text[_skip(text, present[-1].end)] != ",":
        text = text[: present[-1].end] + "," + text[present[-1].end :]
    return text


def _member(name: str, value: Any) -> str:
    return f"{json.dumps(name, ensure_ascii=False)}: {written(value)}"


def _comment(why: str | None) -> str:
    return f" // {' '.join(why.split())}" if why else ""


def _with_added(
    text: str, at: int, present: list[Member], close: int, added: Mapping[str, Any], why: Mapping[str, str]
) -> str:
    """With new members before the closing bracket."""
    if not added:
        return text
    indent = _indent(text, present, at)
    lines = "".join(f"{indent}{_member(name, value)},{_comment(why.get(name))}\n" for name, value in added.items())
    line = text.rfind("\n", 0, close) + 1
    alone = not text[line:close].strip()
    place = line if alone else close
    text = text[:place] + ("" if alone else "\n") + lines + text[place:]
    if present and text[_skip(text, present[-1].end)] != ",":
        text = text[: present[-1].end] + "," + text[present[-1].end :]
    return text


def _indent(text: str, present: list[Member], at: int) -> str:
    """What stands before the members of the object at ``at``."""
    if present:
        line = text.rfind("\n", 0, present[0].start) + 1
        if not (before := text[line : present[0].start]).strip():
            return before
    return INDENT * (1 + text[:at].count("[") if text[at] == "{" else 1)


def _tail(text: str, end: int) -> int:
    """Where the comma and the comment in the line of a value that ends at ``end`` are over."""
    here = _blank(text, end)
    if text[here : here + 1] == ",":
        end = here + 1
        here = _blank(text, end)
    if text[here : here + 2] == "//":
        line = text.find("\n", here)
        return len(text) if line < 0 else line
    return end


def _blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t"):
        at += 1
    return at


def _skip(text: str, at: int) -> int:
    """The next place at or behind ``at`` that is neither white nor comment."""
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text.startswith("//", at):
            line = text.find("\n", at)
            at = len(text) if line < 0 else line
        elif text.startswith("/*", at):
            at = text.index("*/", at) + 2
        else:
            break
    return at


def _value_end(text: str, at: int) -> int:
    """Where the key or value that begins at ``at`` is over."""
    if text[at] in OPEN:
        return members(text, at)[1] + 1
    if text[at] in "\"'":
        quote, at = text[at], at + 1
        while text[at] != quote:
            at += 2 if text[at] == "\\" else 1
        return at + 1
    while text[at] not in ",:}]" and not text[at].isspace() and not text.startswith(("//", "/*"), at):
        at += 1
    return at
