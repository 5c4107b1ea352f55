"""``tuner config``: every key, and a JSON schema of configs for editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli import options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

app = typer.Typer(help="Every config key, and a JSON schema for editors.", add_completion=False, rich_markup_mode=None)
DRAFT = "https://json-schema.org/draft/2020-12/schema"
WRITTEN: dict[str, Any] = {"type": "string"}
"""A number or a flag may be written as text: ``"1e-4"``, ``"true"``."""


@app.command("schema")
def schema(
    datasets: Annotated[
        bool, typer.Option("--datasets", help="Of dataset files (data_backend_config) instead of configs.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Print a JSON schema of configs with the keys of every installed plugin."""
    import json

    print(json.dumps(of_datasets() if datasets else of_configs(), indent=2))


@app.command("keys")
def keys(
    word: Annotated[str | None, typer.Argument(help="Only keys whose name or description has this word.")] = None,
    debug: options.Debug = False,
) -> None:
    """List keys with their owner, default and meaning."""
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "owner", "default", "what it does")
    for owner, model in models():
        for name, field in model.model_fields.items():
            said = field.description or ""
            if word is None or word.lower() in f"{name} {said}".lower():
                default = field.get_default(call_default_factory=True)
                table.add_row(name, owner, "" if default is None else str(default), said)
    if not table.row_count:
        from tuner.errors import ConfigError, nearest

        names = [name for _, model in models() for name in model.model_fields]
        raise ConfigError(f"no key has {word!r} in its name or description", nearest=nearest(str(word), names))
    Console().print(table)


def models() -> Iterator[tuple[str, type[BaseModel]]]:
    """(owner, its keys): the core, and every installed plugin that can be imported."""
    from tuner.config.keys import CoreConfig
    from tuner.selection import Catalog

    yield "core", CoreConfig
    catalog = Catalog()
    for name in catalog.installed:
        if (cls := catalog.peek(name)) is not None:
            yield name, cls.Config


def of_configs() -> dict[str, Any]:
    """The schema of a flat config."""
    properties: dict[str, Any] = {"$schema": {"type": "string"}}
    definitions: dict[str, Any] = {}
    for owner, model in models():
        found, inner = _of(model)
        definitions |= inner
        for name, each in found.items():
            properties[name] = each | {"description": f"{each.get('description', '')} ({owner})".strip()}
    return _object("A tuner config", properties, definitions)


def of_datasets() -> dict[str, Any]:
    """The schema of a list of datasets."""
    from tuner.builtin.datasets.entries import KINDS
    from tuner.builtin.sources.registry import SOURCES

    definitions: dict[str, Any] = {}
    kinds = []
    sources: dict[str, Any] = {}
    for source in SOURCES.values():
        found, inner = _of(source.keys)
        sources, definitions = sources | found, definitions | inner
    for kind, model in KINDS.items():
        found, inner = _of(model)
        definitions |= inner
        kinds.append(_object(kind, {**sources, **found, "dataset_type": {"enum": [kind]}}, {}))
    return {
        "$schema": DRAFT,
        "title": "Datasets of tuner",
        "type": "array",
        "items": {"anyOf": kinds},
        "$defs": definitions,
    }


def _of(model: type[BaseModel]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(properties, definitions) of a model; other names of its keys are properties too."""
    from tuner.config.describe import facts

    made = model.model_json_schema()
    properties: dict[str, Any] = {}
    for name, each in made.get("properties", {}).items():
        plain = {key: value for key, value in each.items() if key not in ("tuner", "title")}
        properties[name] = _as_written(plain)
        field = model.model_fields.get(name)
        for other in facts(field).aliases if field is not None else ():
            properties[other] = {**properties[name], "deprecated": True, "description": f"Another name of {name}."}
    return properties, made.get("$defs", {})


def _as_written(each: dict[str, Any]) -> dict[str, Any]:
    """A property that also takes its value as text, where that is no text already."""
    about = {key: each[key] for key in ("description", "default") if key in each}
    kind = {key: value for key, value in each.items() if key not in about}
    if not kind or kind.get("type") == "string" or "enum" in kind:
        return each
    branches = kind["anyOf"] if set(kind) == {"anyOf"} else [kind]
    return about | {"anyOf": branches if WRITTEN in branches else [*branches, WRITTEN]}


def _object(title: str, properties: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {"title": title, "type": "object", "properties": properties, "additionalProperties": False}
    return {"$schema": DRAFT, **about, "$defs": definitions} if definitions or title.startswith("A ") else about
