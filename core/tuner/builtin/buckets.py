"""Which bucket a clip belongs to, and whether it may be used at all. Pure arithmetic.

The rule: the aspect r = longer / shorter side, rounded to ``aspect_bucket_rounding`` decimals, names the
bucket; its sides are edge*sqrt(r) and edge/sqrt(r), each rounded to the model's multiple. A source turned
by 90 degrees gets the transposed bucket.
"""

from __future__ import annotations

import math
from typing import Literal

from tuner.data.samples import Bucket, Framing
from tuner.spec import LatentGeometry

ResolutionType = Literal["pixel_area", "pixel", "area"]


def measure(width: int, height: int, unit: ResolutionType) -> float:
    """The size of a picture in the unit of ``resolution_type``.

    ``pixel_area``: the edge in pixels of the square of equal area; ``pixel``: the shorter edge in pixels;
    ``area``: megapixels.
    """
    if unit == "pixel":
        return float(min(width, height))
    return math.sqrt(width * height) if unit == "pixel_area" else width * height / 1e6


def scale_to(width: int, height: int, target: float, unit: ResolutionType) -> float:
    """The factor on both sides that gives a picture the size ``target`` in ``unit``."""
    ratio = target / measure(width, height, unit)
    return math.sqrt(ratio) if unit == "area" else ratio


def bucket_size(
    width: float, height: float, *, resolution: float, unit: ResolutionType, multiple: int, rounding: int
) -> tuple[int, int]:
    """Width and height in pixels of the bucket for a source of ``width`` x ``height``; only its aspect counts.

    Arguments
        resolution: target size in ``unit``; the area is kept exactly before rounding to the multiple.
        multiple: both sides are multiples of it, and at least one.
        rounding: decimals of the aspect.
    """
    aspect = round(max(width, height) / min(width, height), rounding)
    if unit == "pixel":
        longer, shorter = resolution * aspect, resolution
    else:
        edge = resolution if unit == "pixel_area" else math.sqrt(resolution * 1e6)
        longer, shorter = edge * math.sqrt(aspect), edge / math.sqrt(aspect)
    sides = [max(multiple, round(side / multiple) * multiple) for side in (longer, shorter)]
    return (sides[0], sides[1]) if width >= height else (sides[1], sides[0])


def resolution_for(width: int, height: int, *, unit: ResolutionType, multiple: int, rounding: int) -> float | None:
    """The ``resolution`` in ``unit`` that gives a source of this aspect the bucket ``width`` x ``height`` (pixels).

    Of those that do, one with few decimals, near the size itself: 632 for 832x480 under ``pixel_area``. None when
    there is none: a side is no multiple of ``multiple``, or the rounded aspect gives other sizes only.
    """
    aspect = round(max(width, height) / min(width, height), rounding)
    stretch = aspect if unit == "pixel" else math.sqrt(aspect)
    shrink = 1.0 if unit == "pixel" else stretch
    longer, shorter, half = max(width, height), min(width, height), multiple / 2
    low = max((longer - half) / stretch, (shorter - half) * shrink)
    high = min((longer + half) / stretch, (shorter + half) * shrink)
    middle = (low + high) / 2
    ideals = (measure(width, height, unit), middle**2 / 1e6 if unit == "area" else middle)
    for decimals in range(7):
        for ideal in ideals:
            resolution = round(ideal, decimals)
            found = bucket_size(width, height, resolution=resolution, unit=unit, multiple=multiple, rounding=rounding)
            if resolution > 0 and found == (width, height):
                return float(resolution)
    return None


def bucket_frames(frames: int, wanted: int, latents: LatentGeometry) -> int:
    """Pixel frames of the bucket for a clip of ``frames``: at most ``wanted``, rounded down to what the model takes."""
    return latents.frames_allowed(min(frames, wanted))


def framing(width: int, height: int, bucket: Bucket, *, at_least_scale: float = 0.0) -> Framing:
    """Resize a source of ``width`` x ``height`` to cover the bucket, and cut the bucket from its centre.

    Arguments
        at_least_scale: resize by no less than this factor: the cut then shows a part of the picture only.
    """
    scale = max(bucket.width / width, bucket.height / height, at_least_scale)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    return Framing(
        resized_width, resized_height, (resized_width - bucket.width) // 2, (resized_height - bucket.height) // 2
    )
