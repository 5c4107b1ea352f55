"""Reading a list of datasets (``data_backend_config``): every key is checked, every entry held against the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.datasets.entries import (
    KINDS,
    AnyEntry,
    AnyTrained,
    Clips,
    ConditioningDataset,
    ConditioningImageEmbeds,
    EvalDataset,
    Media,
    TextEmbeds,
    Trained,
)
from tuner.config import faults
from tuner.config.coerce import coerce_fields
from tuner.config.describe import facts
from tuner.errors import ConfigError, DataError, TunerError, nearest
from tuner.plugin import PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.source import Source

LOCAL = "local"
REMOTE = "fsspec"
"""The source of an ``instance_data_dir`` that is an address."""
OVERRIDES = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "aspect_bucket_rounding",
    "aspect_bucket_alignment",
)
"""Keys of a dataset that default to the core keys of the same name."""


@dataclass(frozen=True)
class Datasets:
    """The entries that are in use."""

    trained: tuple[AnyTrained, ...]
    """those of ``eval`` too"""
    text: TextEmbeds
    conditioning: tuple[ConditioningDataset, ...] = ()
    image_embeds: tuple[ConditioningImageEmbeds, ...] = ()
    notes: tuple[str, ...] = ()
    """what a user should know, one line each"""
    source_keys: Mapping[str, PluginConfig] = field(default_factory=dict)
    """by id: the keys of an entry that are its source's own"""


def read_datasets(core: CoreConfig, sources: Mapping[str, Source] | None = None) -> Datasets:
    """Read and check ``data_backend_config``.

    Arguments
        sources: where files may come from beside a local folder, by ``type``.
    Raises ConfigError (or ConfigErrors with all that was found) for unknown keys, wrong values, duplicate ids,
    none or two default ``text_embeds`` and references to unknown ids; DataError for a missing folder.
    """
    sources = sources or {}
    raw, where = _raw_entries(core)
    errors: list[TunerError] = []
    entries: list[AnyEntry] = []
    source_keys: dict[str, PluginConfig] = {}
    for index, values in enumerate(raw):
        if _is_disabled(values):
            continue
        try:
            entry, own = _entry(values, core, sources, f"{where}, entry {index + 1}")
        except TunerError as error:
            errors.append(error)
            continue
        entries.append(entry)
        source_keys[entry.id] = own
    errors += _duplicates(raw, where)
    if not errors:
        errors += _relations(entries, where)
    if errors:
        raise faults.join(errors) or AssertionError("unreachable")
    notes = tuple(f"dataset {values['id']!r} is disabled" for values in raw if _is_disabled(values) and "id" in values)
    return _sorted(entries, notes, source_keys)


def _sorted(entries: Sequence[AnyEntry], notes: tuple[str, ...], source_keys: Mapping[str, PluginConfig]) -> Datasets:
    return Datasets(
        trained=tuple(entry for entry in entries if isinstance(entry, Trained)),
        text=next(entry for entry in entries if isinstance(entry, TextEmbeds) and entry.default),
        conditioning=tuple(entry for entry in entries if isinstance(entry, ConditioningDataset)),
        image_embeds=tuple(entry for entry in entries if isinstance(entry, ConditioningImageEmbeds)),
        notes=notes,
        source_keys=source_keys,
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


def _entry(
    values: Mapping[str, Any], core: CoreConfig, sources: Mapping[str, Source], where: str
) -> tuple[AnyEntry, PluginConfig]:
    """One entry as its model, and the keys that are its source's own as theirs."""
    where += f" (id {values['id']!r})" if "id" in values else ""
    kind = str(values.get("dataset_type", "image"))
    if kind not in KINDS:
        raise ConfigError(
            f"dataset_type {kind!r} does not exist", where=where, allowed=KINDS, nearest=nearest(kind, KINDS)
        )
    model = KINDS[kind]
    source = _source_name(values)
    if source != LOCAL and source not in sources:
        known = [LOCAL, *sorted(sources)]
        raise ConfigError(f"type {source!r} does not exist", where=where, allowed=known, nearest=nearest(source, known))
    own_model = sources[source].keys if source in sources else PluginConfig
    named = _canonical(model, values) | {"type": source, "dataset_type": kind}
    own = {name: value for name, value in named.items() if name in own_model.model_fields}
    common = {name: value for name, value in named.items() if name not in own}
    entry = faults.build(model, coerce_fields(model, _defaults(model, named, core) | common), where=where)
    return entry, faults.build(own_model, own, where=where)


def _source_name(values: Mapping[str, Any]) -> str:
    """The source of an entry: its ``type``; a folder that is an address is not local."""
    named = str(values.get("type", LOCAL))
    return REMOTE if named == LOCAL and "://" in str(values.get("instance_data_dir", "")) else named


def _canonical(model: type[AnyEntry], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with other tools' names of keys replaced by ours."""
    names = {alias: name for name, each in model.model_fields.items() for alias in facts(each).aliases}
    return {names.get(name, name): value for name, value in values.items()}


def _defaults(model: type[AnyEntry], values: Mapping[str, Any], core: CoreConfig) -> dict[str, Any]:
    """What an entry inherits from the core keys."""
    root = core.cache_dir or core.output_dir / "cache"
    if issubclass(model, TextEmbeds):
        return {"cache_dir": root / "text"}
    if issubclass(model, ConditioningImageEmbeds):
        return {"cache_dir": root / "conditioning_image_embeds"}
    if not issubclass(model, Media):
        return {}
    return {"cache_dir_vae": root / "vae" / str(values.get("id", ""))} | {
        name: getattr(core, name) for name in OVERRIDES
    }


def _duplicates(raw: Sequence[Mapping[str, Any]], where: str) -> list[TunerError]:
    ids = [str(values["id"]) for values in raw if "id" in values]
    return [
        ConfigError(f"two entries have the id {name!r}", where=where, remedy="give each entry its own id")
        for name in sorted({name for name in ids if ids.count(name) > 1})
    ]


def _relations(entries: Sequence[AnyEntry], where: str) -> list[TunerError]:
    """What only the whole list can tell."""
    errors: list[TunerError] = []
    trained = [entry for entry in entries if isinstance(entry, Trained)]
    if not any(not isinstance(entry, EvalDataset) for entry in trained):
        errors.append(
            ConfigError(
                "no dataset to train on is enabled",
                where=where,
                allowed="dataset_type video or image",
                remedy="add one, or set `disabled: false`",
            )
        )
    errors += _text_errors(entries, where)
    embeds = [entry.id for entry in entries if isinstance(entry, ConditioningImageEmbeds)]
    for entry in trained:
        errors += _trained_errors(entry, embeds, f"{where} (id {entry.id!r})")
    return errors


def _text_errors(entries: Sequence[AnyEntry], where: str) -> list[TunerError]:
    defaults = [entry.id for entry in entries if isinstance(entry, TextEmbeds) and entry.default]
    if len(defaults) == 1:
        return []
    found = "no entry" if not defaults else f"{len(defaults)} entries ({', '.join(defaults)})"
    return [
        ConfigError(
            f"{found} with dataset_type text_embeds and `default: true`; exactly one is needed",
            where=where,
            remedy='add {"id": "text-embeds", "dataset_type": "text_embeds", "default": true}'
            if not defaults
            else "keep `default: true` on one of them",
        )
    ]


def _trained_errors(entry: Trained, embeds: Sequence[str], where: str) -> list[TunerError]:
    errors: list[TunerError] = []
    wanted = entry.conditioning_image_embeds
    if wanted is not None and wanted not in embeds:
        errors.append(
            ConfigError(
                f"conditioning_image_embeds names {wanted!r}, and no enabled entry has this id",
                where=where,
                allowed=embeds or "nothing: there is no conditioning_image_embeds entry",
                nearest=nearest(wanted, embeds),
            )
        )
    if entry.caption_strategy == "instanceprompt" and not entry.instance_prompt:
        errors.append(ConfigError("caption_strategy instanceprompt needs an instance_prompt", where=where))
    if isinstance(entry, Clips):
        shortest, longest = entry.video.min_frames, entry.video.max_frames
        if shortest is not None and longest is not None and shortest > longest:
            errors.append(ConfigError(f"video.min_frames {shortest} is above video.max_frames {longest}", where=where))
    if entry.type == LOCAL and not Path(entry.instance_data_dir or "").is_dir():
        errors.append(
            DataError(
                f"the folder of dataset {entry.id!r} does not exist: {entry.instance_data_dir}",
                where=where,
                remedy="correct instance_data_dir; a relative path starts at the folder you run in",
            )
        )
    return errors
