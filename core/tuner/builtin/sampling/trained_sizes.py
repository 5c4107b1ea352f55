"""Whether validation renders at a size that the model is trained on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tuner.builtin import buckets
from tuner.builtin.sampling.settings import Settings, settings_for

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.run import Run
    from tuner.spec import ModelSpec

SHOWN = 5
"""Trained sizes that a warning names."""


def untrained(run: Run, spec: ModelSpec, data: Prepared, settings: Settings | None = None) -> str | None:
    """The warning for a size that no bucket has, with the ``resolution`` that would give it; else None.

    ``settings``: of the clip; None are those of the run.
    """
    settings = settings or settings_for(run, spec)[0]
    width, height = settings.width, settings.height
    sizes = Counter((sample.bucket.width, sample.bucket.height) for sample in data.samples)
    if not sizes or (width, height) in sizes:
        return None
    trained = ", ".join(f"{each[0]}x{each[1]}" for each, _ in sizes.most_common(SHOWN)) + " …" * (len(sizes) > SHOWN)
    core = run.config
    resolution = buckets.resolution_for(
        width,
        height,
        unit=core.resolution_type,
        multiple=core.aspect_bucket_alignment or spec.size_multiple,
        rounding=core.aspect_bucket_rounding,
    )
    nearest = min(sizes, key=lambda each: (abs(each[0] - width) + abs(each[1] - height), each))
    mend = f"set validation_resolution to {nearest[0]}x{nearest[1]}"
    if resolution is not None:
        mend += f", or train at it with resolution {resolution:g} ({core.resolution_type}) and clips of that aspect"
    return f"validation renders at {width}x{height}, and no clip is trained at that size ({trained}): {mend}"
