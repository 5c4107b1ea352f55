"""``docs/datasets.md``: it names every key, and its examples are read as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import json5
import pytest

from tuner.builtin.datasets.entries import KINDS
from tuner.builtin.datasets.reading import read_datasets
from tuner.config.describe import facts, model_in
from tuner.config.keys import CoreConfig

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
BLOCKS = [block.strip() for block in re.findall(r"^ *```json\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)]
WHOLE_LISTS = [block for block in BLOCKS if block.startswith("[")]
ENTRIES = [block for block in BLOCKS if block.startswith("{")]
KEYS = [block for block in BLOCKS if block.startswith('"')]
TEXT: dict[str, Any] = {"id": "text", "dataset_type": "text_embeds", "default": True}
PICTURES: dict[str, Any] = {"id": "pictures", "instance_data_dir": "datasets"}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r'"instance_data_dir": "([^":]+)"', PAGE):
        Path(folder).mkdir(parents=True, exist_ok=True)


def test_every_example_is_of_a_known_shape() -> None:
    assert len(WHOLE_LISTS) + len(ENTRIES) + len(KEYS) == len(BLOCKS)
    assert (len(WHOLE_LISTS), len(KEYS)) == (1, 1)


@pytest.mark.parametrize("block", WHOLE_LISTS)
def test_a_whole_list_is_read_and_has_nothing_to_remark(block: str) -> None:
    assert read_datasets(CoreConfig(data_backend_config=json5.loads(block))).notes == ()


@pytest.mark.parametrize("block", ENTRIES)
def test_entries_are_read_beside_a_dataset_and_captions(block: str) -> None:
    entries = json5.loads(f"[{block}]")
    if not any(entry.get("default") for entry in entries):
        entries.append(TEXT)
    assert read_datasets(CoreConfig(data_backend_config=[PICTURES, *entries])).notes == ()


@pytest.mark.parametrize("block", KEYS)
def test_single_keys_are_read_in_a_dataset(block: str) -> None:
    entry = PICTURES | json5.loads(f"{{{block}}}")
    read_datasets(CoreConfig(data_backend_config=[entry, TEXT]))


def test_every_key_and_every_other_name_of_one_is_named() -> None:
    words = set(re.findall(r"`([\w.]+)`", PAGE)) | set(re.findall(r'"(\w+)":', PAGE))
    models: list[Any] = list(KINDS.values())
    for model in models:
        for name, field in model.model_fields.items():
            assert {name, *facts(field).aliases} <= words, name
            if (inner := model_in(field.annotation)) and inner not in models:
                models.append(inner)
