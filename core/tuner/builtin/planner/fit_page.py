"""What fits, as a table and as settings to paste."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from tuner.builtin.planner.candidates import Choice
    from tuner.builtin.planner.fit import Fit

GIB = 2**30
SHOWN = 8
"""Choices that the table lists."""


def tables(fit: Fit, limit: float) -> Iterator[Table | str]:
    """The ranked choices beside the present config, what was refused, and the best one's settings."""
    title = f"settings that fit {limit / GIB:.1f} GiB, the fastest first"
    if not fit.fits:
        title = f"nothing fits {limit / GIB:.1f} GiB; what comes nearest"
    table = Table(title=title, title_justify="left")
    for column in ("settings", "device GiB", "most in", "host GiB", "time"):
        table.add_column(column, justify="left" if column in ("settings", "most in") else "right")
    table.add_row("as it is", *_figures(fit.present, fit.present))
    for choice in [each for each in fit.choices if each.changes][:SHOWN]:
        table.add_row(
            ", ".join(f"{name}: {_written(value)}" for name, value in choice.changes.items()),
            *_figures(choice, fit.present),
        )
    yield table
    for reason in fit.refused:
        yield f"not together: {reason}"
    best = fit.choices[0]
    if not fit.fits:
        yield "what is left is the clip itself: a smaller resolution or fewer frames need less"
    elif not best.changes:
        yield "the config fits as it is"
    else:
        yield f"to change: {json.dumps(dict(best.changes))}"


def as_json(fit: Fit) -> dict[str, Any]:
    """The same for programs; bytes, and time as a multiple of the present config's."""
    return {
        "fits": fit.fits,
        "present": _object(fit.present, fit.present),
        "choices": [_object(choice, fit.present) for choice in fit.choices],
        "refused": dict(fit.refused),
    }


def _object(choice: Choice, present: Choice) -> dict[str, Any]:
    return {
        "changes": dict(choice.changes),
        "device": choice.device,
        "phases": {str(each): each.memory.on_device for each in choice.phases},
        "host": choice.host,
        "time": choice.work / present.work,
    }


def _figures(choice: Choice, present: Choice) -> tuple[str, ...]:
    return (
        f"{choice.device / GIB:.1f}",
        str(choice.worst),
        f"{choice.host / GIB:.1f}",
        f"x {choice.work / present.work:.2f}",
    )


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
