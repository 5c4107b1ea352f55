"""Distributions for tests: plugins that Python finds without being installed.

A folder with a package and its ``.dist-info`` on ``sys.path`` is all that entry points need, in this
process (:func:`importable`) or in a subprocess (:func:`environment`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

GROUP = "tuner.plugins"


def write_distribution(
    folder: Path,
    name: str,
    plugins: Mapping[str, str],
    *,
    modules: Mapping[str, str] | None = None,
    version: str = "0.1.0",
) -> Path:
    """Write a distribution ``name`` into ``folder`` that offers ``plugins`` (name -> ``module:Class``).

    ``modules`` are module names and their source. Returns ``folder``. Raises FileExistsError when it has that
    distribution already.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    lines = [f"[{GROUP}]", *(f"{plugin} = {target}" for plugin, target in plugins.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for module, source in (modules or {}).items():
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    return folder


def toy_distribution(folder: Path) -> Path:
    """Write a distribution that offers the toy family as the plugin ``toy`` into ``folder``; returns ``folder``."""
    return write_distribution(folder, "tuner-toy", {"toy": "tuner.testing.toy:ToyPlugin"})


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """The environment of a subprocess that finds the distributions in ``folders``, with ``variables`` set."""
    paths = [str(folder.resolve()) for folder in folders]
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """The distributions in ``folders`` found in this process and in those it starts, until the block ends."""
    before, variable, modules = list(sys.path), os.environ.get("PYTHONPATH"), set(sys.modules)
    roots = [str(folder.resolve()) for folder in folders]
    os.environ.update(environment(*folders))
    sys.path[:0] = roots
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        os.environ.pop("PYTHONPATH")
        if variable is not None:
            os.environ["PYTHONPATH"] = variable
        for name in set(sys.modules) - modules:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if origin.startswith(tuple(root + os.sep for root in roots)):
                del sys.modules[name]
        importlib.invalidate_caches()
