"""Keys that are accepted and do nothing here: one line each, so that nobody waits for their effect."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from tuner.builtin.datasets.entries import (
    TABLES,
    AnyEntry,
    Clips,
    ConditioningDataset,
    EvalDataset,
    Media,
    TextEmbeds,
    Trained,
)

SCHEDULE = ("repeats", "probability", "start_epoch", "end_epoch", "start_step", "end_step")


def idle_keys(entry: AnyEntry) -> list[str]:
    """The keys of an entry that are set and do nothing, each with the reason."""
    idle: list[str] = []
    if isinstance(entry, Media):
        idle += [*_accepted(entry), *_crop_keys(entry)]
    if isinstance(entry, Trained):
        idle += _prompt_keys(entry)
    if isinstance(entry, Clips):
        idle += _frame_keys(entry)
    if isinstance(entry, EvalDataset):
        names = [name for name in (*SCHEDULE, "caption_dropout_probability") if _is_set(entry, name)]
        idle += [f"{name} does nothing: an eval dataset is never trained on" for name in names]
    if isinstance(entry, ConditioningDataset) and entry.conditioning_data:
        idle.append(
            "conditioning_data does nothing here: what counts is the key in the dataset that the files belong to"
        )
    return idle


def idle_entries(entries: Sequence[AnyEntry]) -> list[str]:
    """The entries that nothing refers to, and the idle keys of those that are no dataset of their own."""
    trained = [entry for entry in entries if isinstance(entry, Trained)]
    referred = {wanted for entry in trained for wanted in entry.conditioning_ids}
    lines = []
    for entry in entries:
        if isinstance(entry, Trained):
            continue
        if isinstance(entry, ConditioningDataset) and entry.id not in referred:
            lines.append(f"dataset {entry.id!r} is not used: no dataset names it in conditioning_data")
        if isinstance(entry, TextEmbeds) and not entry.default:
            lines.append(f"dataset {entry.id!r} is not used: encoded captions are kept in the default one")
        lines += [f"dataset {entry.id!r}: {line}" for line in idle_keys(entry)]
    return lines


def _is_set(entry: BaseModel, name: str) -> bool:
    """Whether a key says something else than its default."""
    return bool(getattr(entry, name) != type(entry).model_fields[name].default)


def _accepted(entry: Media) -> list[str]:
    idle = []
    if entry.skip_file_discovery:
        idle.append("skip_file_discovery does nothing: an unchanged folder is looked through without opening a file")
    if entry.vae_cache_clear_each_epoch:
        idle.append("vae_cache_clear_each_epoch does nothing: random cuts are encoded up front, as `variants`")
    looks = "metadata_backend" in entry.model_fields_set and entry.metadata_backend not in TABLES
    if looks and entry.type in (*TABLES, "manifest"):
        idle.append(f"metadata_backend {entry.metadata_backend} does nothing: type {entry.type} lists the files")
    if isinstance(entry, Trained) and entry.text_embeds is not None:
        idle.append("text_embeds does nothing: encoded captions are kept in the default text_embeds entry")
    return idle


def _crop_keys(entry: Media) -> list[str]:
    if not entry.crop:
        names = [name for name in ("crop_aspect", "crop_aspect_buckets", "crop_style") if _is_set(entry, name)]
        return [f"{name} does nothing without `crop: true`" for name in names]
    if entry.crop_aspect_buckets and entry.crop_aspect not in ("closest", "random"):
        return ["crop_aspect_buckets does nothing without `crop_aspect: closest` or `random`"]
    return []


def _prompt_keys(entry: Trained) -> list[str]:
    idle = []
    one_prompt = entry.only_instance_prompt or entry.caption_strategy == "instanceprompt"
    if entry.instance_prompt and not one_prompt and not entry.prepend_instance_prompt:
        idle.append(
            "instance_prompt does nothing without `prepend_instance_prompt: true` or `caption_strategy: instanceprompt`"
        )
    if entry.prepend_instance_prompt and one_prompt:
        idle.append("prepend_instance_prompt does nothing: the instance_prompt is the whole caption")
    if entry.only_instance_prompt and _is_set(entry, "caption_strategy") and entry.caption_strategy != "instanceprompt":
        idle.append(f"caption_strategy {entry.caption_strategy} does nothing beside `only_instance_prompt: true`")
    return idle


def _frame_keys(entry: Clips) -> list[str]:
    idle = []
    video = entry.video
    if video.windows is not None and video.cut != "uniform":
        idle.append("video.windows does nothing without `cut: uniform`")
    if video.frame_buckets is not None and "num_frames" in video.model_fields_set:
        idle.append("video.num_frames does nothing: frame_buckets stands above it")
    if _is_set(video, "bucket_strategy"):
        idle.append("video.bucket_strategy does nothing: clips are bucketed by size and by frames in either case")
    return idle
