"""Which plugins a run loads: what is installed, what is wanted, what they require of each other, in which order.

Nothing is imported before its name is wanted, but for the torch-free entry modules that must be asked
whose a key or a value is. The order depends on the set of plugins alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from tuner.errors import PluginError, nearest

if TYPE_CHECKING:
    from tuner.plugin import AnyPlugin

GROUP = "tuner.plugins"
DISTRIBUTION = "difftuner"
"""The package that the core and its built-in plugins come in."""
FAMILY = "model-family"
"""The capability of a plugin that brings a model."""


@dataclass(frozen=True)
class Found:
    """One installed plugin, not imported yet."""

    name: str
    entry_point: EntryPoint
    package: str
    version: str
    builtin: bool = False

    @property
    def source(self) -> str:
        """Package and version, as errors and listings show them."""
        return "built in" if self.builtin else f"{self.package} {self.version}"

    def load(self) -> type[AnyPlugin]:
        """Import the plugin's class. Raises PluginError naming plugin and package when it is not a usable one."""
        from tuner.plugin import API_VERSION, Plugin

        where = f"plugin {self.name!r} ({self.source}), {self.entry_point.value}"
        try:
            cls = self.entry_point.load()
        except Exception as error:
            raise PluginError(
                f"plugin {self.name!r} failed to import: {type(error).__name__}: {error}",
                where=where,
                remedy=f"mend or reinstall it, or leave it out with --without {self.name}",
            ) from error
        if not (inspect.isclass(cls) and issubclass(cls, Plugin)):
            raise PluginError(f"plugin {self.name!r} is no tuner.Plugin subclass", where=where)
        if cls.api != API_VERSION:
            raise PluginError(
                f"plugin {self.name!r} was written for version {cls.api} of the hooks; this is version {API_VERSION}",
                where=where,
                remedy="install a release of the plugin that was made for this version",
            )
        return cls


def discover() -> dict[str, Found]:
    """Every installed plugin by name, built-ins included, without importing any.

    Raises PluginError when two packages name a plugin alike.
    """
    from tuner import __version__
    from tuner.builtin import BUILTINS

    found = {
        name: Found(name, EntryPoint(name, target, GROUP), DISTRIBUTION, __version__, builtin=True)
        for name, target in BUILTINS.items()
    }
    packages: dict[int, tuple[str, str]] = {}  # each reading of a name parses the package's metadata anew
    for entry in sorted(entry_points(group=GROUP), key=lambda each: (each.name, each.value)):
        package = entry.dist
        if package and id(package) not in packages:
            packages[id(package)] = (package.name, package.version)
        this = Found(entry.name, entry, *packages.get(id(package), ("unknown", "?")))
        if other := found.get(this.name):
            raise PluginError(
                f"two packages have a plugin named {this.name!r}: {other.source} and {this.source}",
                where=f"{other.entry_point.value} and {this.entry_point.value}",
                remedy="uninstall one of them",
            )
        found[this.name] = this
    return dict(sorted(found.items()))


class Catalog:
    """The installed plugins, each imported at most once and only when asked for."""

    def __init__(self, installed: Mapping[str, Found] | None = None) -> None:
        self.installed = discover() if installed is None else dict(installed)
        self.broken: dict[str, PluginError] = {}
        """Plugins that nobody selected and that could not be imported when they were asked for their keys."""
        self._classes: dict[str, type[AnyPlugin]] = {}

    def load(self, name: str) -> type[AnyPlugin]:
        """The class of a selected plugin. Raises PluginError when no such plugin is installed or it fails to import."""
        if name not in self._classes:
            self._classes[name] = self.find(name).load()
        return self._classes[name]

    def peek(self, name: str) -> type[AnyPlugin] | None:
        """The class of a plugin that may not be wanted at all: one that fails to import is remembered, not raised."""
        try:
            return self.load(name)
        except PluginError as error:
            self.broken[name] = error
            return None

    def find(self, name: str) -> Found:
        """The installed plugin of that name. Raises PluginError with the nearest name when there is none."""
        if name not in self.installed:
            raise PluginError(
                f"no installed plugin is named {name!r}",
                allowed=self.installed,
                nearest=nearest(name, self.installed),
            )
        return self.installed[name]

    def providers(self, key: str, value: str) -> list[str]:
        """Installed plugins that serve this value of a core key."""
        return [name for name in self.installed if (cls := self.peek(name)) and value in cls.values.get(key, ())]


@dataclass(frozen=True)
class Wanted:
    """What the user said about plugins."""

    plugins: tuple[str, ...] | None
    """Exactly these beside the built-ins; None lets the config decide."""
    without: frozenset[str]
    family: str | None

    @classmethod
    def read(cls, raw: Mapping[str, Any], plugins: Iterable[str] | None = None, without: Iterable[str] = ()) -> Wanted:
        """From the keys ``plugins``, ``without`` and ``model_family`` and what was given beside them.

        A list given beside the config replaces the config's; plugins to leave out add to the config's.
        """
        from tuner.config.coerce import coerce

        named = coerce(raw.get("plugins"), list[str]) if plugins is None else list(plugins)
        left_out = coerce(raw.get("without"), list[str]) or []
        family = raw.get("model_family")
        return cls(
            None if named is None else tuple(map(str, named)),
            frozenset({*map(str, left_out), *without}),
            None if family is None else str(family),
        )

    def check(self, catalog: Catalog) -> None:
        """Refuse names that are not installed."""
        for name in (*(self.plugins or ()), *sorted(self.without)):
            catalog.find(name)

    def certain(self, catalog: Catalog) -> list[str]:
        """Installed plugins that load whatever else the config says."""
        named = self.plugins if self.plugins is not None else [self.family] if self.family else []
        builtins = [name for name, found in catalog.installed.items() if found.builtin]
        return sorted(({*named, *builtins} & catalog.installed.keys()) - self.without)


@dataclass(frozen=True)
class Selection:
    """The plugins of a run, in their order, and why each installed one is among them or not."""

    classes: dict[str, type[AnyPlugin]]
    reasons: dict[str, str] = field(default_factory=dict)


def select(catalog: Catalog, wanted: Wanted, claims: Mapping[str, str]) -> Selection:
    """Choose, check and order the plugins.

    ``claims`` are the plugins that the config asks for by a key or a value of theirs, with the reason in
    words; they count only where no exact list was given. Raises PluginError.
    """
    wanted.check(catalog)
    if wanted.plugins is None and wanted.family is not None and wanted.family not in wanted.without:
        _find_family(catalog, wanted.family)
    reasons = {name: _reason(catalog, wanted, claims, name) for name in catalog.installed}
    names = [name for name, (loaded, _) in reasons.items() if loaded]
    classes = {name: catalog.load(name) for name in names}
    _check_family(catalog, wanted, classes)
    return Selection(_ordered(classes, catalog), {name: why for name, (_, why) in reasons.items()})


def _find_family(catalog: Catalog, family: str) -> None:
    if family in catalog.installed and FAMILY in catalog.load(family).provides:
        return
    families = _families(catalog)
    raise PluginError(
        f"no installed plugin brings the model family {family!r}",
        where="model_family",
        allowed=families,
        nearest=nearest(family, families),
    )


def _reason(catalog: Catalog, wanted: Wanted, claims: Mapping[str, str], name: str) -> tuple[bool, str]:
    """Whether a plugin is loaded, and why or why not."""
    if name in wanted.without:
        return False, "left out by `without`"
    if wanted.plugins is not None and name in wanted.plugins:
        return True, "named in `plugins`"
    if catalog.installed[name].builtin:
        return True, "built in"
    if wanted.plugins is not None:
        return False, "not named in `plugins`"
    if name == wanted.family:
        return True, "is the model family"
    if name not in claims:
        return False, "no key or value of its own in the config"
    if (cls := catalog.peek(name)) and FAMILY in cls.provides:
        return False, "another model family is trained"
    return True, claims[name]


def _families(catalog: Catalog) -> list[str]:
    return [name for name in catalog.installed if (cls := catalog.peek(name)) and FAMILY in cls.provides]


def _check_family(catalog: Catalog, wanted: Wanted, classes: Mapping[str, type[AnyPlugin]]) -> None:
    families = [name for name, cls in classes.items() if FAMILY in cls.provides]
    if len(families) > 1:
        raise PluginError(
            f"two model families are selected: {' and '.join(map(repr, families))}",
            remedy="name one of them in `plugins`",
        )
    if not families:
        choice = _families(catalog)
        by_key = wanted.plugins is None and wanted.family is None
        remedy = "set `model_family`, or name the family in `plugins`" if by_key else "name a model family in `plugins`"
        if wanted.family in wanted.without:
            remedy = f"do not leave {wanted.family!r} out, or choose another family"
        raise PluginError("no model family is selected", allowed=choice, remedy=remedy)
    if wanted.family is not None and wanted.family != families[0]:
        raise PluginError(
            f"model_family is {wanted.family!r}, but the plugins selected bring the family {families[0]!r}",
            where="model_family",
            allowed=_families(catalog),
            nearest=nearest(wanted.family, _families(catalog)),
            remedy=f"make them agree: model_family {families[0]!r}, or {wanted.family!r} in `plugins`",
        )


def _ordered(classes: Mapping[str, type[AnyPlugin]], catalog: Catalog) -> dict[str, type[AnyPlugin]]:
    """Each plugin after those it requires, otherwise by name. Raises PluginError for a need unmet or a circle."""
    offered: dict[str, list[str]] = {}
    for name, cls in classes.items():
        for offer in {name, *cls.provides}:
            offered.setdefault(offer, []).append(name)
    done: dict[str, type[AnyPlugin]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            raise PluginError(f"plugins require each other in a circle: {' -> '.join(circle)}")
        if name in done:
            return
        for need in sorted(classes[name].requires):
            if need not in offered:
                raise _unmet(catalog, name, need)
            for provider in sorted(set(offered[need]) - {name}):
                visit(provider, (*path, name))
        done[name] = classes[name]

    for name in sorted(classes):
        visit(name, ())
    return done


def _unmet(catalog: Catalog, name: str, need: str) -> PluginError:
    could = [other for other in catalog.installed if (cls := catalog.peek(other)) and need in {other, *cls.provides}]
    return PluginError(
        f"plugin {name!r} requires {need!r}, which no selected plugin provides",
        where=f"{name} ({catalog.installed[name].source})",
        remedy=f"add {' or '.join(map(repr, could))} to `plugins`"
        if could
        else f"install a plugin that provides {need!r}",
    )


def judge_conflicts(active: Mapping[str, AnyPlugin], installed: Mapping[str, Found]) -> None:
    """Refuse two active plugins of which one excludes the other. Raises PluginError naming both with their packages."""
    for name, plugin in active.items():
        for foe in sorted(plugin.conflicts):
            for other, rival in active.items():
                if other != name and foe in {other, *rival.provides}:
                    both = [f"{each!r} ({installed[each].source})" for each in sorted((name, other))]
                    raise PluginError(
                        f"plugins {' and '.join(both)} exclude each other: only one may be {foe!r}",
                        remedy=f"leave one out, for example with --without {max(name, other)}",
                    )
