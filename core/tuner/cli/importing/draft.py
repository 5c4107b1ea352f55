"""What comes of another tool's files: our keys, and a row for each of theirs, so that none is dropped silently."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "not known here: look whether you need it"
SECRET = "a secret: not copied; log in with the service's own command, or set its environment variable"
HIDDEN = "(hidden)"
SECRETS = ("token", "api_key", "password", "secret")


@dataclass(frozen=True)
class Rule:
    """What one key of another tool becomes."""

    ours: str = ""
    """our key, or several with commas; empty where there is none"""
    why: str = ""
    """where it differs, or why there is none"""
    values: Mapping[Any, Any] | None = None
    """their value -> ours, where they are named differently"""
    convert: Callable[[Any], Any] | None = None
    joint: bool = False
    """whether the tool's code sets our key, together with other keys"""


@dataclass(frozen=True)
class Row:
    """A line of the table that the command prints."""

    theirs: str
    value: Any
    ours: str
    why: str
    joint: bool = False
    """whether a later row about the same key may say it better"""


def same(ours: str, why: str = "", **how: Any) -> Rule:
    """Their value is our value, or one conversion away from it."""
    return Rule(ours, why, **how)


def joint(ours: str, why: str = "") -> Rule:
    """Several of their keys make ours."""
    return Rule(ours, why, joint=True)


def moot(why: str) -> Rule:
    """There is none, and why."""
    return Rule("", why)


@dataclass
class Draft:
    """What would be written."""

    tool: str
    settings: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def apply(self, given: Mapping[str, Any], table: Mapping[str, Rule], where: str = "", to: Any = None) -> None:
        """A row for each key of ``given``, and our key where the table has a plain one.

        Arguments
            where: what stands before their keys in the rows, such as ``datasets[0].``.
            to: receives our keys; the config when absent.
        """
        target = self.settings if to is None else to
        for key, value in given.items():
            if is_secret(key):
                self.rows.append(Row(where + key, HIDDEN, "", SECRET))
                continue
            rule = table.get(key)
            if rule is None:
                self.rows.append(Row(where + key, value, "", UNKNOWN))
            elif not rule.ours or rule.joint:
                self.rows.append(Row(where + key, value, rule.ours, rule.why, rule.joint))
            else:
                self._plain(where + key, value, rule, target)

    def put(self, theirs: str, value: Any, why: str, **ours: Any) -> None:
        """Our keys that something of theirs, given or a default, amounts to; with a row."""
        self.settings |= ours
        self.rows.append(Row(theirs, value, ", ".join(ours), why))

    def none(self, theirs: str, value: Any, why: str) -> None:
        """A row for what has no counterpart."""
        self.rows.append(Row(theirs, value, "", why))

    def default(self, theirs: str, value: Any, **ours: Any) -> None:
        """Our keys for a default of theirs that is not ours."""
        self.put(theirs, value, "not given: the default there", **ours)

    def move(self, ours: str, to: str, why: str) -> Any:
        """Take one of our keys back; its rows then say ``to`` instead. What it was set to, or None."""
        self.rows = [Row(row.theirs, row.value, to, why, row.joint) if row.ours == ours else row for row in self.rows]
        return self.settings.pop(ours, None)

    def table(self) -> list[Row]:
        """The rows, each of their keys once where what became of several together is said in a row of its own."""
        said = {key for row in self.rows if not row.joint for key in row.theirs.split(", ")}
        return [row for row in self.rows if not (row.joint and row.theirs in said)]

    def _plain(self, theirs: str, value: Any, rule: Rule, target: dict[str, Any]) -> None:
        if rule.values is not None:
            name = value.lower() if isinstance(value, str) else value
            if name not in rule.values:
                known = ", ".join(map(str, rule.values))
                self.none(theirs, value, f"no counterpart for this value, so ours is the default; known are {known}")
                return
            value_here = rule.values[name]
        else:
            try:
                value_here = rule.convert(value) if rule.convert else value
            except (TypeError, ValueError, KeyError, IndexError, SyntaxError):
                self.none(theirs, value, "this value cannot be understood")
                return
        target[rule.ours] = value_here
        self.rows.append(Row(theirs, value, rule.ours, rule.why))


def is_secret(key: str) -> bool:
    """Whether a key's value is a login."""
    name = key.rpartition(".")[2].lower()
    return any(name == word or name.endswith(f"_{word}") for word in SECRETS)


def flat(given: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Objects in objects as ``outer.inner``."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def options(given: Any) -> dict[str, Any]:
    """``name=value`` words as an object, values as Python literals where they are some. Raises ValueError."""
    words = given.split() if isinstance(given, str) else list(given)
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = str(word).partition("=")
        if not equals:
            raise ValueError(word)
        found[name.strip()] = literal(text)
    return found


def literal(text: str) -> Any:
    """A Python or JSON literal, or the text itself; tuples as lists."""
    lower = text.strip().lower()
    if lower in ("true", "false"):
        return lower == "true"
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, tuple) else value


def switched(value: Any) -> bool:
    """A switch as files and command lines spell it."""
    return value if isinstance(value, bool) else str(value).lower() in ("", "true", "1", "yes")
