"""How much of the average stays at a step: the schedule of diffusers' ``EMAModel``, as plain arithmetic."""

from __future__ import annotations

import math


def decay_at(step: int, origin: int, ceiling: float) -> float:
    """Share of the average that stays at ``step`` of a network, whose average is the weights of step ``origin``.

    ``min((1 + s) / (10 + s), ceiling)`` with s = step - origin (diffusers, ``EMAModel.get_decay``): an average of
    few steps follows the weights quickly, so that those it began with do not linger.
    """
    since = step - origin
    return 0.0 if since <= 0 else min((1 + since) / (10 + since), ceiling)


def decay_over(after: int, until: int, origin: int, ceiling: float) -> float:
    """The decays of the steps ``after`` + 1 to ``until`` in one: an update every n steps stands for n of them."""
    return math.prod(decay_at(step, origin, ceiling) for step in range(after + 1, until + 1))
