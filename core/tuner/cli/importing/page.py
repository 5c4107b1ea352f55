"""Keep the tables of ``docs/migrating.md``: ``python -m tuner.cli.importing.page docs/migrating.md``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from tuner.cli.importing import ai_toolkit, diffusion_pipe, diffusion_pipe_data, musubi, musubi_data, simpletuner
from tuner.cli.importing.draft import Rule
from tuner.files import atomic_write_text

TABLES: Mapping[str, Mapping[str, Rule]] = {
    "musubi-tuner": musubi.TABLE,
    "musubi-tuner datasets": musubi_data.TABLE,
    "ai-toolkit": ai_toolkit.TABLE,
    "ai-toolkit datasets": ai_toolkit.DATA,
    "diffusion-pipe": diffusion_pipe.TABLE,
    "diffusion-pipe datasets": diffusion_pipe_data.TABLE,
    "simpletuner": simpletuner.TABLE,
    "simpletuner datasets": simpletuner.DATA,
}
MARKED = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """``page`` with each marked table as the rules have it."""
    return MARKED.sub(lambda found: found[1] + _table(TABLES[found["name"]]) + found[3], page)


def _table(rules: Mapping[str, Rule]) -> str:
    lines = ["| there | here | |", "|---|---|---|"]
    for key, rule in rules.items():
        ours = ", ".join(f"`{name}`" for name in rule.ours.split(", ")) if rule.ours else "–"
        values = ", ".join(f"{there} → {here}" for there, here in (rule.values or {}).items() if there != here)
        why = "; ".join(part for part in (rule.why, values) if part).replace("|", "\\|")
        lines.append(f"| `{key}` | {ours} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    atomic_write_text(path, filled(path.read_text(encoding="utf-8")))
