"""`docs/migrating.md` has the tables that `tuner import` goes by, and these name keys that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.builtin.datasets.entries import KINDS
from tuner.cli.importing.page import MARKED, TABLES, filled
from tuner.config.owners import KeyIndex
from tuner.selection import Catalog, Wanted

PAGE = Path(__file__).parents[2] / "docs" / "migrating.md"
TABLE_KEYS = {"manifest", "type"}


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {found["name"] for found in MARKED.finditer(text)} == set(TABLES)
    assert filled(text) == text, "run python -m tuner.cli.importing.page docs/migrating.md"


@pytest.mark.parametrize("name", TABLES)
def test_every_key_of_ours_exists(name: str) -> None:
    catalog = Catalog()
    index = KeyIndex(catalog, Wanted.read({}).certain(catalog))
    fields = {key for kind in KINDS.values() for key in kind.model_fields} | TABLE_KEYS
    for theirs, rule in TABLES[name].items():
        for key in rule.ours.split(", ") if rule.ours else ():
            known = key.partition(".")[0] in fields
            assert known or index.find(key) is not None, f"{theirs} -> {key}"
