"""Rows of memory: small cards, and what each lever costs; chosen from ``gpu_memory.py`` to fit into one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpu_memory import CLIP, LARGE, LEVERS, PICTURE, SHORT, SMALL, TINY
from gpu_run import Case

from gpu.running import Row
from gpu.training import STEPS, WARM_UP, ours

COLUMNS = (
    *("tokens", "seconds", "times_full", "times_streaming", "times_unlimited", "of_floor", "peak_gib", "predicted_gib"),
    *("off_predicted", "reserved_gib", "total_gib"),
)
LONG, TINY_SHAPE = (161, 480, 832), (5, 64, 64)
ALL = "all + int8"
PLANNED = 0.10
"""How far a peak may be from the predicted one."""


def rows(smoke: bool) -> list[Row]:
    """Small cards first, then what a lever costs of the plain step. ``make gpu-memory-PART`` measures all of them."""

    def row(name: str, flavour: str, shape: tuple[int, int, int], lever: str, needs: float, **more: Any) -> Row:
        limit: float | None = more.pop("limit", None)
        goal: Mapping[str, float] = {**more.pop("goal", {}), "off_predicted": PLANNED}
        case = Case(name, flavour, shape, LEVERS[lever], limit=limit)
        if limit is not None:
            goal = {**goal, "total_gib": limit}
        if smoke:
            case = replace(case, shape=TINY_SHAPE, narrow=TINY)
        return Row(name, ours, (case, WARM_UP, 1 if smoke else STEPS), needs=needs, goal=goal, **more)

    full, streaming = "1.3B, 33 frames, full", "1.3B, 33 frames, streaming"
    held = {"times_full": full}
    return [
        row("14B, 81 frames, all + int8, within 10 GiB", LARGE, CLIP, ALL, 110, limit=10),
        row("14B, an image, all + int8, within 4 GiB", LARGE, PICTURE, ALL, 45, limit=4),
        row("1.3B, 81 frames, all + int8, within 3 GiB", SMALL, CLIP, ALL, 40, limit=3),
        row("1.3B, an image, all + int8, within 1.5 GiB", SMALL, PICTURE, ALL, 25, limit=1.5),
        row("1.3B, 161 frames, all + int8, within 6 GiB", SMALL, LONG, ALL, 65, limit=6),
        row(full, SMALL, SHORT, "full", 20),
        row("1.3B, 33 frames, offload", SMALL, SHORT, "offload", 20, against=held, goal={"times_full": 1 / 1.02}),
        row(streaming, SMALL, SHORT, "streaming", 20, against=held, goal={"times_full": 1 / 1.03}),
        row(
            "1.3B, 33 frames, streaming + chunked",
            SMALL,
            SHORT,
            "streaming + chunked",
            20,
            against={**held, "times_streaming": streaming},
            goal={"times_streaming": 1 / 1.01},
        ),
        row("1.3B, 33 frames, selective", SMALL, SHORT, "selective", 20, against=held),
        row("1.3B, 33 frames, none", SMALL, SHORT, "none", 20, against=held),
    ]
