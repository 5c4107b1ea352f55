"""From a list of datasets with sources to samples: the keys, the captions, the errors."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tuner.builtin.datasets.prepare import prepare
from tuner.builtin.sources import SourcesPlugin
from tuner.builtin.sources.registry import SOURCES
from tuner.config.keys import CoreConfig
from tuner.data.samples import Prepared
from tuner.data.source import Source
from tuner.errors import TunerError
from tuner.plugin import PluginConfig
from tuner.selection import discover
from tuner.spec import LatentGeometry, ModelSpec
from tuner.testing.clips import render_clip

SPEC = ModelSpec(
    family="fake",
    flavour="fake-tiny",
    base="none",
    networks=(),
    latents=LatentGeometry(channels=4, stride_time=4, stride_space=8),
    size_multiple=16,
    fps=16.0,
    adapter_targets=(),
    encoders={"text": ("text_encoder",), "video": ("vae",)},
)
Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Prepares one dataset of clips from an entry's keys."""

    def make(**entry: Any) -> Prepared:
        video = {"id": "d", "dataset_type": "video", "resolution": 64, "video": {"num_frames": 5}, **entry}
        text = {"id": "text", "dataset_type": "text_embeds", "default": True}
        core = CoreConfig(data_backend_config=[video, text], output_dir=tmp_path / "output")
        return prepare(core, SPEC, SOURCES, show_progress=False)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("one", "two")):
        render_clip(folder / f"{name}.mp4", width=64, height=64, frames=5, fps=8, seed=number)
        (folder / f"{name}.txt").write_text(f"{name} from a file")
    (folder / "list.csv").write_text("path;text\none.mp4;one from a table\ntwo.mp4;two from a table\n")
    return folder


def captions(prepared: Prepared) -> dict[str, tuple[str, ...]]:
    return {each.path.name: each.captions for each in prepared.samples}


def test_a_tables_captions_are_used_unless_the_dataset_says_otherwise(prepared: Prepare, folder: Path) -> None:
    table = {"one.mp4": ("one from a table",), "two.mp4": ("two from a table",)}
    assert captions(prepared(type="csv", csv_file=str(folder / "list.csv"))) == table
    assert captions(prepared(type="manifest", manifest=str(folder / "list.csv"), caption_strategy="csv")) == table
    files = captions(prepared(type="csv", manifest=str(folder / "list.csv"), caption_strategy="textfile"))
    assert files == {"one.mp4": ("one from a file",), "two.mp4": ("two from a file",)}


def test_a_folder_that_is_an_address_needs_no_type(prepared: Prepare, folder: Path) -> None:
    system, place = fsspec.filesystem("memory"), uuid.uuid4().hex
    for path in folder.iterdir():
        system.pipe(f"/{place}/{path.name}", path.read_bytes())
    first = prepared(instance_data_dir=f"memory://{place}")
    assert captions(first) == {"one.mp4": ("one from a file",), "two.mp4": ("two from a file",)}
    assert [each.sample_id for each in first.samples] == ["d/one.mp4", "d/two.mp4"]
    assert prepared(instance_data_dir=f"memory://{place}").samples == first.samples
    system.rm(f"/{place}", recursive=True)


def test_an_address_and_a_folder_give_the_same_samples(prepared: Prepare, folder: Path, tmp_path: Path) -> None:
    local = prepared(instance_data_dir=str(folder))
    rows = [{"file_name": each.path.name, "captions": list(each.captions)} for each in local.samples]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = prepared(type="jsonl", manifest=str(tmp_path / "list.jsonl"), instance_data_dir=str(folder))
    assert listed.samples == local.samples


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "csvv"}, r"type 'csvv' does not exist(.|\n)*did you mean 'csv'"),
        ({"type": "csv"}, "manifest is missing"),
        ({"type": "aws", "aws_bucket": "x"}, r"no key 'aws_bucket'(.|\n)*did you mean 'aws_bucket_name'"),
        ({"type": "huggingface"}, "dataset_name is missing"),
        ({"type": "local", "dataset_name": "a/b"}, "no key 'dataset_name'"),
    ],
)
def test_wrong_keys_are_errors(prepared: Prepare, entry: Mapping[str, str], message: str) -> None:
    with pytest.raises(TunerError, match=message):
        prepared(**entry)


def test_a_clip_without_a_caption_in_the_table_is_named(prepared: Prepare, folder: Path) -> None:
    (folder / "list.csv").write_text("path,text\none.mp4,words\ntwo.mp4,\n")
    with pytest.raises(TunerError, match=r"no caption in .*list\.csv: two\.mp4"):
        prepared(type="csv", manifest=str(folder / "list.csv"))


def test_the_plugin_offers_each_source_with_documented_keys() -> None:
    assert "sources" in discover()
    offered: Mapping[str, Source] = SourcesPlugin("sources", PluginConfig()).data_sources(run=None)  # type: ignore[arg-type]
    assert set(offered) == {"fsspec", "aws", "huggingface", "csv", "jsonl", "parquet", "manifest"}
    for source in offered.values():
        assert all(field.description for field in source.keys.model_fields.values())
