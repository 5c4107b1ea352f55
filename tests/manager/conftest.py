"""Small plugins for these tests alone, so that nothing depends on what else is installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

import tuner
from tuner.plugin import AnyPlugin, Plugin, PluginConfig, key
from tuner.selection import GROUP, Catalog, Found


class Family(Plugin[PluginConfig]):
    """A model family that answers what a family must."""

    provides = frozenset({"model-family"})

    @tuner.hookimpl
    def describe_model(self, run: Any) -> str:
        return "described"

    @tuner.hookimpl
    def prepare_data(self, run: Any, spec: Any) -> str:
        return "prepared"

    @tuner.hookimpl
    def plan_epochs(self, run: Any, spec: Any, data: Any, processes: Any) -> str:
        return "planned"

    @tuner.hookimpl
    def load_model(self, run: Any) -> str:
        return "loaded"

    @tuner.hookimpl
    def encode_batch(self, run: Any, model: Any, batch: Any) -> str:
        return "encoded"

    @tuner.hookimpl
    def fill_cache(self, run: Any, model: Any) -> str:
        return "filled"

    @tuner.hookimpl
    def compute_loss(self, run: Any, model: Any, batch: Any) -> str:
        return "loss"


class OtherFamilyConfig(PluginConfig):
    other_width: int = key(8, "Width.")


class OtherFamily(Family):
    """A second family, with a key of its own."""

    Config = OtherFamilyConfig


class Route(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ratio: float = key(..., "Share.", ge=0, lt=1)
    first: int = key(0, "First block.")


class RouterConfig(PluginConfig):
    router_routes: list[Route] | None = key(None, "Routes.", aliases=("routes",))


class Router(Plugin[RouterConfig]):
    """Routes tokens, or so it says."""

    requires = frozenset({"model-family"})
    provides = frozenset({"token-router"})
    conflicts = frozenset({"token-router"})
    Config = RouterConfig

    @tuner.hookimpl
    def route_tokens(self, run: Any, request: Any) -> list[Any]:
        return []


class SaverConfig(PluginConfig):
    saver_enabled: bool = key(False, "Save memory.", effect="memory", environment="SAVER_ENABLED")
    saver_depth: int = key(2, "How deep.")


class Saver(Plugin[SaverConfig]):
    """Saves memory."""

    Config = SaverConfig

    def is_active(self, core: Any) -> bool:
        return bool(self.config.saver_enabled)


class Kernel(Plugin[PluginConfig]):
    """An attention kernel and a quantiser."""

    values = {"attention_mechanism": frozenset({"swift"}), "base_model_precision": frozenset({"int7-fake"})}

    @tuner.hookimpl
    def attention_backends(self, run: Any) -> dict[str, Any]:
        return {"swift": "a swift kernel"}


class BuiltIn(Plugin[PluginConfig]):
    """Comes with the core."""


PLUGINS: dict[str, type[AnyPlugin]] = {
    "fake": Family,
    "other": OtherFamily,
    "router": Router,
    "saver": Saver,
    "kernel": Kernel,
    "always": BuiltIn,
}

MakeCatalog = Callable[..., Catalog]


@pytest.fixture
def make_catalog(monkeypatch: pytest.MonkeyPatch) -> MakeCatalog:
    """A catalog of the plugins above, with changes: ``make_catalog(name=Class)`` adds, ``name=None`` breaks one."""
    module = types.ModuleType("fake_plugins")
    monkeypatch.setitem(sys.modules, "fake_plugins", module)

    def make(**changes: Any) -> Catalog:
        found = {}
        for name, cls in {**PLUGINS, **changes}.items():
            target = "fake_plugins_that_do_not_exist:Plugin" if cls is None else f"fake_plugins:{name}"
            setattr(module, name, cls)
            entry = EntryPoint(name, target, GROUP)
            found[name] = Found(name, entry, f"package-{name}", "1.2", builtin=name == "always")
        return Catalog(dict(sorted(found.items())))

    return make


@pytest.fixture
def catalog(make_catalog: MakeCatalog) -> Catalog:
    """The plugins above, all whole."""
    return make_catalog()
