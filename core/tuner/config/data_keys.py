"""Core keys about datasets, sizes and captions. What one dataset may say is in ``tuner.data.datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tuner.plugin import PluginConfig, key


class DataKeys(PluginConfig):
    """Datasets and the defaults their entries may override."""

    data_backend_config: Path | list[dict[str, Any]] | None = key(
        None, "The list of datasets: a JSON, TOML or YAML file, or the list itself."
    )
    cache_dir: Path | None = key(
        None, "Where datasets that name no cache folder keep theirs; `<output_dir>/cache` when absent."
    )
    resolution: float = key(
        480, "Target size: an edge in pixels, or megapixels where `resolution_type` is `area`.", gt=0
    )
    resolution_type: Literal["pixel_area", "pixel", "area"] = key(
        "pixel_area", "`pixel_area`: the area of a square of that edge; `pixel`: the shorter edge; `area`: megapixels."
    )
    minimum_image_size: float = key(0, "Drop clips smaller than this, in the unit of `resolution_type`.", ge=0)
    aspect_bucket_rounding: int = key(
        2, "Decimals that an aspect ratio is rounded to before it names a bucket.", ge=0, le=9
    )
    caption_dropout_probability: float = key(
        0.0, "Share of samples trained with the empty prompt, drawn per sample.", ge=0, le=1
    )
    vae_batch_size: int = key(1, "Clips encoded at once while caching.", ge=1)
    text_embed_batch_size: int = key(
        4, "Captions encoded at once while caching.", ge=1, aliases=("text_encoder_batch_size",)
    )
    probe_processes: int = key(0, "Processes that probe new files; 0 is one per core.", ge=0)
