"""Core keys about datasets, sizes and captions. What one dataset may say is in ``tuner.builtin.datasets``."""

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
    aspect_bucket_alignment: int | None = key(
        None, "Sides of a bucket are multiples of this many pixels; what the model needs when absent.", ge=1
    )
    small_buckets: Literal["pad", "drop"] = key(
        "pad", "A bucket with fewer samples than a batch: filled up by showing some of them again, or left out."
    )
    disable_bucket_pruning: bool = key(False, "The same as `small_buckets: pad`.")
    batch_tokens: int | None = key(
        None,
        "Tokens per micro-batch: buckets of short or small clips then have larger batches than `train_batch_size`.",
        ge=1,
    )
    delete_problematic_images: bool = key(
        False, "Nothing is ever deleted: files that cannot be used are listed; see `quarantine_problematic_files`."
    )
    quarantine_problematic_files: bool = key(
        False, "Move files that cannot be decoded to the folder `quarantine` beside the dataset's cache."
    )
    caption_dropout_probability: float = key(
        0.0, "Share of samples trained with the empty prompt, drawn per sample.", ge=0, le=1
    )
    vae_batch_size: int = key(1, "Clips encoded at once while caching.", ge=1)
    text_embed_batch_size: int = key(
        4, "Captions encoded at once while caching.", ge=1, aliases=("text_encoder_batch_size",)
    )
    write_batch_size: int = key(128, "Encoded clips that may wait to be written while the next ones are encoded.", ge=1)
    compress_disk_cache: bool = key(
        False, "Compress cached tensors with zstd (needs the extra `zstd`). Saves little and costs time: see the docs."
    )
    vae_enable_tiling: bool = key(False, "Encode and decode clips tile by tile: less memory, not quite the same.")
    vae_enable_slicing: bool = key(False, "Encode and decode the clips of a batch one by one: less memory.")
    offload_during_startup: bool = key(
        False, "Accepted: text encoder and VAE are never in memory together, nor with the model."
    )
    probe_processes: int = key(0, "Processes that probe new files; 0 is one per core.", ge=0)
