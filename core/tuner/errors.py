"""How an error looks to a person: what is wrong, where, what is allowed, the nearest name, what to do.

Everything a user can mend is raised as a :class:`TunerError`; the command line prints it without a
traceback and exits with its code. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class TunerError(Exception):
    """Something a user can mend. ``str(error)`` is the whole message, ready to print.

    Arguments
        what: one sentence that says what is wrong, with the value that was found.
        where: the file, key, clip or plugin at fault.
        allowed: what would be accepted.
        nearest: the valid name closest to what was found.
        remedy: what to do about it, in the imperative.
    """

    exit_code: ClassVar[int] = 2
    label: ClassVar[str] = "error"
    """What the command line puts before the message."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        allowed: str | Iterable[object] | None = None,
        nearest: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.allowed = allowed if allowed is None or isinstance(allowed, str) else ", ".join(map(str, allowed))
        self.nearest = nearest
        self.remedy = remedy
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.what]
        for label, value in (
            ("where", self.where),
            ("allowed", self.allowed),
            ("nearest", self.nearest and f"did you mean {self.nearest!r}?"),
            ("to do", self.remedy),
        ):
            if value:
                lines.append(f"  {label + ':':<9}{value}")
        return "\n".join(lines)


class ConfigError(TunerError):
    """A config file, a key or a flag is wrong."""


class PluginError(TunerError):
    """A plugin, or the choice of plugins, is at fault."""


class DataError(TunerError):
    """A dataset, a clip, a caption or the cache is at fault."""


class ModelError(TunerError):
    """Model files are missing or do not fit."""


class CheckpointError(TunerError):
    """A checkpoint cannot be written or read."""


class TrainingError(TunerError):
    """Training cannot go on: non-finite values, parameters without gradients, and the like."""

    exit_code = 3


class Stopped(TunerError):
    """Someone asked the run to stop, and it did, saved."""

    exit_code = 130
    label = "stopped"


class FailedElsewhere(TunerError):
    """Another process of this run failed and says why; this one only ends."""


class ConfigErrors(ConfigError):
    """Several config errors found in one reading, printed together so that all can be mended at once."""

    def __init__(self, errors: Iterable[TunerError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``word``, or None when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return close[0] if close else None
