"""Whose is each flat key? Every key and every open value has one owner, or is an error with the nearest name.

Keys of a plugin that is installed but not loaded are set aside with a line. Where that would change
memory, saved files or uploads behind the user's back (``key(effect=...)``), it is an error until the
plugin is named in ``without``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from tuner.config.describe import facts
from tuner.config.faults import join, shown
from tuner.config.keys import CoreConfig
from tuner.config.load import bare_name
from tuner.errors import ConfigError, PluginError, TunerError, nearest
from tuner.selection import Catalog, Selection, Wanted

CORE = "core"
OPEN_VALUES: dict[str, frozenset[str]] = {
    "attention_mechanism": frozenset({"diffusers", "auto"}),
    "base_model_precision": frozenset({"no_change"}),
    "lora_type": frozenset({"standard"}),
    "text_encoder_1_precision": frozenset({"no_change"}),
}
"""Core keys whose values come from plugins, and the values that the core itself serves."""


@dataclass(frozen=True)
class Place:
    """Where a name belongs: its owner, the key's own name, and the field."""

    owner: str
    key: str
    field: FieldInfo


class KeyIndex:
    """Finds the owner of a name: the core, then plugins that load for certain, then any other installed one.

    Others are imported (their torch-free entry modules) only when a name forces the question.
    """

    def __init__(self, catalog: Catalog, certain: Iterable[str] = ()) -> None:
        self.catalog = catalog
        self._places: dict[str, Place] = {}
        self._complete = False
        self._add(CORE, CoreConfig)
        for name in certain:
            self._add(name, catalog.load(name).Config)

    def find(self, name: str) -> Place | None:
        """The place of a key or of an alias of it; None when nobody owns it."""
        if name not in self._places:
            self._complete_with_others()
        return self._places.get(name)

    def known(self) -> list[str]:
        """Every key and alias of the core and of all installed plugins."""
        self._complete_with_others()
        return sorted(self._places)

    def places(self, *, everywhere: bool) -> Iterator[Place]:
        """Each key once: of the core and the certain plugins, or of all installed ones."""
        if everywhere:
            self._complete_with_others()
        return (place for name, place in self._places.items() if name == place.key)

    def _complete_with_others(self) -> None:
        if not self._complete:
            self._complete = True
            present = {place.owner for place in self._places.values()}
            for name in self.catalog.installed:
                if name not in present and (cls := self.catalog.peek(name)):
                    self._add(name, cls.Config, wanted=False)

    def _add(self, owner: str, config: type[BaseModel], *, wanted: bool = True) -> None:
        for key, info in config.model_fields.items():
            for name in (key, *facts(info).aliases):
                if wanted and name in self._places:
                    raise two_owners(name, self._places[name].owner, owner)
                self._places.setdefault(name, Place(owner, key, info))


def two_owners(key: str, one: str, other: str) -> PluginError:
    """The error for a key that two owners claim."""
    names = [each if each == CORE else f"plugin {each!r}" for each in (one, other)]
    return PluginError(
        f"config key {key!r} is claimed by {names[0]} and by {names[1]}",
        remedy="load only one of them, or have the plugin's author rename the key",
    )


def canonical(raw: Mapping[str, Any], index: KeyIndex, where: object = None) -> dict[str, Any]:
    """``raw`` under the keys' own names: no leading dashes, underscores, no aliases.

    Names that nobody owns stay as they are. Raises ConfigError when a key is given under two spellings.
    """
    settled: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name, value in raw.items():
        bare = bare_name(name)
        place = index.find(bare)
        key = place.key if place else bare
        if key in settled:
            raise ConfigError(
                f"{key!r} is given twice, as {spelt[key]!r} and as {name!r}", where=where, remedy="keep one of them"
            )
        settled[key], spelt[key] = value, name
    return settled


def unknown_key(name: str, index: KeyIndex, where: object = None) -> ConfigError:
    """The error for a key that nobody owns."""
    broken = "; ".join(str(error.what) for error in index.catalog.broken.values())
    return ConfigError(
        f"there is no config key {name!r}",
        where=where,
        nearest=nearest(name, index.known()),
        remedy=f"if it belongs to a plugin that could not be imported, mend that first: {broken}" if broken else None,
    )


def claims(raw: Mapping[str, Any], index: KeyIndex) -> dict[str, str]:
    """Plugins that the config asks for by a key or a value of theirs, with the reason in words."""
    found: dict[str, str] = {}
    for key in raw:
        if (place := index.find(key)) and place.owner != CORE:
            found.setdefault(place.owner, f"owns {key}")
    for key, own in OPEN_VALUES.items():
        value = raw.get(key)
        if isinstance(value, str) and value not in own:
            for name in index.catalog.providers(key, value):
                found.setdefault(name, f"serves {key}: {value}")
    return found


@dataclass
class Split:
    """The flat config, divided by owner."""

    core: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[TunerError] = field(default_factory=list)


@dataclass(frozen=True)
class Splitter:
    """Divides a flat config between the core and the selected plugins, and judges what is left over."""

    index: KeyIndex
    selection: Selection
    wanted: Wanted
    strict: bool
    where: Mapping[str, str]

    def split(self, raw: Mapping[str, Any]) -> Split:
        """Give every key to its owner. Everything that is wrong is in the result's ``errors``."""
        owner = self._owners()
        result = Split(parts={name: {} for name in self.selection.classes})
        aside: dict[str, list[str]] = {}
        for key, value in raw.items():
            if key in OPEN_VALUES and not self._served(key, value, result):
                continue
            if key in owner:
                (result.core if owner[key] == CORE else result.parts[owner[key]])[key] = value
            elif place := self.index.find(key):
                aside.setdefault(place.owner, []).append(key)
                result.errors += self._unloaded(place, value)
            else:
                result.errors.append(unknown_key(key, self.index, self.where.get(key)))
        result.notes += [f"set aside: {', '.join(keys)} ({self._why(name)})" for name, keys in sorted(aside.items())]
        return result

    def _owners(self) -> dict[str, str]:
        owner = dict.fromkeys(CoreConfig.model_fields, CORE)
        for name, cls in self.selection.classes.items():
            for key in cls.Config.model_fields:
                if key in owner:
                    raise two_owners(key, owner[key], name)
                owner[key] = name
        return owner

    def _why(self, name: str) -> str:
        return f"plugin {name!r} is left out" if name in self.wanted.without else f"plugin {name!r} is not loaded"

    def _unloaded(self, place: Place, value: Any) -> list[TunerError]:
        """What is wrong with leaving a plugin's key aside, if anything."""
        effect = facts(place.field).effect
        silent = effect and place.owner not in self.wanted.without and not self._is_default(place, value)
        if not (self.strict or silent):
            return []
        why = f"and without it {_EFFECTS[effect]} would change" if silent and effect else "and `strict` is set"
        return [self._refusal(f"{place.key!r}", place.owner, why, self.where.get(place.key))]

    def _refusal(self, what: str, plugin: str, why: str, where: object) -> ConfigError:
        remedy = f"add {plugin!r} to `plugins`, remove the key"
        remedy += "" if self.strict else f", or say --without {plugin}"
        return ConfigError(
            f"{what} belongs to plugin {plugin!r}, which is not loaded, {why}", where=where, remedy=remedy
        )

    def _is_default(self, place: Place, value: Any) -> bool:
        try:
            config = self.index.catalog.load(place.owner).Config.model_validate({place.key: value})
        except ValidationError:
            return False
        return bool(getattr(config, place.key) == place.field.get_default(call_default_factory=True))

    def _served(self, key: str, value: Any, result: Split) -> bool:
        """Whether an open value has a provider in this run; if not, the core's default or an error stands for it."""
        if not isinstance(value, str) or value in OPEN_VALUES[key]:
            return True
        if any(value in cls.values.get(key, ()) for cls in self.selection.classes.values()):
            return True
        providers = self.index.catalog.providers(key, value)
        where = self.where.get(key)
        if providers:
            self._unloaded_value(key, value, providers[0], result)
        else:
            choice = self._values(key)
            fault = ConfigError(
                f"{key} is {shown(value)}, which nothing provides",
                where=where,
                allowed=choice,
                nearest=nearest(value, choice),
            )
            result.errors.append(fault)
        return False

    def _unloaded_value(self, key: str, value: str, plugin: str, result: Split) -> None:
        default = CoreConfig.model_fields[key].default
        effect = facts(CoreConfig.model_fields[key]).effect
        silent = effect and plugin not in self.wanted.without
        if self.strict or silent:
            why = f"and without it {_EFFECTS[effect]} would change" if silent and effect else "and `strict` is set"
            result.errors.append(self._refusal(f"{key} {value!r}", plugin, why, self.where.get(key)))
        result.notes.append(f"set aside: {key} {value!r} ({self._why(plugin)}); {default!r} is used")

    def _values(self, key: str) -> list[str]:
        installed = (self.index.catalog.peek(name) for name in self.index.catalog.installed)
        served = {value for cls in installed if cls for value in cls.values.get(key, ())}
        return sorted({*OPEN_VALUES[key], *served})


_EFFECTS = {"memory": "the memory needed", "files": "the files saved", "uploads": "what is uploaded"}


def raise_all(errors: Iterable[TunerError]) -> None:
    """Raise everything that was found wrong as one error; nothing when nothing was."""
    if error := join(errors):
        raise error
