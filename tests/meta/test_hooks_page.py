"""The hook contract, its page, and its use: every hook documented, called by the core, and implemented by someone."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from tuner.hookspecs import HookSpecs, hook_names
from tuner.manager import hooks_of
from tuner.selection import discover
from tuner.testing import hooks_page
from tuner.testing.toy import ToyPlugin

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins" / "hooks.md").read_text(encoding="utf-8")
HOOKS = hook_names()


def test_the_page_is_the_one_that_is_generated() -> None:
    assert hooks_page.page() == PAGE, "run: python -m tuner.testing.hooks_page > docs/plugins/hooks.md"


def test_every_hook_specification_is_marked() -> None:
    assert set(HOOKS) == {name for name in dir(HookSpecs) if not name.startswith("_")}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_page_has_each_hook_with_its_arguments(hook: str) -> None:
    arguments = list(inspect.signature(getattr(HookSpecs, hook)).parameters)
    shown = re.search(rf"^## {hook}\n.*?```python\n(def {hook}\(.*?)\n```", PAGE, re.DOTALL | re.MULTILINE)
    assert shown
    function = ast.parse(f"{shown[1]}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert [each.arg for each in function.args.args] == arguments


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_says_when_with_what_and_shows_an_example(hook: str) -> None:
    parts = hooks_page.sections(hook)
    assert all(parts.values()), parts
    method = ast.parse(parts["Example"]).body[0]
    assert isinstance(method, ast.FunctionDef)
    assert method.name == hook
    allowed = list(inspect.signature(getattr(HookSpecs, hook)).parameters)
    assert [each.arg for each in method.args.args] == allowed
    assert ast.unparse(method.decorator_list[0]) == "hookimpl"


@pytest.mark.parametrize("hook", HOOKS)
def test_somebody_calls_each_hook(hook: str) -> None:
    """A hook that nobody calls is a promise nobody keeps."""
    files = [*(ROOT / "core/tuner").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert re.search(rf"\b(hook|hooks)\.{hook}\b|(collect|registry|notify|announcer)\(\s*\"{hook}\"", sources)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_implemented(hook: str) -> None:
    """By a plugin of this repository, by the toy family, or by a test's plugin."""
    classes = [ToyPlugin, *(found.load() for found in discover().values())]
    if any(hook in hooks_of(cls) for cls in classes):
        return
    implementations = re.compile(rf"@(tuner\.)?hookimpl[^\n]*\n\s+def {hook}\(")
    tests = [
        path for path in (ROOT / "tests").rglob("*.py") if implementations.search(path.read_text(encoding="utf-8"))
    ]
    assert tests, f"nothing implements {hook}"
