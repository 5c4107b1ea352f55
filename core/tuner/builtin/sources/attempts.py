"""Asking a server again when it did not answer, and telling apart what asking again cannot mend."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tuner.builtin.sources.credentials import said

T = TypeVar("T")

ATTEMPTS = 4
PAUSE_SECONDS = 0.5
"""Before the second attempt; twice as long before each later one."""
_GONE = (404, 410)
_WORTH_ANOTHER = (408, 425, 429)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class RemoteError(Exception):
    """A server did not give what it was asked for; ``str(error)`` is the reason, without secrets."""


class Missing(RemoteError):
    """There is no such file or folder."""


class Refused(RemoteError):
    """The server answers, and will not give it: a wrong login, for instance."""


class Unreachable(RemoteError):
    """No answer, or none that can be used, after several attempts."""


def attempt(action: Callable[[], T], options: Mapping[str, Any]) -> T:
    """What ``action`` returns, tried again with growing pauses where that may help.

    Arguments
        options: of the file system; their secrets are kept out of the reasons.
    Raises Missing, Refused or Unreachable; OSError where the disk here is full or read-only.
    """
    for number in range(ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            failure = _judged(error, options)
            if not isinstance(failure, Unreachable) or number == ATTEMPTS - 1:
                raise failure from error
        time.sleep(PAUSE_SECONDS * 2**number)
    raise AssertionError("unreachable")


def _judged(error: Exception, options: Mapping[str, Any]) -> RemoteError:
    """What an error of a file system means. Raises it again when it is a defect, not an answer."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        # fsspec's HTTP file system says this whatever went wrong, a dead server included.
        return _judged(cause, options)
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in _GONE:
        return Missing(said(error, options))
    refused = status is not None and 400 <= status < 500 and status not in _WORTH_ANOTHER
    # The last two: options of the file system that only show themselves as wrong when they are used.
    if refused or isinstance(error, PermissionError | TypeError | ValueError):
        return Refused(said(error, options))
    if not isinstance(error, OSError) and type(error).__module__ == "builtins":
        raise error
    return Unreachable(said(error, options))


def _status(error: Exception) -> int | None:
    """The HTTP status in an error, wherever aiohttp, botocore or requests keep it."""
    answer: Any = getattr(error, "response", None)
    inner = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    places = (getattr(error, "status", None), inner, getattr(answer, "status_code", None))
    return next((status for status in places if isinstance(status, int)), None)
