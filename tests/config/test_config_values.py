"""Values as people write them become what the keys hold, and others are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tuner.config.faults import build
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, TunerError
from tuner.plugin import PluginConfig, key


class Inner(BaseModel):
    depth: int


class Values(PluginConfig):
    names: list[str] = key([], "Names.")
    inner: Inner | None = key(None, "An object.")
    table: dict[str, Any] = key({}, "A table.")
    maybe: float | None = key(None, "Perhaps a number.")
    words: str | None = key(None, "Perhaps words.")
    pair: tuple[int, int] = key((1, 2), "Two numbers.")
    either: Path | list[dict[str, Any]] | None = key(None, "A path or a list.")


@pytest.mark.parametrize(
    ("name", "written", "held"),
    [
        ("vae_enable_tiling", "true", True),
        ("vae_enable_slicing", "FALSE", False),
        ("gradient_checkpointing", 0, False),
        ("max_train_steps", "1e6", 1_000_000),
        ("max_train_steps", 1e3, 1000),
        ("seed", " 7 ", 7),
        ("learning_rate", "5e-5", 5e-5),
        ("learning_rate", 1, 1.0),
        ("flow_custom_timesteps", 9, [9.0]),
        ("flow_custom_timesteps", "9", [9.0]),
        ("flow_custom_timesteps", "9, 10", [9.0, 10.0]),
        ("flow_custom_timesteps", "[9, 10]", [9.0, 10.0]),
        ("optimizer_config", '{"weight_decay": 0.1,}', {"weight_decay": 0.1}),
        ("validation_resolution", 480, "480"),
        ("validation_prompt", '{"a brace", says she', '{"a brace", says she'),
        ("validation_prompt", "[1, 2]", "[1, 2]"),
        ("validation_prompt", "none", "none"),
        ("pretrained_transformer_subfolder", "none", "none"),
        ("mixed_precision", False, "no"),
        ("flow_schedule_shift", "none", None),
        ("flow_schedule_shift", None, None),
    ],
)
def test_core_keys_take_values_as_people_write_them(name: str, written: Any, held: Any) -> None:
    found = getattr(build(CoreConfig, {name: written}), name)
    assert found == held
    assert type(found) is type(held)


@pytest.mark.parametrize(
    ("name", "written", "held"),
    [
        ("names", "to_q,to_k", ["to_q", "to_k"]),
        ("names", ["a, b"], ["a, b"]),
        ("names", 3, ["3"]),
        ("inner", '{"depth": "2"}', Inner(depth=2)),
        ("table", '{"a": "1e3"}', {"a": "1e3"}),
        ("maybe", "2", 2.0),
        ("words", "[not json", "[not json"),
        ("pair", "3,4", (3, 4)),
        ("either", "a/b.json", Path("a/b.json")),
        ("either", '[{"id": 1}]', [{"id": 1}]),
    ],
)
def test_plugin_keys_take_them_too(name: str, written: Any, held: Any) -> None:
    assert getattr(build(Values, {name: written}), name) == held


@pytest.mark.parametrize(
    ("name", "written", "allowed"),
    [
        ("max_train_steps", "many", "whole number, ≥ 0"),
        ("max_train_steps", 1.5, "whole number, ≥ 0"),
        ("max_train_steps", True, "whole number, ≥ 0"),
        ("learning_rate", True, "number, > 0"),
        ("learning_rate", 0, "number, > 0"),
        ("learning_rate", "nan", "number, > 0"),
        ("learning_rate", "inf", "number, > 0"),
        ("gradient_checkpointing", "perhaps", "true, false"),
        ("validation_prompt", True, "text"),
        ("flow_custom_timesteps", "nine", "number"),
        ("optimizer_config", "{broken", "object"),
        ("model_type", "lara", "lora, full"),
        ("data_backend_config", 3, "path or list of object"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_what_is_allowed(name: str, written: Any, allowed: str) -> None:
    with pytest.raises(TunerError) as caught:
        build(CoreConfig, {name: written}, where="some.json")
    text = str(caught.value)
    assert text.startswith(name)
    assert " cannot be " in text
    assert "where:   some.json" in text
    assert f"allowed: {allowed}" in text


def test_json_that_is_malformed_says_where() -> None:
    with pytest.raises(TunerError) as caught:
        build(CoreConfig, {"optimizer_config": '{"weight_decay" 0.1}'})
    assert "mend the JSON: 1 Unexpected" in str(caught.value)
    assert "column 17" in str(caught.value)


def test_config_models_are_frozen_and_take_no_unknown_key() -> None:
    config = build(CoreConfig, {"seed": 1})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 2
    with pytest.raises(TunerError, match="there is no key 'sead'") as caught:
        build(CoreConfig, {"sead": 1})
    assert "did you mean 'seed'?" in str(caught.value)


def test_a_word_beside_true_and_false_has_a_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"allowed: true, false, selective, offload\n.*did you mean 'selective'"):
        build(CoreConfig, {"gradient_checkpointing": "selectiv"})
