"""Every key as a flag, the environment, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.cli.flags import parse_flags, read_settings
from tuner.errors import ConfigError, TunerError

LIBRARY = ["--user_prompt_library", "config/user_prompt_library.json"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"model_family": "wan", "seed": 1, "max_train_steps": 10}))
    return path


def test_flags_in_every_spelling() -> None:
    words = [
        "--learning_rate",
        "5e-5",
        "--enable-group-offload",
        "--seed=3",
        "--prompt=--odd=",
        "--max_grad_norm",
        "-1",
    ]
    assert parse_flags(words, "here") == {
        "learning_rate": "5e-5",
        "enable_group_offload": True,
        "seed": "3",
        "prompt": "--odd=",
        "max_grad_norm": "-1",
    }
    assert parse_flags(["--seed", "1", "--seed=2"], "here") == {"seed": "2"}


def test_a_word_that_is_no_flag_says_what_to_write_instead() -> None:
    with pytest.raises(ConfigError, match=r"'my\.toml' is no flag") as caught:
        parse_flags(["my.toml"], "command line")
    assert "--config my.toml" in str(caught.value)
    with pytest.raises(ConfigError, match="'cat' is no flag"):
        parse_flags(["--validation_prompt", "a", "cat"], "command line")


def test_flag_over_extra_arguments_over_environment_over_file(config: Path) -> None:
    config.write_text(json.dumps({"seed": 1, "feed_forward_chunk_size": 1, "lr_warmup_steps": 1, "max_train_steps": 1}))
    environ = {
        "WAN_FEED_FORWARD_CHUNK_SIZE": "2",
        "TRAINER_EXTRA_ARGS": "--seed 3 --lr-warmup-steps=3 --validation_prompt 'two words'",
    }
    settings = read_settings(config, ["--seed", "4"], environ)
    assert settings == {
        "seed": "4",
        "feed_forward_chunk_size": "2",
        "lr_warmup_steps": "3",
        "max_train_steps": 1,
        "validation_prompt": "two words",
    }
    assert settings.sources == {
        "seed": "command line",
        "feed_forward_chunk_size": "environment variable WAN_FEED_FORWARD_CHUNK_SIZE",
        "lr_warmup_steps": "TRAINER_EXTRA_ARGS",
        "max_train_steps": str(config),
        "validation_prompt": "TRAINER_EXTRA_ARGS",
    }
    environ["TRAINER_EXTRA_ARGS"] = "--feed_forward_chunk_size 5"
    assert read_settings(config, [], environ)["feed_forward_chunk_size"] == "5"


def test_an_alias_as_a_flag_overrides_the_key_in_the_file(config: Path) -> None:
    config.write_text(json.dumps({"validation_steps": 5, "text_embed_batch_size": 2}))
    settings = read_settings(config, ["--validation_step_interval", "7", "--text_encoder_batch_size=3"], {})
    assert settings == {"validation_step_interval": "7", "text_embed_batch_size": "3"}


def test_the_users_flag_for_the_prompt_library(config: Path) -> None:
    assert read_settings(config, LIBRARY, {})["user_prompt_library"] == LIBRARY[1]


def test_unknown_flags_come_together_with_the_nearest_names(config: Path) -> None:
    with pytest.raises(TunerError) as caught:
        read_settings(config, ["--learnin_rate", "1", "--tread_confg={}"], {})
    text = str(caught.value)
    assert (
        "there is no flag --learnin_rate\n  where:   command line\n  nearest: did you mean '--learning_rate'?" in text
    )
    assert "did you mean '--tread_config'?" in text


@pytest.mark.parametrize("extra", ["--seed '3", "word", "--sead 3"])
def test_a_mistake_in_the_extra_arguments_names_them(config: Path, extra: str) -> None:
    with pytest.raises(TunerError) as caught:
        read_settings(config, [], {"TRAINER_EXTRA_ARGS": extra})
    assert "where:   TRAINER_EXTRA_ARGS" in str(caught.value)


def test_the_environment_of_a_plugin_that_is_not_listed_counts_for_nothing(config: Path) -> None:
    environ = {"WAN_FEED_FORWARD_CHUNK_SIZE": "2"}
    found: dict[str, Any] = read_settings(config, [], environ, plugins=["tread"])
    assert "feed_forward_chunk_size" not in found
    assert "feed_forward_chunk_size" in read_settings(config, [], environ, plugins=["tread", "chunked_ff"])
