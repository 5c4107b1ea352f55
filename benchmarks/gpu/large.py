"""Rows of Wan 14B: blocks streamed, 8-bit products, the true 832x480x81, each beside diffusers + PEFT."""

from __future__ import annotations

from gpu.running import Row
from gpu.training import (
    AREA,
    CLIP,
    COLUMNS,
    COMPILED,
    FULL,
    FUSED,
    OFFLOADED,
    PRODUCTS,
    SELECTIVE,
    STREAMED,
    TREAD,
    Part,
    kernel,
)

FLAVOUR = "t2v-480p-14b-2.1"
PLAIN, PLAIN_CLIP = "diffusers + PEFT, S = 18 900", "diffusers + PEFT, S = 32 760"
UNROUTED, BF16 = "fused, selective, S = 32 760", "fused, full, S = 18 900"
HELD = {"times_plain": PLAIN}
HELD_CLIP = {"times_plain": PLAIN_CLIP}


def rows(smoke: bool) -> list[Row]:
    """Those with goals first. On an H100 there is time for about the first eight; ``--only`` measures others."""
    part = Part(FLAVOUR, smoke)
    near = {"of_floor": 1.2}
    eight = [
        part.ours(
            f"fused, full, {name}, S = 18 900",
            AREA,
            FUSED,
            FULL,
            {"base_model_precision": name},
            needs=60,
            against={**HELD, "times_bf16": BF16},
            goal={"times_bf16": 1.12},
        )
        for name in PRODUCTS
    ]
    cosines = [
        part.cosine(f"{name}: LoRA's gradients, of bf16's", name, needs=50, goal={"cosine": 0.999}) for name in PRODUCTS
    ]
    return [
        part.plain(PLAIN, AREA, needs=60),
        part.ours(
            "fused, streamed, inputs offloaded, S = 18 900",
            AREA,
            FUSED,
            OFFLOADED,
            STREAMED,
            needs=65,
            against=HELD,
            goal={"seconds": 5.0, "peak_gib": 12, **near},
        ),
        part.ours(BF16, AREA, FUSED, FULL, needs=50, against=HELD, goal=near),
        eight[0],
        part.ours(UNROUTED, CLIP, FUSED, SELECTIVE, needs=75, against=HELD_CLIP, goal={"seconds": 10.0, **near}),
        part.ours(
            "fused, selective, TREAD 0.5, S = 32 760",
            CLIP,
            FUSED,
            SELECTIVE,
            TREAD,
            needs=50,
            against={**HELD_CLIP, "times_unrouted": UNROUTED},
            goal={"times_unrouted": 2.5},
        ),
        cosines[0],
        part.plain(PLAIN_CLIP, CLIP, needs=95),
        eight[1],
        cosines[1],
        part.ours("fused, selective, S = 18 900", AREA, FUSED, SELECTIVE, needs=50, against=HELD, goal=near),
        part.ours("eager, full, S = 18 900", AREA, FULL, needs=55, against=HELD),
        part.ours("compiled, full, S = 18 900", AREA, FULL, COMPILED, needs=90, against=HELD),
        *(
            part.ours(f"fused, full, {name}, S = 18 900", AREA, FUSED, FULL, kernel(name), needs=50, against=HELD)
            for name in part.attention
        ),
    ]


__all__ = ["COLUMNS", "rows"]
