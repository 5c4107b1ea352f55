"""`tuner plugins check` runs the contract on what is installed, and says what is wrong with which plugin."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tuner import API_VERSION
from tuner.cli import app
from tuner.errors import PluginError
from tuner.testing.contract import FamilyContract, PluginContract
from tuner.testing.plugin_env import importable, write_distribution

WRONG = """
import numpy
from tuner import Plugin, PluginConfig, key

class Config(PluginConfig):
    speed: int = key(1, "How fast.")

class Wrong(Plugin[Config]):
    Config = Config
"""
FAMILY = """
from tuner.testing.toy import ToyConfig, ToyPlugin

class Mine(ToyPlugin):
    "A family whose package does not say how it is tried."
"""


def checked(*names: str) -> Result:
    return CliRunner().invoke(app, ["plugins", "check", *names])


def checks(*contracts: type) -> int:
    return sum(name.startswith("test_") for contract in contracts for name in dir(contract))


def test_plugins_of_ours_keep_it_the_family_too() -> None:
    result = checked("tread", "lora", "wan")
    assert result.exit_code == 0, result.output
    plain, family = checks(PluginContract), checks(PluginContract, FamilyContract)
    rows = [line.split()[:4] for line in result.stdout.splitlines()]
    assert rows[:3] == [
        [name, str(count), "of", str(count)] for name, count in (("tread", plain), ("lora", plain), ("wan", family))
    ]
    assert result.stdout.splitlines()[-1] == "3 of 3 plugins keep the contract"


def test_what_is_wrong_is_said_check_by_check(tmp_path: Path) -> None:
    plugins = {"wrong": "wrong_plugin:Wrong", "mine": "my_family:Mine", "gone": "nowhere:Gone"}
    modules = {"wrong_plugin": WRONG, "my_family": FAMILY}
    with importable(write_distribution(tmp_path, "several", plugins, modules=modules)):
        result = checked("wrong", "mine", "gone")
    assert result.exit_code == 1
    said = result.output
    assert "import_costs_nothing: importing wrong_plugin imports numpy: move them into the hook bodies" in said
    assert "keys_are_its_own: prefix with 'wrong_' or list in legacy_keys: ['speed']" in said
    assert "summary: the class has no docstring" in said
    assert "asked is: The docstring's first line is what ``tuner plugins`` shows." in said
    assert "my_family.contract has no FamilyContract of 'mine'" in said
    assert "plugin 'gone' failed to import: ModuleNotFoundError" in said
    assert said.splitlines()[-1] == "0 of 3 plugins keep the contract"


def test_a_plugin_that_there_is_not_is_named() -> None:
    result = checked("tred")
    assert isinstance(result.exception, PluginError)
    assert "tread" in str(result.exception)


@pytest.mark.parametrize("kind", [PluginContract, FamilyContract])
def test_every_check_says_what_it_asks(kind: type) -> None:
    assert all(getattr(kind, name).__doc__ for name in dir(kind) if name.startswith("test_"))


def test_the_version_of_the_hooks_is_shown() -> None:
    assert f"version of the hooks: {API_VERSION}" in CliRunner().invoke(app, ["plugins"]).stdout.splitlines()
    shown = CliRunner().invoke(app, ["plugins", "show", "tread"]).stdout.splitlines()
    assert f"  api:       {API_VERSION}" in shown
