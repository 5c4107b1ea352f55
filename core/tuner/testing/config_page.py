"""Make ``docs/config.md`` from the models: ``python -m tuner.testing.config_page > docs/config.md``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.builtin.datasets.entries import KINDS
from tuner.builtin.sources.registry import SOURCES
from tuner.config.data_keys import DataKeys
from tuner.config.describe import allowed, facts, model_in, shown_default
from tuner.config.keys import CoreConfig
from tuner.config.model_keys import ModelKeys
from tuner.config.owners import CORE, OPEN_VALUES
from tuner.config.train_keys import FlowKeys, TrainKeys
from tuner.config.validation_keys import ValidationKeys
from tuner.plugin import AnyPlugin
from tuner.selection import DISTRIBUTION, Catalog

_HEAD = """# Every config key

Made by `python -m tuner.testing.config_page > docs/config.md`; do not edit it by hand.

A config is one flat object of keys: JSON (comments and trailing commas are fine), TOML or YAML. Every key
is also a flag, `--key value` or `--key=value`, and a bare `--key` means true; a list is written as `1,2` or
as JSON, an object as JSON. A flag stands over `TRAINER_EXTRA_ARGS`, that over the single environment
variables named below, those over the file, and the file over the default. Keys may have leading dashes.
A default of `null` means "not set". `tuner config keys WORD` looks keys up. `tuner config schema` prints a JSON
schema for editors (`--datasets` for dataset files): name it in a config as `"$schema": "config.schema.json"`.
"""
_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Model", ModelKeys),
    ("Data", DataKeys),
    ("Training", TrainKeys),
    ("Noise and loss", FlowKeys),
    ("Validation", ValidationKeys),
)


def page() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    plugins = _plugins()
    yield "## Core keys"
    seen: set[str] = set()
    for title, model in _SECTIONS:
        yield from _section(title, CORE, model, model.__doc__, plugins)
        seen.update(model.model_fields)
    rest = [key for key in CoreConfig.model_fields if key not in seen]
    yield from _section(
        "Plugins", CORE, CoreConfig, "Which plugins are loaded: see `docs/plugins/README.md`.", plugins, rest
    )
    yield "\n## Plugin keys"
    for name, cls in plugins.items():
        if cls.Config.model_fields:
            yield from _section(f"`{name}`", name, cls.Config, _summary(cls), plugins)
    yield "\n## Dataset keys\n\nWhat one entry of `data_backend_config` may say, by its `dataset_type`."
    for kind, model in KINDS.items():
        yield from _section(f"`{kind}`", kind, model, _summary(model), plugins)
    yield "\n## Source keys\n\nWhat a dataset may say beside these, by its `type`: see `docs/sources.md`."
    for kind, source in SOURCES.items():
        if source.keys.model_fields:
            yield from _section(f"`{kind}`", f"type {kind}", source.keys, _summary(source.keys), plugins)


def _plugins() -> dict[str, type[AnyPlugin]]:
    """The plugins that come with this repository: the page must not depend on what else is installed."""
    catalog = Catalog()
    return {name: catalog.load(name) for name, found in catalog.installed.items() if found.package == DISTRIBUTION}


def _section(
    title: str,
    owner: str,
    model: type[BaseModel],
    about: str | None,
    plugins: Mapping[str, type[AnyPlugin]],
    only: Collection[str] | None = None,
) -> Iterator[str]:
    yield f"\n### {title}\n\n{about}\n"
    yield "| key | owner | values | default | meaning |\n|---|---|---|---|---|"
    for key, field, values in _keys(model, "", plugins):
        if only is None or key in only:
            cells = (f"`{key}`", owner, values, _default(key, field), _meaning(field))
            yield f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _keys(
    model: type[BaseModel], prefix: str, plugins: Mapping[str, type[AnyPlugin]]
) -> Iterator[tuple[str, FieldInfo, str]]:
    """Each key of a model with its field and its values in words, those of nested objects below their own."""
    for key, field in model.model_fields.items():
        inner = model_in(field.annotation)
        yield prefix + key, field, "object, see below" if inner else _values(prefix + key, field, plugins)
        if inner:
            many = "[]" if "list[" in str(field.annotation) or "tuple[" in str(field.annotation) else ""
            yield from _keys(inner, f"{prefix}{key}{many}.", plugins)


def _values(key: str, field: FieldInfo, plugins: Mapping[str, type[AnyPlugin]]) -> str:
    if key not in OPEN_VALUES:
        return allowed(field)
    served = [
        f"{value} (plugin `{name}`)" for name, cls in plugins.items() for value in sorted(cls.values.get(key, ()))
    ]
    return ", ".join([*sorted(OPEN_VALUES[key]), *served])


def _default(key: str, field: FieldInfo) -> str:
    if not field.is_required():
        return f"`{shown_default(field)}`"
    if key in CoreConfig.model_fields:
        return "the core key"
    return "see meaning" if key.startswith("cache_dir") else "required"


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _meaning(field: FieldInfo) -> str:
    known = facts(field)
    parts = [field.description or ""]
    if known.pending:
        parts.append(f"**No effect yet**: {known.pending}.")
    if known.aliases:
        parts.append(f"Also {', '.join(f'`{alias}`' for alias in known.aliases)}.")
    if known.environment:
        parts.append(f"Environment: `{known.environment}`.")
    return " ".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(page(), end="")
