"""The hook manager: pluggy, held to our contract and with an answer to "whose hook was it?"."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pluggy

from tuner.errors import PluginError, nearest
from tuner.hookspecs import PROJECT, REQUIRED, SINGLE, HookSpecs, hook_names

if TYPE_CHECKING:
    from tuner.plugin import AnyPlugin
    from tuner.run import Run

USUAL = {"prepare_data": "datasets", "plan_epochs": "epochs", "fill_cache": "encoding"}
"""Who answers the required hooks that are no model family's."""
_SPECS = {name: tuple(inspect.signature(getattr(HookSpecs, name)).parameters)[1:] for name in hook_names()}
"""Hook name to its argument names."""


class Manager(pluggy.PluginManager):
    """Holds the loaded plugins. ``manager.hook.NAME(...)`` calls a hook; the first plugin added is called first."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(HookSpecs)
        self.add_hookcall_monitoring(lambda *_: None, _blame)

    def add_all(self, plugins: Mapping[str, AnyPlugin]) -> None:
        """Register plugins so that their hooks are called in the order of the mapping, then check the whole."""
        for name in reversed(list(plugins)):  # pluggy calls the last one registered first
            self.add(name, plugins[name])
        self.check()

    def add(self, name: str, plugin: AnyPlugin) -> None:
        """Register one plugin. Raises PluginError when a hook of it would be called wrongly or never."""
        check_hooks(name, type(plugin))  # type: ignore[arg-type]  # to mypy no class is hashable
        try:
            self.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"plugin {name!r} cannot be registered: {error}") from error

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        """The options of a hook: a method that the class has marked. pluggy would look at every attribute one by one,
        which took most of the time of assembling a run."""
        return getattr(getattr(type(plugin), name, None), f"{PROJECT}_impl", None)

    def check(self) -> None:
        """Refuse a single-answer hook answered twice, and a required one that nobody answers."""
        for name in sorted(SINGLE):
            answering = self.answering(name)
            if len(answering) > 1:
                raise PluginError(
                    f"hook {name!r} takes one answer, but plugins {' and '.join(map(repr, answering))} both give one",
                    remedy="load one of them",
                )
            if name in REQUIRED and not answering:
                whose = f"the built-in plugin {USUAL[name]!r}" if name in USUAL else "a model family that does"
                raise PluginError(f"no loaded plugin implements the hook {name!r}", remedy=f"load {whose}")

    def answering(self, hook_name: str) -> list[str]:
        """Names of the plugins that answer this hook themselves, in calling order; wrappers do not answer."""
        caller = getattr(self.hook, hook_name)
        return [each.plugin_name for each in reversed(caller.get_hookimpls()) if not (each.wrapper or each.hookwrapper)]

    def unwrapped(self, hook_name: str) -> Callable[..., Any]:
        """The caller of a hook without the plugins that wrap it."""
        wrapping = [each.plugin for each in getattr(self.hook, hook_name).get_hookimpls() if each.wrapper]
        return self.subset_hook_caller(hook_name, wrapping)

    def collect(
        self, hook_name: str, *, only: Collection[str] | None = None, **arguments: Any
    ) -> list[tuple[str, Any]]:
        """Call a hook plugin by plugin: (plugin name, answer) for each one that answered, in calling order.

        ``only``: names of the plugins to ask; None is all.
        Generators are run to their end here, so that what they raise is blamed on their plugin.
        """
        names = self.answering(hook_name)
        answers = []
        for name in names:
            if only is not None and name not in only:
                continue
            others = [self.get_plugin(other) for other in names if other != name]
            answer = self.subset_hook_caller(hook_name, others)(**arguments)
            if isinstance(answer, list) and not self._single(hook_name):
                answer = answer[0] if answer else None
            if answer is not None:
                answers.append((name, _exhausted(answer, hook_name, name)))
        return answers

    def notify(self, hook_name: str, run: Run, **arguments: Any) -> None:
        """Call a hook of every plugin, whatever another one raises: that is logged with the plugin's name."""
        names = self.answering(hook_name)
        for name in names:
            others = [self.get_plugin(other) for other in names if other != name]
            try:
                self.subset_hook_caller(hook_name, others)(run=run, **arguments)
            except Exception as error:
                run.log.warning("plugin %r failed in %s: %s", name, hook_name, error)

    def announcer(self, hook_name: str, run: Run) -> Callable[..., None] | None:
        """:meth:`notify` for one hook; None where no plugin implements it."""
        return partial(self.notify, hook_name, run) if self.answering(hook_name) else None

    def registry(self, hook_name: str, run: Run) -> dict[str, Any]:
        """Merge the mappings that a hook's answers are. Raises PluginError when one name is offered twice."""
        merged: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for plugin, offered in self.collect(hook_name, run=run):
            if not isinstance(offered, Mapping):
                raise PluginError(
                    f"hook {hook_name!r} of plugin {plugin!r} must return a mapping, not {type(offered).__name__}"
                )
            for name, value in offered.items():
                if name in owner:
                    raise PluginError(
                        f"{hook_name}: {name!r} is offered by plugin {owner[name]!r} and by plugin {plugin!r}",
                        remedy="load one of them",
                    )
                owner[name], merged[name] = plugin, value
        return merged

    def _single(self, hook_name: str) -> bool:
        spec = getattr(self.hook, hook_name).spec
        return bool(spec and spec.opts["firstresult"])


def hooks_of(cls: type[AnyPlugin]) -> list[str]:
    """Names of the hooks that a plugin class implements."""
    marked = [
        (name, getattr(method, "tuner_impl", None)) for name, method in inspect.getmembers(cls, inspect.isfunction)
    ]
    return [options.get("specname") or name for name, options in marked if options]


@cache
def check_hooks(name: str, cls: type[AnyPlugin]) -> None:
    """Refuse a plugin class with a hook that would be called wrongly or never. Raises PluginError."""
    where = f"{cls.__module__}:{cls.__qualname__}"
    for attribute, method in inspect.getmembers(cls, inspect.isfunction):
        options = getattr(method, "tuner_impl", None)
        if options is None:
            if attribute in _SPECS:
                raise PluginError(
                    f"plugin {name!r} defines {attribute!r} without @hookimpl, so it would never be called",
                    where=where,
                    remedy="mark it with @tuner.hookimpl, or rename it",
                )
            continue
        hook = options.get("specname") or attribute
        if hook not in _SPECS:
            raise PluginError(
                f"plugin {name!r} implements an unknown hook {hook!r}", where=where, nearest=nearest(hook, _SPECS)
            )
        _check_arguments(name, hook, method, where)


def _check_arguments(name: str, hook: str, method: Any, where: str) -> None:
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            raise PluginError(
                f"plugin {name!r}, hook {hook!r}: argument {parameter.name!r} has a default and may never be passed",
                where=where,
                remedy="drop the default",
            )
        if parameter.name not in _SPECS[hook]:
            raise PluginError(
                f"plugin {name!r}, hook {hook!r} has an argument {parameter.name!r} that the hook does not pass",
                where=where,
                allowed=_SPECS[hook],
                nearest=nearest(parameter.name, _SPECS[hook]),
            )


def _exhausted(answer: Any, hook_name: str, plugin: str) -> Any:
    if not isinstance(answer, Iterator):
        return answer
    try:
        return list(answer)
    except Exception as error:
        _note(error, hook_name, plugin)
        raise


def _blame(outcome: Any, hook_name: str, implementations: Any, _arguments: Any) -> None:
    """Note on an exception which plugin's hook it came from: the innermost one on the traceback."""
    error = outcome.exception
    if error is None:
        return
    owners = {inspect.unwrap(each.function).__code__: each.plugin_name for each in implementations}
    culprit, trace = None, error.__traceback__
    while trace is not None:
        culprit = owners.get(trace.tb_frame.f_code, culprit)
        trace = trace.tb_next
    if culprit:
        _note(error, hook_name, culprit)


def _note(error: BaseException, hook_name: str, plugin: str) -> None:
    note = f"in hook {hook_name!r} of plugin {plugin!r}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
