"""Writing what was translated: never over something, unless asked, and then with a copy beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.cli.importing.draft import Draft
from tuner.errors import ConfigError
from tuner.files import atomic_write_text

CONFIG, LIST, LIBRARY = "config.json", "multidatabackend.json", "user_prompt_library.json"


def write(draft: Draft, folder: Path, *, force: bool) -> list[str]:
    """Write config, list of datasets and prompts to ``folder``; a line for each file.

    Raises ConfigError when one is there and ``force`` is not given; with it, that file is renamed first.
    """
    settings = dict(draft.settings)
    contents: dict[str, Any] = {}
    if draft.entries:
        settings["data_backend_config"] = str(folder / LIST)
        contents[LIST] = draft.entries
    if draft.prompts:
        settings["user_prompt_library"] = str(folder / LIBRARY)
        contents[LIBRARY] = draft.prompts
    contents = {CONFIG: settings, **contents}
    there = [str(folder / name) for name in contents if (folder / name).exists()]
    if there and not force:
        raise ConfigError(
            "nothing is overwritten",
            where=", ".join(there),
            remedy="name another folder with --output, or say --force: what is there is kept under another name",
        )
    return [_put(folder / name, content) for name, content in contents.items()]


def _put(path: Path, content: Mapping[str, Any] | list[Any]) -> str:
    line = f"wrote {path}"
    if path.exists():
        line += f"; what was there is {_aside(path).name}"
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return line


def _aside(path: Path) -> Path:
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    copy = path.with_name(f"{path.name}.{stamp}.bak")
    while copy.exists():
        number += 1
        copy = path.with_name(f"{path.name}.{stamp}-{number}.bak")
    path.rename(copy)
    return copy
