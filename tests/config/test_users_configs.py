"""Config files that people have, and the examples we ship, pass as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import json5
import pytest

from tuner.assembly import Assembly, assemble
from tuner.builtin.datasets.entries import KINDS
from tuner.cli.flags import read_settings
from tuner.config.load import plain_data

SEED = Path(__file__).parent / "seed"
EXAMPLES = Path(__file__).parents[2] / "config"


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the prompt library where the users' flag and our example expect it."""
    (tmp_path / "config").mkdir()
    shutil.copy(SEED / "user_prompt_library.json", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seed_config(*fragments: str) -> dict[str, Any]:
    """The users' config with the keys of fragments added; some of those are bare members of an object."""
    config: dict[str, Any] = json.loads((SEED / "config.json").read_text())
    for name in fragments:
        text = (SEED / name).read_text().strip().rstrip(",")
        config |= json5.loads(text if text.startswith("{") else f"{{{text}}}")
    return config


def assembled(folder: Path, config: dict[str, Any]) -> Assembly:
    path = folder / "config.json"
    path.write_text(json.dumps(config, ensure_ascii=False))
    return assemble(read_settings(path, [], {}))


def test_the_users_config_passes_unchanged_and_every_key_has_an_owner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = seed_config()
    assembly = assembled(tmp_path, config)
    assert "wan" in assembly.plugins
    assert assembly.notes == ()
    assert assembly.explicit == set(config)
    assert "'sageattention' needs a CUDA device: the exact kernel is used here" in caplog.text
    assert any("wandb" in warning for warning in assembly.warnings)
    core = assembly.core
    sampling, hub = assembly.plugins["sampling"].config, assembly.plugins["hub"].config
    assert (hub.push_to_hub, core.max_grad_norm, sampling.validation_guidance_skip_layers) == (True, 0.01, [9])
    assert core.attention_mechanism == "sageattention"
    assert assembly.plugins["lora"].config.lora_rank == 16


@pytest.mark.parametrize(
    ("fragment", "plugin", "key"),
    [
        ("tread-simple.fragment.json", "tread", "tread_config"),
        ("tread-progressive.fragment.json", "tread", "tread_config"),
        ("prompt-library-flag.fragment.txt", None, "user_prompt_library"),
        ("custom-finetuned.fragment.json", None, "pretrained_transformer_subfolder"),
        ("validation-preview.fragment.json", None, "validation_preview"),
    ],
)
def test_each_fragment_passes_with_the_users_config(
    tmp_path: Path, fragment: str, plugin: str | None, key: str
) -> None:
    assembly = assembled(tmp_path, seed_config(fragment))
    assert key in assembly.explicit
    assert plugin is None or plugin in assembly.plugins


def test_the_quantised_fragment_loads_the_plugin_that_serves_it(tmp_path: Path) -> None:
    assembly = assembled(tmp_path, seed_config("quantised.fragment.json"))
    assert assembly.core.base_model_precision == "int8-quanto"
    assert assembly.reasons["quanto"] == "serves base_model_precision: int8-quanto"


def test_the_users_routes_are_set_aside_when_tread_is_left_out(tmp_path: Path) -> None:
    config = seed_config("tread-simple.fragment.json") | {"without": ["tread"]}
    assembly = assembled(tmp_path, config)
    assert "tread" not in assembly.plugins
    assert assembly.notes == ("set aside: tread_config (plugin 'tread' is left out)",)


def test_the_example_config_passes() -> None:
    assembly = assemble(read_settings(EXAMPLES / "config.json.example", [], {}))
    assert {"wan", "tread", "lora"} <= set(assembly.plugins)
    assert assembly.notes == ()
    assert assembly.warnings == (), "an example must not use keys without effect"
    assert len(assembly.plugins["tread"].config.tread_config.routes) == 1


def test_the_example_files_that_it_names_exist_as_examples() -> None:
    config = plain_data(EXAMPLES / "config.json.example")
    for key in ("data_backend_config", "user_prompt_library"):
        assert (EXAMPLES.parent / f"{config[key]}.example").is_file()


def test_the_example_datasets_have_only_known_keys() -> None:
    entries = plain_data(EXAMPLES / "multidatabackend.json.example")
    assert [entry["dataset_type"] for entry in entries] == ["video", "text_embeds"]
    for entry in entries:
        assert set(entry) <= set(KINDS[entry["dataset_type"]].model_fields)


@pytest.mark.parametrize("name", ["user_prompt_library", "webhook", "lycoris_config"])
def test_every_other_example_is_an_object_that_can_be_read(name: str) -> None:
    found = plain_data(EXAMPLES / f"{name}.json.example")
    assert isinstance(found, dict)
    assert found
    if name == "user_prompt_library":
        assert all(isinstance(prompt, str) for prompt in found.values())
