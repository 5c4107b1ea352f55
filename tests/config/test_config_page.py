"""``docs/config.md`` is what the models say."""

from __future__ import annotations

from pathlib import Path

from tuner.config.keys import CoreConfig
from tuner.testing import config_page as table

PAGE = Path(__file__).parents[2] / "docs/config.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == table.page(), "run `python -m tuner.testing.config_page > docs/config.md`"


def test_every_core_key_has_exactly_one_row_that_says_what_it_means() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    core = [row for row in rows if row[1] == "core"]
    assert sorted(row[0].strip("| `") for row in core) == sorted(CoreConfig.model_fields)
    assert all(len(row[4].strip("| ")) > 3 for row in rows)
    assert {"lora", "tread", "video", "text_embeds"} <= {row[1] for row in rows}


def test_nested_keys_and_values_of_plugins_are_on_it() -> None:
    text = PAGE.read_text()
    assert "| `tread_config.routes[].selection_ratio` | tread |" in text
    assert "int8-quanto (plugin `quanto`)" in text
