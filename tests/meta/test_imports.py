"""Who imports whom, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tuner.selection import discover
from tuner.testing.contract import imported_by

ROOT = Path(__file__).parents[2]


def test_the_core_imports_no_plugin_and_no_plugin_another() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_costs_nothing_to_import() -> None:
    assert not imported_by("import tuner.cli", ("torch", "diffusers", "transformers", "pydantic", "pluggy", "numpy"))


def test_the_package_costs_nothing_to_import() -> None:
    assert not imported_by("import tuner", ("torch", "diffusers", "transformers", "pydantic", "pluggy", "numpy"))


@pytest.mark.parametrize(
    "module", ["tuner.hookspecs", "tuner.run", "tuner.spec", "tuner.config.keys", "tuner.assembly"]
)
def test_what_check_needs_is_light(module: str) -> None:
    assert not imported_by(f"import {module}", ("torch", "diffusers", "transformers"))


def test_entry_modules_are_light() -> None:
    """All of them in one interpreter: none may hide behind another's imports."""
    modules = sorted({found.entry_point.module for found in discover().values()})
    assert not imported_by("\n".join(f"import {module}" for module in modules))
