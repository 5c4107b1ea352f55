"""What only several keys together, or the whole list, can tell to be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.builtin.datasets.entries import (
    LOCAL,
    TABLES,
    AnyEntry,
    Clips,
    ConditioningDataset,
    ConditioningImageEmbeds,
    EvalDataset,
    Media,
    TextEmbeds,
    Trained,
)
from tuner.errors import ConfigError, DataError, TunerError, nearest


def duplicates(raw: Sequence[Mapping[str, Any]], where: str) -> list[TunerError]:
    """An error for each id that entries share, disabled ones too."""
    times = Counter(str(values["id"]) for values in raw if "id" in values)
    return [
        ConfigError(f"two entries have the id {name!r}", where=where, remedy="give each entry its own id")
        for name in sorted(name for name, count in times.items() if count > 1)
    ]


def relations(entries: Sequence[AnyEntry], disabled: Collection[str], where: str) -> list[TunerError]:
    """Every fault between the keys of an entry and between entries.

    Arguments
        entries: those in use, each valid in itself.
        disabled: ids of the others.
        where: the file of the list.
    """
    by_id = {entry.id: entry for entry in entries}
    errors = [*_nothing_to_train(entries, where), *_text_defaults(entries, where)]
    for entry in entries:
        place = f"{where} (id {entry.id!r})"
        errors += _place_faults(entry, place)
        if isinstance(entry, Media):
            errors += [_config(what, remedy, place) for check in _OWN for what, remedy in check(entry)]
        if isinstance(entry, Trained):
            errors += _references(entry, by_id, disabled, place)
    return errors


def _config(what: str, remedy: str, where: str) -> ConfigError:
    return ConfigError(what, where=where, remedy=remedy)


def _nothing_to_train(entries: Sequence[AnyEntry], where: str) -> Iterator[TunerError]:
    if not any(isinstance(entry, Trained) and not isinstance(entry, EvalDataset) for entry in entries):
        yield ConfigError(
            "no dataset to train on is enabled",
            where=where,
            allowed="dataset_type video or image",
            remedy="add one, or set `disabled: false`",
        )


def _text_defaults(entries: Sequence[AnyEntry], where: str) -> Iterator[TunerError]:
    defaults = [entry.id for entry in entries if isinstance(entry, TextEmbeds) and entry.default]
    if len(defaults) == 1:
        return
    found = "no entry" if not defaults else f"{len(defaults)} entries ({', '.join(defaults)})"
    yield ConfigError(
        f"{found} with dataset_type text_embeds and `default: true`; exactly one is needed",
        where=where,
        remedy='add {"id": "text-embeds", "dataset_type": "text_embeds", "default": true}'
        if not defaults
        else "keep `default: true` on one of them",
    )


def _place_faults(entry: AnyEntry, where: str) -> Iterator[TunerError]:
    """What is wrong with where an entry's files are."""
    if entry.type != LOCAL and not isinstance(entry, Trained):
        yield ConfigError(
            f"an entry of dataset_type {entry.dataset_type} is a local folder, not of type {entry.type!r}",
            where=where,
            allowed=LOCAL,
            remedy="leave `type` out" + " and copy the files here" * isinstance(entry, ConditioningDataset),
        )
    elif entry.type == LOCAL and isinstance(entry, Trained | ConditioningDataset):
        folder = entry.instance_data_dir
        if not folder:
            yield ConfigError("instance_data_dir is missing", where=where, remedy="say which folder the files are in")
        elif not Path(folder).is_dir():
            fault = "is no folder" if Path(folder).exists() else "does not exist"
            yield DataError(
                f"the folder of dataset {entry.id!r} {fault}: {folder}",
                where=where,
                remedy="correct instance_data_dir; a relative path starts at the folder you run in",
            )


Faults = Iterator[tuple[str, str]]
"""What is wrong, and what to do about it."""


def _crops(entry: Media) -> Faults:
    if entry.crop_aspect in ("closest", "random") and not entry.crop_aspect_buckets:
        yield (
            f"crop_aspect {entry.crop_aspect} needs crop_aspect_buckets",
            "list the aspects (width / height) to choose from, such as [1.0, 0.75, 1.33]",
        )
    narrowest, widest = entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
    if narrowest is not None and widest is not None and narrowest > widest:
        yield f"minimum_aspect_ratio {narrowest:g} is above maximum_aspect_ratio {widest:g}", "swap them"


def _frames(entry: Media) -> Faults:
    if isinstance(entry, Clips):
        shortest, longest = entry.video.min_frames, entry.video.max_frames
        if shortest is not None and longest is not None and shortest > longest:
            yield f"video.min_frames {shortest} is above video.max_frames {longest}", "swap them"


def _prompts(entry: Media) -> Faults:
    if not isinstance(entry, Trained) or (entry.instance_prompt or "").strip():
        return
    asking = {
        "caption_strategy instanceprompt": entry.caption_strategy == "instanceprompt",
        "only_instance_prompt": entry.only_instance_prompt,
        "prepend_instance_prompt": entry.prepend_instance_prompt,
    }
    for name in (name for name, asks in asking.items() if asks):
        yield f"{name} needs an instance_prompt", "write one, or take the key out"


def _schedule(entry: Media) -> Faults:
    if not isinstance(entry, Trained):
        return
    if entry.end_epoch and entry.start_epoch > entry.end_epoch:
        yield f"start_epoch {entry.start_epoch} is after end_epoch {entry.end_epoch}", "the dataset would never join"
    if entry.end_step and entry.start_step >= entry.end_step:
        yield f"start_step {entry.start_step} is not before end_step {entry.end_step}", "the dataset would never join"
    if isinstance(entry, EvalDataset) and entry.is_regularisation_data:
        yield (
            "is_regularisation_data is for datasets that are trained on, and eval datasets never are",
            "take the key out, or make it dataset_type video or image",
        )


def _tables(entry: Media) -> Faults:
    """Captions and files that are to come from a table that the entry does not have."""
    table = entry.metadata_backend
    if table in TABLES and entry.type not in (table, "manifest"):
        yield (
            f"metadata_backend {table} lists files by a table, and type {entry.type!r} has none",
            f'write "type": "{table}" and "manifest": "<the table>" instead',
        )
    elif isinstance(entry, Trained) and entry.type == LOCAL and entry.caption_strategy in (*TABLES, "manifest"):
        strategy = entry.caption_strategy
        yield (
            f"caption_strategy {strategy} takes captions from a table, and type 'local' has none",
            f'write "type": "{strategy}" and "manifest": "<the table>", or choose another caption_strategy',
        )


_OWN: tuple[Callable[[Media], Faults], ...] = (_crops, _frames, _prompts, _schedule, _tables)
"""What may be wrong between the keys of one dataset."""


def _references(
    entry: Trained, by_id: Mapping[str, AnyEntry], disabled: Collection[str], where: str
) -> Iterator[TunerError]:
    """What is wrong with the ids that a dataset names."""
    named: list[tuple[str, str | None, type[AnyEntry]]] = [
        ("conditioning_image_embeds", entry.conditioning_image_embeds, ConditioningImageEmbeds),
        ("text_embeds", entry.text_embeds, TextEmbeds),
    ]
    named += [("conditioning_data", wanted, ConditioningDataset) for wanted in entry.conditioning_ids]
    for name, wanted, kind in named:
        if wanted is not None and not isinstance(by_id.get(wanted), kind):
            yield _unknown(name, wanted, kind, by_id, disabled, where)
    found = [other for wanted in entry.conditioning_ids if isinstance(other := by_id.get(wanted), ConditioningDataset)]
    roles = Counter(_role(each) for each in found)
    for role in (role for role, count in roles.items() if count > 1):
        ids = ", ".join(each.id for each in found if _role(each) == role)
        yield ConfigError(
            f"conditioning_data names two entries for the same: {ids} ({role})",
            where=where,
            remedy="keep one of them; to use both, make a second dataset of the same folder",
        )


def _role(entry: ConditioningDataset) -> str:
    """What an entry is to a dataset: masks and segmentations both say what the loss counts."""
    return "mask or segmentation" if entry.conditioning_type in ("mask", "segmentation") else entry.conditioning_type


def _unknown(
    name: str,
    wanted: str,
    kind: type[AnyEntry],
    by_id: Mapping[str, AnyEntry],
    disabled: Collection[str],
    where: str,
) -> ConfigError:
    type_wanted = kind.model_fields["dataset_type"].default
    known = [other for other, entry in by_id.items() if isinstance(entry, kind)]
    if wanted in by_id:
        fault = f"which has dataset_type {by_id[wanted].dataset_type}, not {type_wanted}"
    else:
        fault = f"and no enabled entry has this {'id' if wanted not in disabled else 'id: it is disabled'}"
    return ConfigError(
        f"{name} names {wanted!r}, {fault}",
        where=where,
        allowed=known or f"nothing: there is no enabled {type_wanted} entry",
        nearest=nearest(wanted, known),
        remedy="set `disabled: false` there, or take the key out" if wanted in disabled else None,
    )
