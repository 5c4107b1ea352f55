"""What a list of datasets may say (``data_backend_config``): one frozen model per ``dataset_type``.

What an entry leaves out comes from the core keys of the same name. Keys that only one kind of source has
(a bucket's name, a column) are that source's own: see ``tuner.data.source``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from tuner.config.coerce import coerce_fields
from tuner.plugin import PluginConfig, key

LOCAL = "local"
"""The ``type`` of what is in a folder on this machine."""
TABLES = ("parquet", "csv", "jsonl")
"""Tables that may list files and captions."""


class CaptionShuffle(PluginConfig):
    """Makes alternatives of a caption by shuffling its parts."""

    enable: bool = key(True, "Shuffle at all.")
    count: int = key(1, "Shuffled alternatives of each caption.", ge=1)
    seed: int | None = key(None, "Seed of the shuffles; the run's own when absent.")
    split_on: Literal["comma", "space", "period", "newline"] = key("comma", "What separates the parts.")
    position_start: int = key(0, "Leading parts that keep their place.", ge=0)
    include_original: bool = key(True, "Keep the caption as written among the alternatives.")


class VideoFrames(PluginConfig):
    """The ``video`` part of a dataset of clips."""

    num_frames: int = key(81, "Frames of a training clip, rounded down to what the model takes.", ge=1)
    min_frames: int | None = key(
        None, "Leave out clips with fewer frames; `num_frames` (after rounding) when absent.", ge=1
    )
    max_frames: int | None = key(None, "Leave out clips with more frames.", ge=1)
    frame_buckets: tuple[int, ...] | None = key(
        None,
        "Several lengths: a clip is trained at the longest one it fills. Stands above `num_frames`.",
    )
    bucket_strategy: Literal["aspect_ratio", "resolution_frames"] = key(
        "aspect_ratio", "Accepted: clips are bucketed by size and by frames in either case."
    )
    frame_interval: int | None = key(None, "Round a clip's frames down to a multiple of this first.", ge=1)
    fps: float | None = key(None, "Take frames at this rate; the source's own when absent.", gt=0)
    cut: Literal["beginning", "middle", "random", "uniform"] = key(
        "beginning",
        "Which frames of a longer clip are taken. `random`: `variants` places, epochs take turns; "
        "`uniform`: windows that use the whole clip, each a sample of its own.",
    )
    windows: int | None = key(None, "With `cut: uniform`: windows per clip; as many as fit when absent.", ge=1)

    @field_validator("frame_buckets")
    @classmethod
    def _lengths(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 1):
            raise ValueError("it takes at least one length, and lengths of at least one frame")
        return value


class Entry(PluginConfig):
    """What every entry has."""

    id: str = key(..., "Name of the entry, unique in the list.", min_length=1)
    type: str = key("local", "Where the files are: `local`, or the name of a source.")
    disabled: bool = key(False, "Leave the entry out.")


class Media(Entry):
    """A set of pictures or clips."""

    instance_data_dir: str | None = key(
        None, "The folder, searched recursively; or an address such as `s3://bucket/folder`.", aliases=("data_dir",)
    )
    cache_dir_vae: Path = key(..., "Folder of the cached latents; `<cache_dir>/vae/<id>` when absent.")
    metadata_backend: Literal["discovery", "json", "parquet", "csv", "jsonl"] = key(
        "discovery",
        "How files are found: by looking (`json` too); or in a table, which `type` and `manifest` say better: see "
        "`docs/sources.md`.",
    )
    skip_file_discovery: str | bool = key(
        False, "Accepted: looking through an unchanged folder opens no file and takes no time worth saving."
    )
    max_num_samples: int | None = key(None, "Use this many files, chosen once by `seed`.", ge=1)

    resolution: float = key(..., "As the core key; this overrides it.", gt=0)
    resolution_type: Literal["pixel_area", "pixel", "area"] = key(..., "As the core key; this overrides it.")
    minimum_image_size: float = key(..., "As the core key; this overrides it.", ge=0)
    maximum_image_size: float | None = key(
        None, "With `crop`: what is larger is scaled down to `target_downsample_size` before cropping.", gt=0
    )
    target_downsample_size: float | None = key(
        None, "With `crop`: the size that what is above `maximum_image_size` is scaled to.", gt=0
    )
    minimum_aspect_ratio: float | None = key(None, "Leave out what has a smaller width / height.", gt=0)
    maximum_aspect_ratio: float | None = key(None, "Leave out what has a larger width / height.", gt=0)
    aspect_bucket_rounding: int = key(..., "As the core key; this overrides it.", ge=0, le=9)
    aspect_bucket_alignment: int | None = key(..., "As the core key; this overrides it.", ge=1)
    crop: bool = key(False, "Crop to `crop_aspect` instead of keeping each source's aspect.")
    crop_aspect: Literal["square", "preserve", "closest", "random"] = key(
        "square",
        "Aspect that `crop` cuts to: `square`; `preserve` the source's own; the `closest` of `crop_aspect_buckets`; "
        "or one of them at `random`, chosen once per source by `seed`.",
    )
    crop_aspect_buckets: tuple[float, ...] = key(
        (), "Aspects (width / height) that `crop_aspect: closest` and `random` choose from."
    )
    crop_style: Literal["center", "centre", "random", "corner"] = key(
        "center", "Where `crop` cuts: the centre, the top left corner, or `variants` random places; epochs take turns."
    )
    variants: int = key(
        4, "Random cuts (`crop_style: random`, `video.cut: random`) of each source, all encoded up front.", ge=1
    )
    vae_cache_clear_each_epoch: bool = key(
        False, "Accepted: random cuts are encoded up front as `variants`, and nothing is cleared."
    )

    @field_validator("instance_data_dir")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        return None if value is None else value.removeprefix("file://")

    @field_validator("crop_aspect_buckets")
    @classmethod
    def _aspects(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(aspect <= 0 for aspect in value):
            raise ValueError("an aspect is width / height, above 0")
        return value


class Trained(Media):
    """Pictures or clips that are trained on, or that the loss is measured on."""

    caption_strategy: Literal["textfile", "filename", "instanceprompt", "parquet", "csv", "jsonl", "manifest"] = key(
        "textfile",
        "`textfile`: every non-empty line of `<clip>.txt` is an alternative; `filename`: the clip's name; "
        "`instanceprompt`: `instance_prompt` for all; the others: from the table or source that lists the files.",
    )
    instance_prompt: str | None = key(None, "The caption of everything under `instanceprompt`.")
    only_instance_prompt: bool = key(False, "The same as `caption_strategy: instanceprompt`.")
    prepend_instance_prompt: bool = key(False, "Put `instance_prompt` before every caption.")
    caption_prepend: str | None = key(None, "Put this before every caption.")
    caption_append: str | None = key(None, "Put this behind every caption.")
    caption_filter_list: tuple[str, ...] | Path | None = key(
        None, "Texts to take out of captions, or a file of them, one a line; `s/pattern/replacement/` is an expression."
    )
    caption_shuffle: CaptionShuffle | bool = key(False, "Make alternatives of captions by shuffling their parts.")
    caption_dropout_probability: float | None = key(None, "As the core key; this overrides it.", ge=0, le=1)
    text_embeds: str | None = key(None, "Accepted: encoded captions are kept in the default `text_embeds` entry.")
    conditioning_data: str | tuple[str, ...] | None = key(
        None, "Id of the `conditioning` dataset (or several) whose files of the same name belong to these."
    )
    conditioning_image_embeds: str | None = key(None, "Id of the dataset that holds the image embeddings.")
    cache_dir_conditioning_image_embeds: Path | None = key(None, "Folder of this dataset's image embeddings.")

    repeats: int = key(0, "Extra passes over the dataset in every epoch; 0 is once.", ge=0)
    probability: float = key(
        1.0, "Share of the passes that an epoch holds: with 0.5 each epoch shows another half of the dataset.", gt=0
    )
    start_epoch: int = key(1, "The first epoch that holds the dataset, counted from 1.", ge=0)
    end_epoch: int | None = key(None, "The last epoch that holds the dataset.", ge=0)
    start_step: int = key(0, "Optimizer steps that are done before the dataset joins.", ge=0)
    end_step: int | None = key(None, "Optimizer steps that are done when the dataset leaves.", ge=0)
    is_regularisation_data: bool = key(
        False,
        "Prior preservation: these hold the model to what its base predicts, instead of teaching it.",
        aliases=("is_regularization_data",),
    )

    @field_validator("caption_shuffle", mode="before")
    @classmethod
    def _coerce_shuffle(cls, value: Any) -> Any:
        return coerce_fields(CaptionShuffle, value) if isinstance(value, Mapping) else value

    @property
    def conditioning_ids(self) -> tuple[str, ...]:
        """The ids in ``conditioning_data``."""
        named = self.conditioning_data or ()
        return (named,) if isinstance(named, str) else named

    @property
    def shuffle(self) -> CaptionShuffle | None:
        """How captions are shuffled; None when they are not."""
        asked = (
            CaptionShuffle(enable=self.caption_shuffle)
            if isinstance(self.caption_shuffle, bool)
            else self.caption_shuffle
        )
        return asked if asked.enable else None


class Clips(Trained):
    """What has frames."""

    video: VideoFrames = key(VideoFrames(), "Frame counts.")

    @field_validator("video", mode="before")
    @classmethod
    def _coerce_frames(cls, value: Any) -> Any:
        return coerce_fields(VideoFrames, value) if isinstance(value, Mapping) else value


class VideoDataset(Clips):
    """A set of clips."""

    dataset_type: Literal["video"] = key("video", "What the files are.")


class ImageDataset(Trained):
    """A set of pictures, each a clip of one frame."""

    dataset_type: Literal["image"] = key("image", "What the files are.")


class EvalDataset(Clips):
    """Held-out pictures or clips: never trained on, the loss on them is measured."""

    dataset_type: Literal["eval"] = key("eval", "What the files are.")


class ConditioningDataset(Entry):
    """Files that belong to those of another dataset by name: masks, or first and last frames."""

    dataset_type: Literal["conditioning"] = key("conditioning", "What the files are.")
    conditioning_type: Literal["mask", "segmentation", "first_frame", "last_frame"] = key(
        "mask",
        "`mask`: the loss counts as much as the mask is bright; `segmentation`: the same, where any colour counts "
        "wholly; `first_frame`, `last_frame`: pictures that an image-to-video model starts from or ends at.",
    )
    instance_data_dir: str | None = key(
        None, "The folder: the same names as in the dataset it belongs to, any suffix.", aliases=("data_dir",)
    )
    conditioning_data: str | None = key(None, "Accepted; the other dataset's `conditioning_data` is what counts.")


class TextEmbeds(Entry):
    """Where encoded captions are kept."""

    dataset_type: Literal["text_embeds"] = key("text_embeds", "What the entry is.")
    default: bool = key(False, "Use this entry for every dataset; exactly one entry says so.")
    cache_dir: Path = key(..., "Folder of the cached embeddings; `<cache_dir>/text` when absent.")
    write_batch_size: int = key(128, "Entries that may wait to be written while the next ones are encoded.", ge=1)


class ConditioningImageEmbeds(Entry):
    """Where encoded conditioning images are kept; image-to-video models use them."""

    dataset_type: Literal["conditioning_image_embeds"] = key("conditioning_image_embeds", "What the entry is.")
    cache_dir: Path = key(..., "Folder of the cached embeddings; `<cache_dir>/conditioning_image_embeds` when absent.")


AnyTrained = VideoDataset | ImageDataset | EvalDataset
AnyEntry = AnyTrained | ConditioningDataset | TextEmbeds | ConditioningImageEmbeds
KINDS: dict[str, type[AnyEntry]] = {
    "video": VideoDataset,
    "image": ImageDataset,
    "eval": EvalDataset,
    "conditioning": ConditioningDataset,
    "text_embeds": TextEmbeds,
    "conditioning_image_embeds": ConditioningImageEmbeds,
}
