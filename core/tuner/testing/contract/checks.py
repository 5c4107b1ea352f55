"""The contract, run on an installed plugin without pytest: ``tuner plugins check``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from tuner.selection import DISTRIBUTION, Found
from tuner.testing.contract.family import FamilyContract
from tuner.testing.contract.plugin import PluginContract

MODULE = "contract"
"""Beside the module behind the entry point: where a package says what it is held to."""


@dataclass(frozen=True)
class Outcome:
    """One check of one plugin."""

    name: str
    """such as ``import_costs_nothing``"""
    asked: str
    """what the contract asks, one sentence or two"""
    wrong: str = ""
    """what was found instead; empty where the plugin passes"""


Contract = type[PluginContract] | type[FamilyContract]


def contracts_of(found: Found, family: bool) -> list[Contract]:
    """What a plugin is held to: what its package says in its module ``contract``, else what every plugin is.

    Arguments
        family: whether it is a model family, which needs a tiny model: only its package can say how to build one.

    Raises LookupError for a family whose package does not say it.
    """
    own = _module(found)
    classes = [each for each in vars(own).values() if _is_contract(each, found.name)] if own else []
    if not any(issubclass(each, PluginContract) for each in classes):
        classes.insert(0, _usual(found))
    if family and not any(issubclass(each, FamilyContract) for each in classes):
        package = found.entry_point.module
        raise LookupError(
            f"{package}.{MODULE} has no FamilyContract of {found.name!r}: without a tiny model a family cannot be tried"
        )
    return classes


def run(contract: Contract) -> Iterator[Outcome]:
    """Every check of a contract, one after the other; what a check raises is its outcome."""
    for name in [name for name in dir(contract) if name.startswith("test_")]:
        check = getattr(contract(), name)
        asked = " ".join((inspect.getdoc(check) or "").split())
        try:
            check()
        except Exception as error:
            yield Outcome(name.removeprefix("test_"), asked, _told(error))
        else:
            yield Outcome(name.removeprefix("test_"), asked)


def _told(error: Exception) -> str:
    """What is wrong; an assertion without words is shown as it stands."""
    if isinstance(error, AssertionError):
        line = traceback.extract_tb(error.__traceback__)[-1].line or ""
        return str(error).strip() or f"not so: {line.removeprefix('assert ')}"
    return f"{type(error).__name__}: {error}"


def _usual(found: Found) -> type[PluginContract]:
    keys = found.load().Config.model_fields if found.package == DISTRIBUTION else ()  # users' files had these before
    return type("Usual", (PluginContract,), {"plugin": found.name, "legacy_keys": frozenset(keys)})


def _module(found: Found) -> ModuleType | None:
    name = f"{found.entry_point.module}.{MODULE}"
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:  # the entry point's module is no package
        return None


def _is_contract(value: object, plugin: str) -> bool:
    kinds = (PluginContract, FamilyContract)
    return isinstance(value, type) and issubclass(value, kinds) and getattr(value, "plugin", None) == plugin
