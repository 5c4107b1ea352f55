"""The page that walks through a family quotes the family's files as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "tuner-ltx"
QUOTES = re.findall(
    r"```(?:python|toml)\n# (\S+)\n(.*?)```",
    (ROOT / "docs" / "plugins" / "new-family.md").read_text(encoding="utf-8"),
    re.DOTALL,
)


@pytest.mark.parametrize(("file", "quote"), QUOTES)
def test_quotes_are_the_files_own(file: str, quote: str) -> None:
    assert quote in (PACKAGE / file).read_text(encoding="utf-8")


def test_files_that_the_page_names_are_quoted() -> None:
    quoted = {file for file, _ in QUOTES}
    assert {"pyproject.toml", *(f"tuner_ltx/{name}.py" for name in ("__init__", "describe", "loading"))} <= quoted
    assert {f"tuner_ltx/{name}.py" for name in ("stack", "encode", "model", "sampling")} <= quoted
