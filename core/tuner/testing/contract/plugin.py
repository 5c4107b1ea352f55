"""What every plugin is held to."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tuner.config.describe import facts
from tuner.config.keys import CoreConfig
from tuner.manager import Manager
from tuner.plugin import AnyPlugin, PluginConfig
from tuner.selection import Catalog, discover

HEAVY = ("torch", "diffusers", "transformers", "numpy")
"""What an entry module must not import."""


def imported_by(code: str, modules: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of ``modules`` a fresh interpreter holds after running ``code``. Raises AssertionError when it fails."""
    report = f"{code}\nimport sys; print('\\n' + ' '.join(m for m in {modules!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


def names_of(config: type[PluginConfig]) -> set[str]:
    """Every name that a config's keys go by, aliases included."""
    return {name for key, field in config.model_fields.items() for name in (key, *facts(field).aliases)}


class PluginContract:
    """A plugin is found, costs nothing to import, owns clean keys, and has hooks that will be called."""

    plugin: ClassVar[str]
    """Its name."""
    legacy_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys without the plugin's name as their prefix, because users' files already have them."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Keys of its own to make it with."""

    def cls(self) -> type[AnyPlugin]:
        """The plugin's class, through its entry point."""
        found = discover()
        assert self.plugin in found, f"no installed package has an entry point {self.plugin!r} in group 'tuner.plugins'"
        return found[self.plugin].load()

    def make(self) -> AnyPlugin:
        """An instance with ``settings``."""
        cls = self.cls()
        return cls(self.plugin, cls.Config(**self.settings))

    def test_found_through_its_entry_point(self) -> None:
        """The package names it, and it loads."""
        self.make()

    def test_import_costs_nothing(self) -> None:
        """The module behind the entry point imports nothing heavy: hook bodies and sibling modules do."""
        module = discover()[self.plugin].entry_point.module
        heavy = imported_by(f"import importlib; importlib.import_module({module!r})")
        assert not heavy, f"importing {module} imports {', '.join(heavy)}: move them into the hook bodies"

    def test_defaults_are_valid(self) -> None:
        """It can be loaded without a single key of its own."""
        self.cls().Config()

    def test_config_is_strict_and_frozen(self) -> None:
        """Unknown keys are refused, and nothing changes after the start."""
        options = self.cls().Config.model_config
        assert options.get("extra") == "forbid"
        assert options.get("frozen")

    def test_keys_are_documented(self) -> None:
        """Each key is made with ``tuner.key`` and says what it does."""
        for name, field in self.cls().Config.model_fields.items():
            assert field.description, f"{name} has no description"
            extra = field.json_schema_extra
            assert isinstance(extra, dict), f"{name} is not made with tuner.key"
            assert "tuner" in extra, f"{name} is not made with tuner.key"

    def test_keys_are_its_own(self) -> None:
        """Each key starts with the plugin's name, or is declared a legacy name."""
        strange = [
            name
            for name in self.cls().Config.model_fields
            if not name.startswith(f"{self.plugin}_") and name not in self.legacy_keys
        ]
        assert not strange, f"prefix with '{self.plugin}_' or list in legacy_keys: {strange}"

    def test_no_key_collides(self) -> None:
        """No key or alias is the core's or another installed plugin's."""
        mine = names_of(self.cls().Config)
        others: dict[str, type[PluginConfig]] = {"the core": CoreConfig}
        catalog = Catalog()  # another package that fails to import is not this plugin's fault
        others |= {
            name: cls.Config for name in catalog.installed if name != self.plugin and (cls := catalog.peek(name))
        }
        for owner, config in others.items():
            both = sorted(mine & names_of(config))
            assert not both, f"{both} belong to {owner} already"

    def test_summary(self) -> None:
        """The docstring's first line is what ``tuner plugins`` shows."""
        summary = (inspect.getdoc(self.cls()) or "").partition("\n")[0]
        assert self.cls().__doc__, "the class has no docstring"
        assert 0 < len(summary) <= 110, f"the docstring's first line should be a short summary: {summary!r}"

    def test_hooks_will_be_called(self) -> None:
        """No misspelt hook, no hook without its mark, no argument that is never passed."""
        Manager().add(self.plugin, self.make())

    def test_state_survives(self) -> None:
        """A fresh instance that takes the state gives the same state; it is tensors and JSON values."""
        state = self.make().state_dict()
        json.dumps({name: value for name, value in state.items() if not isinstance(value, Tensor)})
        restored = self.make()
        restored.load_state_dict(state)
        assert _same(restored.state_dict(), state)


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        for name, value in ours.items()
    )
