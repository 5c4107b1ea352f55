"""``tuner inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import adapters, options

if TYPE_CHECKING:
    from tuner.builtin.adapter_formats.inspection import Inspection

SHOWN = 10
"""How many keys or modules are listed; --json has all."""


def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter, as .safetensors.")],
    model: adapters.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")] = False,
    debug: options.Debug = False,
) -> None:
    """Say what an adapter file is, which model it fits, and who would not load it."""
    from tuner.builtin.adapter_formats.inspection import inspect as inspected

    found = inspected(file, model)
    if json:
        import json as writer

        print(writer.dumps(found.as_json(), indent=2))
        return
    _print(found)


def _print(found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    console, facts = Console(), Table(show_header=False, title=str(found.path), title_justify="left")
    for name, value in _facts(found).items():
        facts.add_row(name, value)
    console.print(facts)
    for note in found.notes:
        print(f"note: {note}")
    _print_keys(f"do not fit {', '.join(found.nearest)}", found.unread)
    for program, keys in found.refused.items():
        _print_keys(f"would not load in {program}", keys)
    norms = Table(title="largest updates", title_justify="left")
    for heading in ("module", "norm", "root mean square"):
        norms.add_column(heading, justify="left" if heading == "module" else "right")
    for module, (norm, rms) in list(found.norms.items())[:SHOWN]:
        norms.add_row(module, f"{norm:.3e}", f"{rms:.3e}")
    if found.norms:
        console.print(norms)
    entries = Table(title="metadata", title_justify="left", show_header=False)
    for name, text in sorted(found.metadata.items()):
        entries.add_row(name, text if len(text) <= 200 else f"{text[:200]} … ({len(text)} characters)")
    console.print(entries if found.metadata else "no metadata")


def _facts(found: Inspection) -> dict[str, str]:
    fits = ", ".join(found.fits)
    return {
        "format": found.layout,
        "size": f"{found.size / 1e6:.2f} MB, {found.keys} keys, {', '.join(found.dtypes)}",
        "adapters": _counts(found.kinds),
        "rank": _counts(found.ranks) or "none",
        "alpha": _counts(found.alphas) or "none",
        "fits": fits or f"no known model; {found.keys - len(found.unread)} keys fit {', '.join(found.nearest)}",
        "base": found.base or "not said",
        "stage": found.stage or "not said",
    }


def _counts(counted: Mapping[str, int]) -> str:
    if len(counted) == 1:
        (name, count), *_ = counted.items()
        return f"{name} ({count} modules)"
    return ", ".join(f"{name} ({count})" for name, count in counted.items())


def _print_keys(what: str, keys: Mapping[str, str]) -> None:
    if not keys:
        return
    reasons: dict[str, list[str]] = {}
    for key, why in keys.items():
        reasons.setdefault(why, []).append(key)
    print(f"{len(keys)} keys {what}:")
    for why, group in reasons.items():
        more = f" and {len(group) - SHOWN} more" if len(group) > SHOWN else ""
        print(f"  {why}: {', '.join(group[:SHOWN])}{more}")
