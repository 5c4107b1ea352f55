"""One picture for each bucket: what the model will see of one of its samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace

from tuner.builtin.progress import progress
from tuner.data.samples import Bucket, Decode, Sample
from tuner.errors import DataError

LONGEST_SIDE = 256
"""Pixels of a thumbnail."""
MOST = 40
"""Buckets that get a picture; those with most samples come first."""
QUALITY = 80
"""Of the JPEG, from 1 to 95."""


def thumbnails(decode: Decode, buckets: Sequence[tuple[Bucket, Sequence[Sample]]]) -> dict[Bucket, str]:
    """For each of the first buckets a ``data:`` address of a picture, or the reason why there is none."""
    chosen = buckets[:MOST]
    pictures = {}
    with progress("drawing the data report", len(chosen)) as advance:
        for bucket, samples in chosen:
            try:
                pictures[bucket] = _picture(decode, samples[0])
            except DataError as error:
                pictures[bucket] = error.what
            advance(1)
    return pictures


def _picture(decode: Decode, sample: Sample) -> str:
    """The middle frame of a sample's first view. Raises DataError when it cannot be decoded."""
    from PIL import Image

    view, bucket = sample.views[0], sample.bucket
    middle = bucket.frames // 2
    if view.fps and sample.fps:
        middle = int(middle * sample.fps / view.fps)
    still = replace(view, start=min(view.start + middle, max(0, sample.frames - 1)), fps=None)
    pixels = decode(sample.path, still, Bucket(1, bucket.height, bucket.width))
    values = ((pixels[:, 0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    picture = Image.fromarray(values)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
