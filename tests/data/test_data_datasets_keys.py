"""Every key of a dataset either takes effect or is said, in one line, to do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tuner.builtin.datasets.entries import KINDS
from tuner.builtin.datasets.reading import read_datasets
from tuner.config.describe import model_in
from tuner.config.keys import CoreConfig

TAKES_EFFECT = {
    # which entries, and where their files are
    "id",
    "type",
    "disabled",
    "dataset_type",
    "instance_data_dir",
    "cache_dir_vae",
    "cache_dir",
    "cache_dir_conditioning_image_embeds",
    "metadata_backend",
    "max_num_samples",
    "default",
    "write_batch_size",
    # sizes
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "minimum_aspect_ratio",
    "maximum_aspect_ratio",
    "aspect_bucket_rounding",
    "aspect_bucket_alignment",
    "crop",
    "crop_aspect",
    "crop_aspect_buckets",
    "crop_style",
    "variants",
    # frames
    "video",
    "video.num_frames",
    "video.min_frames",
    "video.max_frames",
    "video.frame_buckets",
    "video.frame_interval",
    "video.fps",
    "video.cut",
    "video.windows",
    # captions
    "caption_strategy",
    "instance_prompt",
    "only_instance_prompt",
    "prepend_instance_prompt",
    "caption_prepend",
    "caption_append",
    "caption_filter_list",
    "caption_shuffle",
    "caption_shuffle.enable",
    "caption_shuffle.count",
    "caption_shuffle.seed",
    "caption_shuffle.split_on",
    "caption_shuffle.position_start",
    "caption_shuffle.include_original",
    "caption_dropout_probability",
    # relations and schedule
    "conditioning_data",
    "conditioning_type",
    "conditioning_image_embeds",
    "repeats",
    "probability",
    "start_epoch",
    "end_epoch",
    "start_step",
    "end_step",
    "is_regularisation_data",
}
"""Keys that change what a run does."""
DOES_NOTHING: dict[str, Any] = {
    "skip_file_discovery": "vae,metadata",
    "vae_cache_clear_each_epoch": True,
    "text_embeds": "t",
    "video.bucket_strategy": "resolution_frames",
}
"""Keys that are accepted and say that they do nothing, with a value that asks for something."""
VIDEO: dict[str, Any] = {"id": "v", "dataset_type": "video", "instance_data_dir": "clips", "video": {}}
TEXT: dict[str, Any] = {"id": "t", "dataset_type": "text_embeds", "default": True}
MASKS: dict[str, Any] = {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "clips"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if inner := model_in(field.annotation):
            yield from keys(inner, f"{prefix}{name}.")


def test_every_key_is_known_to_take_effect_or_to_be_said() -> None:
    """A new key belongs to one of the two, with a test of its effect or the line that says it has none."""
    found = {key for model in KINDS.values() for key in keys(model)}
    assert found == TAKES_EFFECT | set(DOES_NOTHING)
    assert not TAKES_EFFECT & set(DOES_NOTHING)


def said(**change: Any) -> list[str]:
    """The notes on a dataset of clips with these keys, in a list of its own."""
    return notes(VIDEO | change)


def notes(*entries: dict[str, Any]) -> list[str]:
    from tuner.builtin.datasets.idle import idle_keys

    read = read_datasets(CoreConfig(data_backend_config=[*entries, TEXT]))
    return [*read.notes, *(line for dataset in read.trained for line in idle_keys(dataset))]


@pytest.mark.parametrize(("key", "value"), DOES_NOTHING.items())
def test_a_key_without_effect_is_said_once(key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    (line,) = said(**{section: {name: value}} if section else {name: value})
    assert line.startswith(f"{key} does nothing")


def test_nothing_is_said_of_what_takes_effect_or_is_left_at_its_default() -> None:
    assert said(crop=False, crop_style="center", skip_file_discovery=False, variants=8, repeats=3) == []
    assert (
        said(crop=True, crop_aspect="closest", crop_aspect_buckets=[1, 2], video={"cut": "uniform", "windows": 2}) == []
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"crop_style": "random"}, "crop_style does nothing without `crop: true`"),
        ({"crop_aspect_buckets": [1]}, "crop_aspect_buckets does nothing without `crop: true`"),
        ({"crop": True, "crop_aspect_buckets": [1]}, "crop_aspect_buckets does nothing without `crop_aspect: closest`"),
        ({"video": {"windows": 3}}, "video.windows does nothing without `cut: uniform`"),
        ({"video": {"num_frames": 9, "frame_buckets": [9]}}, "video.num_frames does nothing"),
        ({"instance_prompt": "a cat"}, "instance_prompt does nothing without"),
        (
            {"instance_prompt": "a cat", "only_instance_prompt": True, "prepend_instance_prompt": True},
            "prepend_instance_prompt does nothing",
        ),
        (
            {"instance_prompt": "a cat", "only_instance_prompt": True, "caption_strategy": "filename"},
            "caption_strategy filename does nothing",
        ),
    ],
)
def test_a_key_that_needs_another_is_said(change: dict[str, Any], line: str) -> None:
    (found,) = said(**change)
    assert found.startswith(line)


def test_entries_that_nothing_refers_to_are_said() -> None:
    spare = {"id": "spare", "dataset_type": "text_embeds"}
    assert notes(VIDEO, MASKS, spare) == [
        "dataset 'm' is not used: no dataset names it in conditioning_data",
        "dataset 'spare' is not used: encoded captions are kept in the default one",
    ]
    assert notes(VIDEO | {"conditioning_data": "m"}, MASKS) == []


def test_a_conditioning_entry_that_names_its_dataset_is_told_which_side_counts() -> None:
    (line,) = notes(VIDEO | {"conditioning_data": "m"}, MASKS | {"conditioning_data": "v"})
    assert line.startswith("dataset 'm': conditioning_data does nothing here")


def test_what_is_about_training_does_nothing_on_an_eval_dataset() -> None:
    held_out = VIDEO | {"id": "e", "dataset_type": "eval", "repeats": 2, "caption_dropout_probability": 0.1}
    assert notes(VIDEO, held_out) == [
        "repeats does nothing: an eval dataset is never trained on",
        "caption_dropout_probability does nothing: an eval dataset is never trained on",
    ]
