"""What spoils clips of Wan, said before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.spec import ModelSpec

ENOUGH_STEPS = 40
"""Samplers of first order need them; UniPC, which is of higher order, comes out with fewer."""
GUIDANCE = (3.0, 6.0)
"""Below, clips drift from their prompt; above, colours burn and motion stops."""


def advice(run: Run, spec: ModelSpec, *, pair: bool) -> Iterator[str]:
    """Lines about steps and guidance of the validation clips.

    ``pair``: whether both experts render.
    """
    values: dict[str, Any] = {
        name: getattr(run.config, key) if key in run.explicit else spec.defaults.get(key, getattr(run.config, key))
        for name in ("num_inference_steps", "noise_scheduler", "guidance", "guidance_2")
        for key in (f"validation_{name}",)
    }
    steps, scheduler = values["num_inference_steps"], values["noise_scheduler"]
    if scheduler != "unipc" and steps < ENOUGH_STEPS:
        yield (
            f"validation renders with {steps} steps of {scheduler}: Wan needs {ENOUGH_STEPS} with it; "
            "set validation_noise_scheduler to unipc, or validation_num_inference_steps higher"
        )
    low, high = GUIDANCE
    for name in ("guidance", "guidance_2") if pair else ("guidance",):
        scale = values[name]
        if scale is not None and not low <= scale <= high:
            yield f"validation_{name} is {scale:g}: Wan renders well from {low:g} to {high:g}"
    if spec.boundary is not None and not pair and "validation_guidance_2" in run.explicit:
        yield (
            "validation_guidance_2 does nothing: one expert renders alone; "
            "set wan_validation_load_other_stage to render with both"
        )
