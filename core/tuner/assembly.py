"""From a flat config to a run's plugins: select, divide the keys, validate, register, configure, judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tuner import processes
from tuner.config import warnings
from tuner.config.faults import build
from tuner.config.keys import CoreConfig
from tuner.config.owners import CORE, KeyIndex, Split, Splitter, canonical, claims, raise_all, unknown_key
from tuner.errors import PluginError, TunerError
from tuner.manager import Manager
from tuner.plugin import AnyPlugin, PluginConfig
from tuner.run import Run
from tuner.selection import Catalog, Found, Selection, Wanted, judge_conflicts, select


@dataclass(frozen=True)
class Assembly:
    """A valid config and the plugins it loads, before any weight is read."""

    core: CoreConfig
    manager: Manager
    plugins: dict[str, AnyPlugin]
    """Every loaded plugin, built-ins included, in the order their hooks are called."""
    explicit: frozenset[str]
    """Keys that are set, by the user or by a proposal, and that count in this run."""
    notes: tuple[str, ...] = ()
    """What was set aside, one line for each plugin."""
    warnings: tuple[str, ...] = ()
    """What will not happen although the config says so."""
    found: Mapping[str, Found] = field(default_factory=dict)
    """Where each loaded plugin comes from."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why each installed plugin is loaded or not."""
    proposed: Mapping[str, Any] = field(default_factory=dict)
    """Keys that plugins set where the user did not (see the hook ``propose_settings``)."""
    again: Callable[..., Assembly] | None = field(default=None, repr=False)
    """Assembles the same config with ``proposed``."""


def assemble(
    raw: Mapping[str, Any],
    *,
    plugins: Sequence[str] | None = None,
    without: Sequence[str] = (),
    strict: bool | None = None,
    catalog: Catalog | None = None,
    proposed: Mapping[str, Any] = {},
) -> Assembly:
    """Assemble a run from a flat config.

    Arguments
        raw: flat keys; its attribute ``sources`` (see ``tuner.cli.flags.Settings``) says where each was set.
        plugins: load exactly these beside the built-in ones, instead of the config's ``plugins``.
        without: leave these out, beside the config's ``without``.
        strict: overrides the config's ``strict``.
        catalog: what is installed, for tests.
        proposed: keys set by plugins, beside those of ``raw``.

    Raises ConfigError or PluginError, with everything that one reading of the config finds wrong.
    """
    catalog = catalog or Catalog()
    wanted, index, settings = _read(raw, plugins, without, catalog)
    if taken := sorted(settings.keys() & proposed.keys()):
        raise PluginError(f"a plugin proposes keys that the config sets: {', '.join(taken)}", where="propose_settings")
    settings |= proposed
    sources: Mapping[str, str] = getattr(raw, "sources", {}) | dict.fromkeys(proposed, "proposed by a plugin")
    selection = _select(settings, wanted, index, sources)
    if strict is not None:
        settings["strict"] = strict
    severe = str(settings.get("strict", False)).lower() in ("true", "yes", "on", "1")
    split = Splitter(index, selection, wanted, severe, sources).split(settings)
    core, loaded = _validate(split, selection, wanted, sources)
    manager = Manager()
    manager.add_all(loaded)
    found = {name: catalog.installed[name] for name in loaded}
    used = {*split.core, *(key for part in split.parts.values() for key in part)}
    configs = {CORE: core, **{name: plugin.config for name, plugin in loaded.items()}}
    told = [*split.warnings, *warnings.pending(configs, used), *warnings.idle(configs, core, used)]
    told += [warning for plugin in loaded.values() for warning in plugin.warnings(core)]
    notes = (*split.notes, *_ignored(catalog, selection))
    again = partial(assemble, raw, plugins=plugins, without=without, strict=strict, catalog=catalog)
    facts = (notes, tuple(told), found, selection.reasons, proposed, again)
    assembly = Assembly(core, manager, loaded, frozenset(used), *facts)
    manager.hook.configure(run=new_run(assembly))
    judge_conflicts({name: plugin for name, plugin in loaded.items() if plugin.is_active(core)}, found)
    return assembly


def settle(assembly: Assembly) -> Assembly:
    """``assembly`` with the settings that its plugins propose, and the plugins that those select; once.

    Of several processes the main one asks, and its answer holds for all. Raises what a plugin raises, and PluginError
    where two propose one key, or one a key that the user set.
    """
    run = new_run(assembly)
    with processes.together():
        ask = run.is_main and not assembly.proposed
        proposed = assembly.manager.registry("propose_settings", run) if ask else {}
    proposed = processes.gather(proposed)[0]
    if not proposed or assembly.again is None:
        return assembly
    with processes.together():
        settled: Assembly = assembly.again(proposed=proposed)
    more = sorted(settled.plugins.keys() - assembly.plugins.keys())
    if run.is_main and more:
        run.log.info("plugins loaded for it: %s", ", ".join(more))
    for line in settled.warnings:
        if run.is_main and line not in assembly.warnings:
            run.log.warning("%s", line)
    return settled


def new_run(assembly: Assembly) -> Run:
    """A fresh Run of an assembly, without device and model spec."""
    index, count = processes.launched()
    return Run(assembly.core, assembly.plugins, assembly.explicit, process_index=index, process_count=count)


def selection_of(
    raw: Mapping[str, Any],
    catalog: Catalog,
    *,
    plugins: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Selection:
    """The plugins that a config selects, without validating the rest of it. Raises TunerError."""
    wanted, index, settings = _read(raw, plugins, without, catalog)
    return _select(settings, wanted, index, getattr(raw, "sources", {}))


def _read(
    raw: Mapping[str, Any], plugins: Sequence[str] | None, without: Sequence[str], catalog: Catalog
) -> tuple[Wanted, KeyIndex, dict[str, Any]]:
    wanted = Wanted.read(raw, plugins, without)
    wanted.check(catalog)
    index = KeyIndex(catalog, wanted.certain(catalog))
    return wanted, index, canonical(raw, index)


def _select(settings: Mapping[str, Any], wanted: Wanted, index: KeyIndex, sources: Mapping[str, str]) -> Selection:
    asked = claims(settings, index) if wanted.plugins is None else {}
    try:
        return select(index.catalog, wanted, asked)
    except TunerError as error:
        # A misspelt key is often why: `model_famly` selects no family.
        misspelt = [unknown_key(key, index, sources.get(key)) for key in settings if index.find(key) is None]
        raise_all([*misspelt, error])
        raise


def _validate(
    split: Split, selection: Selection, wanted: Wanted, sources: Mapping[str, str]
) -> tuple[CoreConfig, dict[str, AnyPlugin]]:
    """Make every config model; everything that is wrong comes as one error."""
    errors = list(split.errors)
    values = {
        **split.core,
        "without": sorted(wanted.without),
        **({} if wanted.plugins is None else {"plugins": list(wanted.plugins)}),
    }
    configs: dict[str, PluginConfig] = {}
    models: dict[str, type[PluginConfig]] = {CORE: CoreConfig}
    models |= {name: cls.Config for name, cls in selection.classes.items()}
    for owner, model in models.items():
        try:
            configs[owner] = build(model, values if owner == CORE else split.parts[owner], where=sources)
        except TunerError as error:
            errors.append(error)
    raise_all(errors)
    core = configs[CORE]
    assert isinstance(core, CoreConfig)
    return core, {name: cls(name, configs[name]) for name, cls in selection.classes.items()}


def _ignored(catalog: Catalog, selection: Selection) -> list[str]:
    """A line for each plugin that could not be imported and that nobody selected."""
    return [f"not considered: {error.what}" for name, error in catalog.broken.items() if name not in selection.classes]
