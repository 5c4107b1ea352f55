"""``tuner config``: the schema knows every key that a config may have, and people can look keys up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuner.cli import app, config_command
from tuner.config.load import plain_data
from tuner.errors import ConfigError

SEED = Path(__file__).parents[1] / "config" / "seed"


def schema(*words: str) -> dict[str, object]:
    result = CliRunner().invoke(app, ["config", "schema", *words])
    assert result.exception is None, result.exception
    found: dict[str, object] = json.loads(result.output)
    return found


def test_the_schema_has_every_key_and_no_other() -> None:
    found = schema()
    properties = found["properties"]
    assert isinstance(properties, dict)
    names = {name for _, model in config_command.models() for name in model.model_fields}
    assert names <= set(properties)
    assert found["additionalProperties"] is False
    assert "learnin_rate" not in properties
    assert all(each.get("description") for name, each in properties.items() if name != "$schema")
    assert set(plain_data(SEED / "config.json")) <= set(properties)


def test_values_are_as_people_write_them() -> None:
    properties = schema()["properties"]
    assert isinstance(properties, dict)
    assert {"type": "string"} in properties["learning_rate"]["anyOf"]  # "1e-4"
    assert properties["loss_type"]["enum"] == ["l2", "huber", "smooth_l1"]
    assert properties["checkpointing_steps"]["deprecated"] is True


def test_datasets_have_a_schema_of_their_own() -> None:
    found = schema("--datasets")
    items = found["items"]
    assert isinstance(items, dict)
    kinds = {each["title"]: each["properties"] for each in items["anyOf"]}
    for entry in plain_data(SEED / "multidatabackend.json"):
        assert set(entry) <= set(kinds[entry.get("dataset_type", "image")]), entry["id"]


def test_keys_are_found_by_a_word() -> None:
    result = CliRunner().invoke(app, ["config", "keys", "huber"], env={"COLUMNS": "160"})
    assert "huber_c" in result.output
    assert "learning_rate" not in result.output
    missed = CliRunner().invoke(app, ["config", "keys", "learnin_rate"])
    assert isinstance(missed.exception, ConfigError)
    assert missed.exception.nearest == "learning_rate"


@pytest.mark.parametrize("words", [["config", "schema"], ["config", "keys"]])
def test_help(words: list[str]) -> None:
    assert CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def test_a_config_may_name_its_schema(tmp_path: Path) -> None:
    from tuner.config.load import raw_config

    path = tmp_path / "config.json"
    path.write_text('{"$schema": "config.schema.json", "seed": 3}')
    assert raw_config(path) == {"seed": 3}
