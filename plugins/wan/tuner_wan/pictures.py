"""Pictures (clips of one frame) among the data of a model that is given frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.spec import ModelSpec

REMEDY = "set video.min_frames to at least 5, and leave datasets of pictures out"


def check_pictures(spec: ModelSpec, data: Prepared) -> Iterator[str]:
    """A line for what pictures would teach. Raises DataError where a clip must have a first and a last frame."""
    pictures = [sample for sample in (*data.samples, *data.held_out) if sample.bucket.frames == 1]
    if not pictures or not spec.frames_taken:
        return
    count = f"{len(pictures)} of {len(data.samples) + len(data.held_out)} samples are pictures"
    if "last_frame" in spec.frames_taken:
        raise DataError(
            f"{count}, and {spec.flavour} is trained on clips between a first and a last frame",
            where=pictures[0].path,
            remedy=REMEDY,
        )
    if spec.condition == "clean_first_frame":
        yield f"{count}: they have no frame beside the first one, and are trained from their text alone"
    else:
        yield f"{count}: {spec.flavour} is given the picture itself, so it only learns to copy ({REMEDY})"
