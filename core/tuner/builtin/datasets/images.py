"""Frames that image-to-video models are given: where their embeddings are kept, and what a model has no use for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.builtin.datasets.entries import Trained
from tuner.builtin.datasets.reading import Datasets
from tuner.spec import ModelSpec

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

FRAMES = ("first_frame", "last_frame")
"""Roles of pictures that stand in the place of a clip's own frames."""


def image_cache(dataset: Trained, datasets: Datasets, core: CoreConfig, spec: ModelSpec) -> Path | None:
    """Root of the store of a dataset's image embeddings; None for a model that takes none.

    The dataset's own folder, else that of the entry it names, else of the first such entry, else the default.
    """
    if not spec.conditioning_frames:
        return None
    if dataset.cache_dir_conditioning_image_embeds is not None:
        return dataset.cache_dir_conditioning_image_embeds
    wanted = dataset.conditioning_image_embeds
    named = (entry for entry in datasets.image_embeds if wanted in (None, entry.id))
    default = (core.cache_dir or core.output_dir / "cache") / "conditioning_image_embeds"
    return next((entry.cache_dir for entry in named), default)


def unused(datasets: Datasets, spec: ModelSpec) -> Iterator[str]:
    """A line for everything about images that the model has no use for."""
    for entry in datasets.conditioning:
        role = entry.conditioning_type
        if role in FRAMES and role not in spec.frames_taken:
            yield f"dataset {entry.id!r} is not used: {spec.flavour} takes no {role.replace('_', ' ')}"
    if spec.conditioning_frames:
        return
    for embeds in datasets.image_embeds:
        yield f"dataset {embeds.id!r} is not used: {spec.flavour} takes no image embeddings"
    for dataset in datasets.trained:
        if dataset.cache_dir_conditioning_image_embeds is not None:
            yield (
                f"dataset {dataset.id!r}: cache_dir_conditioning_image_embeds does nothing: "
                f"{spec.flavour} takes no image embeddings"
            )
