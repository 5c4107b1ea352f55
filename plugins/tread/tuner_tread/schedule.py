"""How much of each route's ratio counts at a step: a function of the step and the length of the run. No torch here."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]

LEVELS = 16
"""Ratios that a ramp goes through: each gives the blocks another number of tokens, to which kernels are tuned anew."""


def share_at(schedule: Schedule, step: int, total: int, warmup: int | None = None) -> float:
    """The factor, in [0, 1] and in sixteenths, by which every ratio is multiplied in a step.

    Arguments
        step: optimizer steps done, so 0 in the first step.
        total: optimizer steps of the run.
        warmup: steps of the ramp of ``linear``; a tenth of the run when None.

    ``linear`` is 0 in the first step, grows evenly and is 1 after the ramp; ``cosine`` is 1 in the first step and
    falls along half a cosine to 0 in the last.
    """
    if schedule == "linear":
        progress = min(1.0, step / (warmup or default_warmup(total)))
    elif schedule == "cosine":
        progress = (1 + math.cos(math.pi * min(1.0, step / max(1, total - 1)))) / 2
    else:
        return 1.0
    return round(progress * LEVELS) / LEVELS


def default_warmup(total: int) -> int:
    """Steps of the ramp where the user names none: a tenth of the run, at least one."""
    return max(1, total // 10)
