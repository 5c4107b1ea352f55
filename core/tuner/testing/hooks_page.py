"""``docs/plugins/hooks.md``, from the hook contract: ``python -m tuner.testing.hooks_page > docs/plugins/hooks.md``."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from tuner.hookspecs import REQUIRED, SINGLE, HookSpecs, hook_names

SECTIONS = ("Called", "Arguments", "Returns")
EXAMPLE = "Example::"
HEAD = """# Hooks

<!-- Made by `python -m tuner.testing.hooks_page > docs/plugins/hooks.md`; a test compares. -->

A plugin is a subclass of `tuner.Plugin`. Each hook it implements is a method of that class, marked with
`@tuner.hookimpl`, with the argument names below. A hook may leave out arguments it does not need. A hook name
or an argument name that is not below is an error before anything is loaded.

`run` is a `tuner.run.Run`: the frozen config, the loaded plugins, the step, the device, the log, and
`run.rng(purpose, position)` for random numbers. How many plugins may answer:

- **one**: exactly one loaded plugin must answer; two are an error that names both.
- **at most one**: none need answer; two are an error.
- **all**: every answer counts.

A hook may also wrap the others of its name, as in pluggy: `@tuner.hookimpl(wrapper=True)`. Wrappers do not
count as answers.
"""


def signature(name: str) -> str:
    """The hook as a plugin would write its first line: names of arguments and the kind of answer."""
    spec: Any = getattr(HookSpecs, name)
    parameters = list(inspect.signature(spec).parameters.values())
    arguments = ", ".join(str(each).replace("'", "") for each in parameters)
    return f"def {name}({arguments}) -> {inspect.signature(spec).return_annotation}"


def sections(name: str) -> dict[str, str]:
    """Summary, Called, Arguments, Returns and Example of a hook's docstring. Raises KeyError when one is missing."""
    text = inspect.getdoc(getattr(HookSpecs, name)) or ""
    prose, _, example = text.partition(EXAMPLE)
    parts = re.split(rf"^({'|'.join(SECTIONS)}): ", prose, flags=re.MULTILINE)
    found = {"Summary": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True)), "Example": example}
    return {label: found[label].strip("\n ") for label in ("Summary", *SECTIONS)} | {
        "Example": textwrap.dedent(found["Example"]).strip()
    }


def answers(name: str) -> str:
    """How many plugins may answer a hook."""
    return "one" if name in REQUIRED else "at most one" if name in SINGLE else "all"


def _table() -> str:
    rows = [f"| [`{name}`](#{name}) | {answers(name)} | {_plain(sections(name)['Summary'])} |" for name in hook_names()]
    return "\n".join(["| hook | answers | for |", "|---|---|---|", *rows])


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _chapter(name: str) -> str:
    parts = sections(name)
    lines = [f"## {name}", "", _plain(parts["Summary"]), "", "```python", signature(name), "```", ""]
    lines += [f"- **{label}**: {_plain(parts[label])}" for label in SECTIONS]
    return "\n".join([*lines, "", "```python", parts["Example"], "```"])


def page() -> str:
    """The whole page."""
    return "\n\n".join([HEAD.strip(), _table(), *(_chapter(name) for name in hook_names())]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
