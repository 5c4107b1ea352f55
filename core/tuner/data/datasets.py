"""What a list of datasets may say (``data_backend_config``), and reading it. Every key is checked.

One frozen model per ``dataset_type``. What an entry leaves out comes from the core keys of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from tuner.config import faults
from tuner.config.coerce import coerce_fields
from tuner.errors import ConfigError, DataError, TunerError, nearest
from tuner.plugin import PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

LATER_TYPES = ("image", "image_embeds", "conditioning", "eval", "audio", "caption", "distillation_cache")
LATER_SOURCES = ("aws", "csv", "huggingface", "parquet")
LATER_KEYS = frozenset(
    {
        "caption_append",
        "caption_filter_list",
        "caption_prepend",
        "caption_shuffle",
        "conditioning_data",
        "crop_style",
        "end_epoch",
        "end_step",
        "is_regularisation_data",
        "is_regularization_data",
        "max_num_samples",
        "maximum_aspect_ratio",
        "minimum_aspect_ratio",
        "only_instance_prompt",
        "prepend_instance_prompt",
        "probability",
        "skip_file_discovery",
        "start_epoch",
        "start_step",
        "vae_cache_clear_each_epoch",
    }
)
"""Keys that users' files may have and that are not built yet; absent, they cost nothing."""


class VideoFrames(PluginConfig):
    """The ``video`` part of a video dataset."""

    num_frames: int = key(81, "Frames of a training clip, rounded down to what the model takes.", ge=1)
    min_frames: int | None = key(
        None, "Leave out clips with fewer frames; `num_frames` (after rounding) when absent.", ge=1
    )
    max_frames: int | None = key(None, "Leave out clips with more frames.", ge=1)


class VideoDataset(PluginConfig):
    """A folder of clips, searched recursively."""

    id: str = key(..., "Name of the dataset, unique in the list.", min_length=1)
    type: Literal["local"] = key("local", "Where the files are.")
    dataset_type: Literal["video"] = key("video", "What the files are.")
    disabled: bool = key(False, "Leave the dataset out.")
    instance_data_dir: Path = key(..., "The folder of clips.")
    cache_dir_vae: Path = key(..., "Folder of the cached latents; `<cache_dir>/vae/<id>` when absent.")
    resolution: float = key(..., "As the core key; this overrides it.", gt=0)
    resolution_type: Literal["pixel_area", "pixel", "area"] = key(..., "As the core key; this overrides it.")
    minimum_image_size: float = key(..., "As the core key; this overrides it.", ge=0)
    maximum_image_size: float | None = key(
        None, "With `crop`: clips larger than this are scaled down to `target_downsample_size` before cropping.", gt=0
    )
    target_downsample_size: float | None = key(
        None, "With `crop`: the size that clips above `maximum_image_size` are scaled to.", gt=0
    )
    crop: bool = key(False, "Crop to `crop_aspect` instead of keeping each clip's aspect.")
    crop_aspect: Literal["square", "preserve"] = key("square", "Aspect that `crop` cuts to.")
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] = key(
        "textfile",
        "`textfile`: every non-empty line of `<clip>.txt` is an alternative; `filename`: the clip's name; "
        "`instanceprompt`: `instance_prompt` for all.",
    )
    instance_prompt: str | None = key(None, "The caption of every clip under `instanceprompt`.")
    metadata_backend: Literal["discovery"] = key("discovery", "How clips are found: by looking into the folder.")
    repeats: int = key(0, "Extra passes over the dataset in every epoch; 0 is once.", ge=0)
    video: VideoFrames = key(VideoFrames(), "Frame counts.")
    conditioning_image_embeds: str | None = key(None, "Id of the dataset that holds the image embeddings.")
    cache_dir_conditioning_image_embeds: Path | None = key(None, "Folder of this dataset's image embeddings.")

    @field_validator("video", mode="before")
    @classmethod
    def _coerce_frames(cls, value: Any) -> Any:
        return coerce_fields(VideoFrames, value) if isinstance(value, Mapping) else value


class TextEmbeds(PluginConfig):
    """Where encoded captions are kept."""

    id: str = key(..., "Name of the entry, unique in the list.", min_length=1)
    type: Literal["local"] = key("local", "Where the cache is.")
    dataset_type: Literal["text_embeds"] = key("text_embeds", "What the entry is.")
    disabled: bool = key(False, "Leave the entry out.")
    default: bool = key(False, "Use this entry for every dataset; exactly one entry says so.")
    cache_dir: Path = key(..., "Folder of the cached embeddings; `<cache_dir>/text` when absent.")
    write_batch_size: int = key(128, "Accepted; each embedding is written as soon as it is made.", ge=1)


class ConditioningImageEmbeds(PluginConfig):
    """Where encoded conditioning images are kept; image-to-video models use them."""

    id: str = key(..., "Name of the entry, unique in the list.", min_length=1)
    type: Literal["local"] = key("local", "Where the cache is.")
    dataset_type: Literal["conditioning_image_embeds"] = key("conditioning_image_embeds", "What the entry is.")
    disabled: bool = key(False, "Leave the entry out.")
    cache_dir: Path = key(..., "Folder of the cached embeddings; `<cache_dir>/conditioning_image_embeds` when absent.")


Entry = VideoDataset | TextEmbeds | ConditioningImageEmbeds
KINDS: dict[str, type[Entry]] = {
    "video": VideoDataset,
    "text_embeds": TextEmbeds,
    "conditioning_image_embeds": ConditioningImageEmbeds,
}


@dataclass(frozen=True)
class Datasets:
    """The entries that are in use."""

    videos: tuple[VideoDataset, ...]
    text: TextEmbeds
    conditioning: tuple[ConditioningImageEmbeds, ...]
    notes: tuple[str, ...]
    """what a user should know, one line each"""


def read_datasets(core: CoreConfig) -> Datasets:
    """Read and check ``data_backend_config``.

    Raises ConfigError (or ConfigErrors with all that was found) for unknown keys, wrong values, duplicate ids,
    none or two default ``text_embeds``, references to unknown ids and kinds not built yet; DataError for a
    missing folder.
    """
    raw, where = _raw_entries(core)
    errors: list[TunerError] = []
    entries: list[Entry] = []
    for index, values in enumerate(raw):
        try:
            entry = _entry(values, core, f"{where}, entry {index + 1}")
        except TunerError as error:
            errors.append(error)
            continue
        if entry is not None:
            entries.append(entry)
    errors += _duplicates(raw, where)
    notes = tuple(f"dataset {values['id']!r} is disabled" for values in raw if _is_disabled(values) and "id" in values)
    if not errors:
        enabled = [entry for entry in entries if not entry.disabled]
        errors += _relations(enabled, where)
        if not errors:
            return _sorted(enabled, notes)
    raise faults.join(errors) or AssertionError("unreachable")


def _sorted(entries: Sequence[Entry], notes: tuple[str, ...]) -> Datasets:
    return Datasets(
        videos=tuple(entry for entry in entries if isinstance(entry, VideoDataset)),
        text=next(entry for entry in entries if isinstance(entry, TextEmbeds) and entry.default),
        conditioning=tuple(entry for entry in entries if isinstance(entry, ConditioningImageEmbeds)),
        notes=notes,
    )


def _raw_entries(core: CoreConfig) -> tuple[list[dict[str, Any]], str]:
    """The list as written, and where it is written."""
    source = core.data_backend_config
    if source is None:
        raise ConfigError(
            "there is no dataset: data_backend_config is not set",
            remedy="point data_backend_config at the file that lists your datasets",
        )
    where = "data_backend_config" if isinstance(source, list) else str(source)
    if isinstance(source, Path):
        from tuner.config.load import plain_data

        if not source.is_file():
            raise ConfigError("the list of datasets does not exist", where=f"data_backend_config: {source}")
        source = plain_data(source)
    if not isinstance(source, list) or not all(isinstance(entry, dict) for entry in source):
        raise ConfigError("the list of datasets is not a list of objects", where=where, allowed="[{…}, {…}]")
    return source, where


def _is_disabled(values: Mapping[str, Any]) -> bool:
    return str(values.get("disabled", False)).strip().lower() in ("true", "1", "yes", "on")


def _entry(values: Mapping[str, Any], core: CoreConfig, where: str) -> Entry | None:
    """One entry as its model; None for a disabled entry of a kind that is not built yet."""
    where += f" (id {values['id']!r})" if "id" in values else ""
    kind = str(values.get("dataset_type", "image"))
    later = _not_built_yet(values, kind, where)
    if later is not None:
        if _is_disabled(values):
            return None
        raise later
    if kind not in KINDS:
        raise ConfigError(
            f"dataset_type {kind!r} does not exist", where=where, allowed=KINDS, nearest=nearest(kind, KINDS)
        )
    model = KINDS[kind]
    return faults.build(model, coerce_fields(model, _defaults(model, values, core) | dict(values)), where=where)


def _not_built_yet(values: Mapping[str, Any], kind: str, where: str) -> ConfigError | None:
    """The error for what other trainers' files may ask for and this version cannot do."""
    source = str(values.get("type", "local"))
    if kind in LATER_TYPES:
        absent = "" if "dataset_type" in values else " (an entry without dataset_type)"
        return ConfigError(
            f"dataset_type {kind!r}{absent} is not supported yet",
            where=where,
            allowed=KINDS,
            remedy="leave the entry out, or set `disabled: true`, until a later version brings it",
        )
    if source in LATER_SOURCES:
        return ConfigError(
            f"datasets of type {source!r} are not supported yet",
            where=where,
            allowed="local",
            remedy="copy the files into a local folder",
        )
    later = sorted(LATER_KEYS.intersection(values))
    if later:
        return ConfigError(
            f"not supported yet: {', '.join(later)}",
            where=where,
            remedy="take the key out until a later version brings it",
        )
    return None


def _defaults(model: type[Entry], values: Mapping[str, Any], core: CoreConfig) -> dict[str, Any]:
    """What an entry inherits from the core keys."""
    root = core.cache_dir or core.output_dir / "cache"
    if model is TextEmbeds:
        return {"cache_dir": root / "text"}
    if model is ConditioningImageEmbeds:
        return {"cache_dir": root / "conditioning_image_embeds"}
    return {
        "cache_dir_vae": root / "vae" / str(values.get("id", "")),
        "resolution": core.resolution,
        "resolution_type": core.resolution_type,
        "minimum_image_size": core.minimum_image_size,
    }


def _duplicates(raw: Sequence[Mapping[str, Any]], where: str) -> list[TunerError]:
    ids = [str(values["id"]) for values in raw if "id" in values]
    return [
        ConfigError(f"two entries have the id {name!r}", where=where, remedy="give each entry its own id")
        for name in sorted({name for name in ids if ids.count(name) > 1})
    ]


def _relations(entries: Sequence[Entry], where: str) -> list[TunerError]:
    """What only the whole list can tell."""
    errors: list[TunerError] = []
    videos = [entry for entry in entries if isinstance(entry, VideoDataset)]
    defaults = [entry.id for entry in entries if isinstance(entry, TextEmbeds) and entry.default]
    if not videos:
        errors.append(
            ConfigError("no video dataset is enabled", where=where, remedy="add one, or set `disabled: false`")
        )
    if len(defaults) != 1:
        found = "no entry" if not defaults else f"{len(defaults)} entries ({', '.join(defaults)})"
        errors.append(
            ConfigError(
                f"{found} with dataset_type text_embeds and `default: true`; exactly one is needed",
                where=where,
                remedy='add {"id": "text-embeds", "dataset_type": "text_embeds", "default": true}'
                if not defaults
                else "keep `default: true` on one of them",
            )
        )
    known = [entry.id for entry in entries if isinstance(entry, ConditioningImageEmbeds)]
    for video in videos:
        errors += _video_errors(video, known, f"{where} (id {video.id!r})")
    return errors


def _video_errors(video: VideoDataset, conditioning: Sequence[str], where: str) -> list[TunerError]:
    errors: list[TunerError] = []
    wanted = video.conditioning_image_embeds
    if wanted is not None and wanted not in conditioning:
        errors.append(
            ConfigError(
                f"conditioning_image_embeds names {wanted!r}, and no enabled entry has this id",
                where=where,
                allowed=conditioning or "nothing: there is no conditioning_image_embeds entry",
                nearest=nearest(wanted, conditioning),
            )
        )
    if video.caption_strategy == "instanceprompt" and not video.instance_prompt:
        errors.append(ConfigError("caption_strategy instanceprompt needs an instance_prompt", where=where))
    shortest, longest = video.video.min_frames, video.video.max_frames
    if shortest is not None and longest is not None and shortest > longest:
        errors.append(ConfigError(f"video.min_frames {shortest} is above video.max_frames {longest}", where=where))
    if not video.instance_data_dir.is_dir():
        errors.append(
            DataError(
                f"the folder of dataset {video.id!r} does not exist: {video.instance_data_dir}",
                where=where,
                remedy="correct instance_data_dir; a relative path starts at the folder you run in",
            )
        )
    return errors
