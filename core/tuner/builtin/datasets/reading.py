"""Reading a list of datasets (``data_backend_config``): every key is checked, every entry held against the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from tuner.builtin.datasets.entries import (
    KINDS,
    LOCAL,
    AnyEntry,
    AnyTrained,
    ConditioningDataset,
    ConditioningImageEmbeds,
    Media,
    TextEmbeds,
    Trained,
)
from tuner.builtin.datasets.idle import idle_entries
from tuner.builtin.datasets.relations import duplicates, relations
from tuner.config import faults
from tuner.config.coerce import coerce_fields
from tuner.config.describe import facts
from tuner.errors import ConfigError, TunerError, nearest
from tuner.plugin import PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.data.source import Source

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
OTHER_KINDS = {
    "image_embeds": "take the entry out: encoded clips are kept in each dataset's own `cache_dir_vae`",
    "caption": "take the entry out: captions come with the files they belong to, by `caption_strategy`",
    "distillation_cache": "take the entry out: nothing is distilled here",
    "audio": "take the entry out: no model here hears; the sound of clips is left out",
}
"""What lists for other tools have as ``dataset_type``, and what to do about it."""
OTHER_KEYS = {
    "parquet": 'write "type": "parquet" and "manifest": "<the table>" instead',
    "csv": 'write "type": "csv" and "manifest": "<the table>" instead',
    "jsonl": 'write "type": "jsonl" and "manifest": "<the table>" instead',
}
"""Keys that have another shape here."""
_FLAG = TypeAdapter(bool)


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
    raw, where = _raw_entries(core)
    errors: list[TunerError] = []
    entries: list[AnyEntry] = []
    source_keys: dict[str, PluginConfig] = {}
    for index, values in enumerate(raw):
        if _is_disabled(values):
            continue
        try:
            entry, own = _entry(values, core, sources or {}, f"{where}, entry {index + 1}")
        except TunerError as error:
            errors.append(error)
            continue
        entries.append(entry)
        source_keys[entry.id] = own
    disabled = [str(values["id"]) for values in raw if _is_disabled(values) and "id" in values]
    errors += duplicates(raw, where)
    if not errors:
        errors += relations(entries, disabled, where)
    if errors:
        raise faults.join(errors) or AssertionError("unreachable")
    notes = [f"dataset {name!r} is disabled" for name in disabled] + idle_entries(entries)
    return _sorted(entries, tuple(notes), source_keys)


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
    """Whether an entry is left out, by the words that its key takes; a wrong value is said when it is read."""
    try:
        return _FLAG.validate_python(values.get("disabled", False))
    except ValidationError:
        return False


def _entry(
    values: Mapping[str, Any], core: CoreConfig, sources: Mapping[str, Source], where: str
) -> tuple[AnyEntry, PluginConfig]:
    """One entry as its model, and the keys that are its source's own as theirs. Raises all that is wrong with it."""
    where += f" (id {values['id']!r})" if "id" in values else ""
    model = _kind(values, where)
    source = _source_name(values, sources, where)
    own_model = sources[source].keys if source in sources else PluginConfig
    named = _canonical((model, own_model), values, where) | {"type": source}
    own = {name: value for name, value in named.items() if name in own_model.model_fields}
    common = {name: value for name, value in named.items() if name not in own and name in model.model_fields}
    errors: list[TunerError] = list(
        _unknown_keys(set(named) - set(own) - set(common), model, own_model, sources, where)
    )
    try:
        entry = faults.build(model, coerce_fields(model, _defaults(model, named, core) | common), where=where)
        own_keys = faults.build(own_model, own, where=where)
    except TunerError as error:
        errors.append(error)
    if errors:
        raise faults.join(errors) or AssertionError("unreachable")
    return entry, own_keys


def _kind(values: Mapping[str, Any], where: str) -> type[AnyEntry]:
    """The model of an entry, by its ``dataset_type``; an entry without one is of pictures, as other tools have it."""
    kind = str(values.get("dataset_type", "image"))
    if kind in OTHER_KINDS:
        raise ConfigError(f"dataset_type {kind!r} is not used here", where=where, remedy=OTHER_KINDS[kind])
    if kind not in KINDS:
        raise ConfigError(
            f"dataset_type {kind!r} does not exist", where=where, allowed=KINDS, nearest=nearest(kind, KINDS)
        )
    return KINDS[kind]


def _source_name(values: Mapping[str, Any], sources: Mapping[str, Source], where: str) -> str:
    """The source of an entry: its ``type``; a folder that is an address is not local."""
    named = str(values.get("type", LOCAL))
    folder = str(values.get("instance_data_dir", values.get("data_dir", "")))
    if named == LOCAL and "://" in folder and not folder.startswith("file://"):
        named = REMOTE
    known = [LOCAL, *sorted(sources)]
    if named not in known:
        what = f"type {named!r} does not exist" if "type" in values else f"{folder!r} needs type {named!r}"
        raise ConfigError(what, where=where, allowed=known, nearest=nearest(named, known))
    return named


def _canonical(models: Sequence[type[PluginConfig]], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` with other tools' names of keys replaced by ours."""
    fields = {name: each for model in models for name, each in model.model_fields.items()}
    names = {alias: name for name, each in fields.items() for alias in facts(each).aliases}
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if name in named and named[name] != value:
            raise ConfigError(f"{key} is another name of {name}, and both are set", where=where, remedy="keep one")
        named[name] = value
    return named


def _unknown_keys(
    unknown: Collection[str],
    model: type[AnyEntry],
    own_model: type[PluginConfig],
    sources: Mapping[str, Source],
    where: str,
) -> Iterator[ConfigError]:
    """An error for each key that neither the entry nor its source has."""
    known = [*model.model_fields, *own_model.model_fields]
    for name in sorted(unknown):
        yield ConfigError(
            f"there is no key {name!r}",
            where=where,
            allowed=known,
            nearest=nearest(name, known),
            remedy=OTHER_KEYS.get(name) or _owners(name, sources),
        )


def _owners(name: str, sources: Mapping[str, Source]) -> str | None:
    """Where a key would be right."""
    kinds = [kind for kind, model in KINDS.items() if name in model.model_fields]
    types = [each for each, source in sorted(sources.items()) if name in source.keys.model_fields]
    if not kinds and not types:
        return None
    owner = f"dataset_type {', '.join(kinds)}" if kinds else f"type {', '.join(types)}"
    return f"take it out: it is a key of {owner}"


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
