"""Which tool wrote the files, by what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, nearest

if TYPE_CHECKING:
    from tuner.cli.importing.draft import Draft
    from tuner.cli.importing.read import Read

TOOLS = {
    "musubi-tuner": "musubi",
    "ai-toolkit": "ai_toolkit",
    "diffusion-pipe": "diffusion_pipe",
    "simpletuner": "simpletuner",
}
"""Name for ``--from`` -> the module that translates."""


def tool_of(files: list[Read], told: str | None) -> str:
    """The tool that ``files`` are for, or the one that was ``told``. Raises ConfigError."""
    if told is not None:
        if told not in TOOLS:
            raise ConfigError(f"there is no tool {told!r}", where="--from", allowed=TOOLS, nearest=nearest(told, TOOLS))
        return told
    found = [(file, _tool(file)) for file in files]
    strange = next((file for file, tool in found if tool is None), None)
    if strange is not None:
        raise ConfigError(
            "this is a config of no known tool",
            where=strange.path,
            allowed=TOOLS,
            remedy="say which with --from, if it is one of these",
        )
    tools = {tool for _, tool in found}
    if len(tools) > 1:
        named = ", ".join(f"{file.path} ({tool})" for file, tool in found)
        raise ConfigError(f"the files are of several tools: {named}", remedy="import them one by one, or say --from")
    return str(tools.pop())


def translated(tool: str, files: list[Read]) -> Draft:
    """What a tool's files become. Raises ConfigError, also for values that no config of the tool has."""
    translate: Callable[[list[Read]], Draft] = import_module(f"tuner.cli.importing.{TOOLS[tool]}").translate
    try:
        return translate(files)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this cannot be understood as a config of {tool}: {type(error).__name__}: {error}",
            where=", ".join(str(file.path) for file in files),
            remedy="look whether a key has a value of another kind than there; --debug shows where",
        ) from error


def _tool(file: Read) -> str | None:
    data = file.data
    if file.kind == "environment":
        return "simpletuner"
    if isinstance(data, list):
        listed = data and all(isinstance(each, Mapping) and "id" in each for each in data)
        return "simpletuner" if listed else None
    if not isinstance(data, Mapping):
        return None
    return _by_keys({str(key).lstrip("-").replace("-", "_"): value for key, value in data.items()})


def _by_keys(data: Mapping[str, Any]) -> str | None:
    config = data.get("config")
    if isinstance(config, Mapping) and "process" in config:
        return "ai-toolkit"
    if isinstance(data.get("directory"), list) or (isinstance(data.get("model"), Mapping) and "dataset" in data):
        return "diffusion-pipe"
    datasets = data.get("datasets")
    if isinstance(datasets, list) or {"dit", "network_module", "dataset_config"} & data.keys():
        return "musubi-tuner"
    if {"model_family", "data_backend_config", "model_flavour", "lora_type", "tracker_project_name"} & data.keys():
        return "simpletuner"
    library = bool(data) and all(isinstance(value, str) for value in data.values())
    return "simpletuner" if library or "algo" in data else None
