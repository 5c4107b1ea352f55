"""The files of a new plugin's package.

The code is that of two plugins which our own tests hold to the contract, under another name: the feature
``tuner.testing.drift`` and the toy family ``tuner.testing.toy``. What is written therefore works.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

SOURCES = {"feature": ("drift", "Drift"), "family": ("toy", "Toy")}
"""Kind to the package in ``tuner.testing`` and the first word of its classes."""
SUMMARY = {"feature": "A feature for every model that tuner trains", "family": "A video model family for tuner"}

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "{summary}"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["difftuner>={release}"]

[project.entry-points."tuner.plugins"]
{name} = "{package}:{Class}Plugin"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.pytest.ini_options]
testpaths = ["tests"]

[tool.ruff]
line-length = 120

[tool.ruff.lint]
extend-select = ["B", "I", "UP"]

[tool.ruff.lint.isort]
known-first-party = ["tuner"]

[tool.mypy]
strict = true
packages = ["{package}"]
plugins = ["pydantic.mypy"]
disallow_untyped_calls = false
disallow_subclassing_any = false
warn_unused_ignores = false

[[tool.mypy.overrides]]
module = ["accelerate.*"]
ignore_missing_imports = true
"""

CONTRACT = {
    "feature": '''\
"""What this plugin is held to: read by its tests, and by ``tuner plugins check {name}``."""

from tuner.testing.contract import PluginContract


class {Class}Contract(PluginContract):
    """Found, light to import, with keys of its own, hooks that are called and a state that survives."""

    plugin = "{name}"
''',
    "family": '''\
"""What this plugin is held to: read by its tests, and by ``tuner plugins check {name}``."""

from pathlib import Path
from typing import Any

from tuner.testing.contract import FamilyContract, PluginContract


class {Class}Contract(PluginContract):
    """Found, light to import, with keys of its own, hooks that are called and a state that survives."""

    plugin = "{name}"


class {Class}FamilyContract(FamilyContract):
    """Describes, loads, encodes, learns and samples as the core relies on."""

    plugin = "{name}"

    def build(self, folder: Path) -> dict[str, Any]:
        """A tiny model with random weights."""
        from {package} import build_{name}

        return {{"pretrained_model_name_or_path": str(build_{name}(folder / "tiny"))}}
''',
}

TESTS = {
    "feature": '''\
"""The plugin keeps tuner's contract."""

from {package}.contract import {Class}Contract


class TestContract({Class}Contract):
    """Every check of it."""
''',
    "family": '''\
"""The plugin and its family keep tuner's contract."""

from {package}.contract import {Class}Contract, {Class}FamilyContract


class TestContract({Class}Contract):
    """Every check of it."""


class TestFamily({Class}FamilyContract):
    """Every check of it."""
''',
}

USE = {
    "feature": """\
Set `{name}_interval` in the config, or on the command line:

```
tuner run --{name}_interval 100
```
""",
    "family": """\
A tiny model with random weights, and a run of it:

```
python -c "import {package}; {package}.build_{name}('tiny-{name}')"
tuner run --model_family {name} --pretrained_model_name_or_path tiny-{name}
```

The network is in `networks.py`; the block driver sees it through `stack.py`. `describe.py` says what the model is,
without torch; `model.py` loads it, encodes for the cache, predicts and renders. Replace them one by one: the tests
say what is still missing.
""",
}

README = """\
# {distribution}

{summary}, as a plugin of tuner (`difftuner`).

## Install

```
pip install {distribution}
tuner plugins show {name}
```

## Use

{use}
## Change it

```
pip install -e .
pytest
tuner plugins check {name}
```

What the hooks are given and what they answer is in tuner's `docs/plugins`: a tutorial, every hook, how plugins fit
together, and which versions of the hooks go with which release.
"""


def write(place: Path, name: str, kind: str) -> list[str]:
    """Write the package of plugin ``name`` to ``place``; the names of its files, in order.

    ``kind`` is ``feature`` or ``family``. All of it is written aside and put in place at once. Where ruff is installed
    it breaks the lines that a long name makes too long. Raises PluginError where there is something already.
    """
    from tuner.errors import PluginError

    if place.exists():
        raise PluginError(
            f"there is a {place} already", remedy="name another folder with --folder; nothing is overwritten"
        )
    texts = files(name, kind)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as aside:
        whole = Path(aside) / place.name
        for file, text in texts.items():
            path = whole / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if find_spec("ruff"):
            _tidy(whole)
        whole.rename(place)
    return sorted(texts)


def _tidy(whole: Path) -> None:
    """Lay out imports and lines anew, by the settings in the package's own ``pyproject.toml``."""
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache", "."]
        subprocess.run(ruff, cwd=whole, check=True, capture_output=True)


def files(name: str, kind: str) -> dict[str, str]:
    """Path in the package to content, for a plugin of this name and kind."""
    from tuner import __version__

    words = {
        "name": name,
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "package": f"tuner_{name}",
        "distribution": f"tuner-{name.replace('_', '-')}",
        "summary": SUMMARY[kind],
        "release": __version__,
    }
    package = words["package"]
    return {
        "pyproject.toml": PYPROJECT.format(**words),
        "README.md": README.format(**words, use=USE[kind].format(**words)),
        **{f"{package}/{file}": text for file, text in _code(words, kind).items()},
        f"{package}/contract.py": CONTRACT[kind].format(**words),
        f"{package}/py.typed": "",
        "tests/test_contract.py": TESTS[kind].format(**words),
    }


def _code(words: dict[str, str], kind: str) -> dict[str, str]:
    """The modules of the plugin that is copied, under the new name."""
    source, title = SOURCES[kind]
    folder = resources.files("tuner.testing") / source
    texts = {each.name: each.read_text(encoding="utf-8") for each in folder.iterdir() if each.name.endswith(".py")}
    return {file: _renamed(text, source, title, words) for file, text in texts.items()}


def _renamed(text: str, source: str, title: str, words: dict[str, str]) -> str:
    text = text.replace(f"tuner.testing.{source}", words["package"])
    text = re.sub(
        r'\A"""A toy model family.*?"""', f'"""{words["Class"]}: a video model family."""', text, flags=re.DOTALL
    )
    text = re.sub(rf"(?<![A-Za-z]){title}", words["Class"], text)
    return re.sub(rf"(?<![A-Za-z]){source}(?![a-z])", words["name"], text)
