"""Reading config and data files as people write them, and one clear error for each that is malformed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.config.load import load_config, plain_data
from tuner.errors import ConfigError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"seed": 3, "learning_rate": 1e-4}'),
        ("b.json", '\ufeff{\n// a comment\n"seed": 3, /* and another */ "learning_rate": 0.0001,\n}'),
        ("c.toml", "seed = 3\nlearning_rate = 1e-4\n"),
        ("d.yaml", "seed: 3\nlearning_rate: 0.0001\n"),
        ("e.yml", "{seed: 3, learning_rate: 0.0001}"),
    ],
)
def test_every_format_gives_the_same_config(tmp_path: Path, name: str, text: str) -> None:
    assert load_config(written(tmp_path, name, text)) == {"seed": 3, "learning_rate": 1e-4}


def test_without_a_path_the_default_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no config/config\.json") as caught:
        load_config()
    assert "--config" in str(caught.value)
    (tmp_path / "config").mkdir()
    written(tmp_path, "config/config.json", '{"seed": 9}')
    assert load_config() == {"seed": 9}


def test_dashes_are_dropped_and_aliases_become_the_keys_own_name(tmp_path: Path) -> None:
    text = '{"--user_prompt_library": "p.json", "--lr-warmup-steps": 5, "pretrained_transformer_name_or_path": "x"}'
    assert load_config(written(tmp_path, "c.json", text)) == {
        "user_prompt_library": "p.json",
        "lr_warmup_steps": 5,
        "pretrained_transformer_model_name_or_path": "x",
    }


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": 1, "--seed": 2}',
        '{"seed": 1, "seed": 2}',
        '{"seed": 1, /* */ "seed": 2,}',
        '{"validation_steps": 1, "validation_step_interval": 2}',
    ],
)
def test_one_key_twice_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"(seed|validation_step).*twice"):
        load_config(written(tmp_path, "c.json", text))


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.json", '{\n  "seed": 3\n  "learning_rate": 4\n}', "line 3, column 3"),
        ("a.json", '{\n  "seed": [3\n', "line 3"),
        ("a.toml", "seed = 3\nlearning_rate =\n", "line 2, column 16"),
        ("a.yaml", "seed: 3\nlist: [1, 2\nx: 3\n", "line 3"),
        ("a.yaml", "seed: 3\nseed: 4\n", "line 2, column 1"),
    ],
)
def test_a_malformed_file_is_one_error_with_its_place(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ConfigError, match="malformed") as caught:
        plain_data(path)
    assert f"{path}, {place}" in str(caught.value)


def test_what_cannot_be_read_at_all_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        plain_data(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        plain_data(_binary(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot tell the format of 'c\.ini'") as caught:
        plain_data(tmp_path / "c.ini")
    assert ".toml" in str(caught.value)
    with pytest.raises(ConfigError, match="must be one object"):
        load_config(written(tmp_path, "list.json", "[1]"))
    with pytest.raises(ConfigError, match="malformed JSON"):
        load_config(written(tmp_path, "empty.json", ""))


def _binary(folder: Path) -> Path:
    path = folder / "binary.json"
    path.write_bytes(b'{"seed": "\xff\xfe"}')
    return path
