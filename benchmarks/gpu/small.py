"""Rows of Wan 1.3B: what moves a step, lever by lever, each beside diffusers + PEFT."""

from __future__ import annotations

from gpu.running import Row
from gpu.training import (
    AREA,
    CLIP,
    COLUMNS,
    COMPILED,
    FREE,
    FULL,
    FUSED,
    OFFLOADED,
    PRODUCTS,
    SELECTIVE,
    TREAD,
    Part,
    kernel,
)

FLAVOUR = "t2v-480p-1.3b-2.1"
PLAIN, PLAIN_CLIP = "diffusers + PEFT, S = 18 900", "diffusers + PEFT, S = 32 760"
UNROUTED, BF16 = "fused, selective, S = 32 760", "fused, full, S = 18 900"
HELD = {"times_plain": PLAIN}
HELD_CLIP = {"times_plain": PLAIN_CLIP}


def rows(smoke: bool) -> list[Row]:
    """Those with goals first."""
    part = Part(FLAVOUR, smoke)
    near = {"of_floor": 1.2}
    return [
        part.plain(PLAIN, AREA, needs=22),
        part.ours(
            "fused, inputs offloaded, S = 18 900",
            AREA,
            FUSED,
            OFFLOADED,
            needs=20,
            against=HELD,
            goal={"seconds": 0.95, "peak_gib": 4.7, **near},
        ),
        part.ours(
            "fused, no checkpointing, S = 18 900",
            AREA,
            FUSED,
            FREE,
            needs=20,
            against=HELD,
            goal={"seconds": 0.72, **near},
        ),
        part.plain(PLAIN_CLIP, CLIP, needs=32),
        part.ours(UNROUTED, CLIP, FUSED, SELECTIVE, needs=26, against=HELD_CLIP, goal={"seconds": 1.95, **near}),
        part.ours(
            "fused, selective, TREAD 0.5, S = 32 760",
            CLIP,
            FUSED,
            SELECTIVE,
            TREAD,
            needs=24,
            against={**HELD_CLIP, "times_unrouted": UNROUTED},
            goal={"times_unrouted": 2.5},
        ),
        part.ours(BF16, AREA, FUSED, FULL, needs=20, against=HELD, goal=near),
        part.ours("fused, selective, S = 18 900", AREA, FUSED, SELECTIVE, needs=20, against=HELD, goal=near),
        part.ours("eager, full, S = 18 900", AREA, FULL, needs=20, against=HELD),
        part.ours("compiled, full, S = 18 900", AREA, FULL, COMPILED, needs=60, against=HELD),
        *(
            part.ours(f"fused, full, {name}, S = 18 900", AREA, FUSED, FULL, kernel(name), needs=20, against=HELD)
            for name in part.attention
        ),
        *(
            part.ours(
                f"fused, full, {name}, S = 18 900",
                AREA,
                FUSED,
                FULL,
                {"base_model_precision": name},
                needs=25,
                against={**HELD, "times_bf16": BF16},
            )
            for name in PRODUCTS
        ),
    ]


__all__ = ["COLUMNS", "rows"]
