"""The one console that progress is shown on, so that bars of different parts stand below each other."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def console() -> Console:
    """Rich's console on standard error."""
    from rich.console import Console

    return Console(stderr=True)
