"""Make ``docs/config.md`` from the models: ``python -m tuner.config.table > docs/config.md``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.config.data_keys import DataKeys
from tuner.config.describe import allowed, facts, model_in, shown_default
from tuner.config.keys import CoreConfig
from tuner.config.model_keys import ModelKeys
from tuner.config.pending_keys import PendingKeys
from tuner.config.train_keys import FlowKeys, TrainKeys
from tuner.config.validation_keys import ValidationKeys
from tuner.selection import DISTRIBUTION, Catalog

_HEAD = """# Every config key

Made by `python -m tuner.config.table > docs/config.md`; do not edit it by hand.

A config is one flat object of keys: JSON (comments and trailing commas are fine), TOML or YAML. Every key
is also a flag, `--key value` or `--key=value`, and a bare `--key` means true; a list is written as `1,2` or
as JSON, an object as JSON. A flag stands over `TRAINER_EXTRA_ARGS`, that over the single environment
variables named below, those over the file, and the file over the default. Keys may have leading dashes.
A default of `null` means "not set".
"""
_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Model", ModelKeys),
    ("Data", DataKeys),
    ("Training", TrainKeys),
    ("Noise and loss", FlowKeys),
    ("Validation", ValidationKeys),
    ("Without effect yet", PendingKeys),
)
_DATASETS = "tuner.data.datasets"


def page() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "# Core keys"
    seen: set[str] = set()
    for title, model in _SECTIONS:
        yield from _section(title, model, model.__doc__)
        seen.update(model.model_fields)
    rest = [key for key in CoreConfig.model_fields if key not in seen]
    yield from _section("Plugins", CoreConfig, "Which plugins are loaded: see `docs/plugins.md`.", rest)
    yield "\n# Plugin keys"
    catalog = Catalog()
    for name, found in catalog.installed.items():
        # Only what comes with this repository: the page must not depend on what else is installed.
        if found.package == DISTRIBUTION:
            cls = catalog.load(name)
            if cls.Config.model_fields:
                yield from _section(f"`{name}`", cls.Config, (cls.__doc__ or "").strip().partition("\n")[0])
    yield "\n# Dataset keys\n\nWhat one entry of `data_backend_config` may say."
    for model in _dataset_models():
        yield from _section(f"`{model.__name__}`", model, (model.__doc__ or "").strip().partition("\n")[0])


def _section(title: str, model: type[BaseModel], about: str | None, only: list[str] | None = None) -> Iterator[str]:
    yield f"\n## {title}\n\n{about}\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    yield from _rows(model, "", only)


def _rows(model: type[BaseModel], prefix: str, only: list[str] | None = None) -> Iterator[str]:
    for key, field in model.model_fields.items():
        if only is not None and key not in only:
            continue
        inner = model_in(field.annotation)
        values = "see below" if inner else allowed(field)
        yield f"| `{prefix}{key}` | {_cell(values)} | {_default(field)} | {_cell(_meaning(field))} |"
        if inner:
            many = "[]" if str(field.annotation).count("list[") or str(field.annotation).count("tuple[") else ""
            yield from _rows(inner, f"{prefix}{key}{many}.")


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_cell(shown_default(field))}`"


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


def _dataset_models() -> list[type[BaseModel]]:
    module = import_module(_DATASETS)
    mine = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == _DATASETS]
    return [each for each in mine if issubclass(each, BaseModel) and "id" in each.model_fields]


if __name__ == "__main__":
    print(page(), end="")
