"""Whatever stands in a config, a person gets an error that can be mended, never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tuner.cli import app
from tuner.errors import TunerError
from tuner.selection import Catalog, discover
from tuner.testing.clips import render_clip
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.toy import build_toy

MANY = settings(
    max_examples=int(os.environ.get("TUNER_FUZZ", "40")),
    deadline=None,
    derandomize="TUNER_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)
# No slashes or dots: what names a folder stays inside the test's own.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="/\\.~$"), max_size=12)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 10**30, 1e-320, True]))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, WORDS, st.sampled_from(["true", "1e-4", "latest", "auto", "no", "832x480"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a toy model and a clip; relative paths lead into it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fuzzed")
    build_toy(folder / "model")
    render_clip(folder / "clips" / "clip.mp4", width=96, height=64, frames=9, fps=16, seed=1)
    with pytest.MonkeyPatch.context() as patch, importable(toy_distribution(folder / "site")):
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def valid() -> dict[str, Any]:
    entry = {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": "clips",
        "caption_strategy": "filename",
        "resolution": 64,
        "resolution_type": "pixel_area",
        "video": {"num_frames": 9},
    }
    return {
        "model_family": "toy",
        "pretrained_model_name_or_path": "model",
        "output_dir": "output",
        "cache_dir": "cache",
        "max_train_steps": 2,
        "data_backend_config": [entry, {"id": "text", "dataset_type": "text_embeds", "default": True}],
    }


def all_keys() -> list[str]:
    """Every key of the core and of the plugins that come with it."""
    from tuner.config.keys import CoreConfig

    catalog = Catalog(discover())
    plugins = [catalog.load(name).Config.model_fields for name in catalog.installed]
    return sorted({*CoreConfig.model_fields, *(key for fields in plugins for key in fields)} - {"output_dir"})


def assert_told(path: Path) -> None:
    """``tuner check`` accepts the file, or says what is wrong with it."""
    result = CliRunner().invoke(app, ["check", "--config", str(path)])
    if result.exception is None or isinstance(result.exception, SystemExit):
        return
    if not isinstance(result.exception, TunerError):
        raise AssertionError(path.read_bytes()[:2000]) from result.exception
    assert str(result.exception).strip()


def write(place: Path, config: Any) -> Path:
    path = place / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    return path


def test_the_config_itself_is_accepted(place: Path) -> None:
    result = CliRunner().invoke(app, ["check", "--config", str(write(place, valid()))])
    assert result.exception is None, result.exception


@MANY
@given(changes=st.dictionaries(st.sampled_from(all_keys()), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_key(place: Path, changes: dict[str, Any]) -> None:
    assert_told(write(place, valid() | changes))


ENTRY_KEYS = [
    *("id", "type", "dataset_type", "instance_data_dir", "caption_strategy", "resolution", "resolution_type", "video"),
    *("crop", "crop_aspect", "crop_style", "minimum_image_size", "maximum_image_size", "repeats", "probability"),
    *("cache_dir_vae", "text_embeds", "disabled", "metadata_backend", "caption_filter_list", "conditioning_data"),
]


@MANY
@given(
    changes=st.dictionaries(st.one_of(st.sampled_from(ENTRY_KEYS), WORDS), VALUES, min_size=1, max_size=3),
    video=st.dictionaries(
        st.sampled_from(["num_frames", "min_frames", "max_frames", "is_i2v", "bucket_strategy"]), VALUES
    ),
)
def test_any_value_in_a_dataset(place: Path, changes: dict[str, Any], video: dict[str, Any]) -> None:
    config = valid()
    entry = config["data_backend_config"][0]
    entry["video"] |= video
    entry |= changes
    assert_told(write(place, config))


@MANY
@given(entries=VALUES)
def test_anything_in_place_of_the_datasets(place: Path, entries: Any) -> None:
    assert_told(write(place, valid() | {"data_backend_config": entries}))


@MANY
@given(
    content=st.one_of(st.binary(max_size=60), VALUES.map(lambda each: json.dumps(each).encode())),
    kind=st.sampled_from(["json", "toml", "yaml", "env"]),
)
def test_any_file(place: Path, content: bytes, kind: str) -> None:
    path = place / f"config.{kind}"
    path.write_bytes(content)
    assert_told(path)


@MANY
@given(cut=st.integers(min_value=0, max_value=400), put=st.binary(max_size=4))
def test_a_file_with_a_slip_of_the_hand(place: Path, cut: int, put: bytes) -> None:
    whole = json.dumps(valid()).encode()
    path = place / "config.json"
    path.write_bytes(whole[:cut] + put + whole[cut + 1 :])
    assert_told(path)
