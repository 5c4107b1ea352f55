"""Which files of a dataset are used, which are held out, and what the list as a whole says about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuner.builtin.data_report.table import lines
from tuner.builtin.datasets.judge import Kept
from tuner.builtin.datasets.prepare import chosen, prepare
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.config.keys import CoreConfig
from tuner.data.samples import Prepared, Schedule
from tuner.data.source import Listing, Request
from tuner.errors import DataError
from tuner.plugin import PluginConfig, key
from tuner.spec import ModelSpec
from tuner.testing.clips import render_clip

MakeCore = Callable[..., CoreConfig]
TEXT: dict[str, Any] = {"id": "t", "dataset_type": "text_embeds", "default": True}
SIZES: dict[str, Any] = {"resolution": 32, "resolution_type": "pixel"}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures with captions, and one that is too small."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(np.full((40, 48, 3), index, np.uint8)).save(folder / f"{index:02}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "small.png")
    for file in [*folder.iterdir()]:
        file.with_suffix(".txt").write_text(f"picture {file.stem}")
    return folder


def prepared(tmp_path: Path, spec: ModelSpec, *entries: dict[str, Any], **core: Any) -> Prepared:
    listed = [SIZES | entry for entry in entries]
    keys = {"data_backend_config": [*listed, TEXT], "cache_dir": tmp_path / "cache"} | core
    return prepare(CoreConfig(**keys), spec, show_progress=False)


def names(data: Prepared) -> list[str]:
    return [sample.path.name for sample in data.samples]


def test_max_num_samples_takes_that_many_usable_files_and_says_so(
    tmp_path: Path, pictures: Path, spec: ModelSpec
) -> None:
    entry = {"id": "p", "instance_data_dir": str(pictures), "minimum_image_size": 20}
    whole = prepared(tmp_path, spec, entry)
    some = prepared(tmp_path, spec, entry | {"max_num_samples": 5})
    assert len(names(some)) == 5
    assert names(some) == [name for name in names(whole) if name in names(some)], "in the folder's order"
    assert [line for line in lines(some.report) if "files are used" in line] == [
        "p: 5 of 12 files are used (max_num_samples), chosen by the seed"
    ]
    assert some.report.datasets[0].reasons == {"too small": 1}, "what is not chosen is not left out for a fault"
    assert names(prepared(tmp_path, spec, entry | {"max_num_samples": 5}, seed=7)) != names(some)


def test_a_limit_above_the_files_says_nothing(tmp_path: Path, pictures: Path, spec: ModelSpec) -> None:
    data = prepared(tmp_path, spec, {"id": "p", "instance_data_dir": str(pictures), "max_num_samples": 13})
    assert len(data.samples) == 13
    assert not any("files are used" in line for line in lines(data.report))


def test_captions_are_only_asked_of_the_chosen(tmp_path: Path, pictures: Path, spec: ModelSpec) -> None:
    entry = {"id": "p", "instance_data_dir": str(pictures), "max_num_samples": 2, "minimum_image_size": 20}
    used = {Path(name).stem for name in names(prepared(tmp_path, spec, entry))}
    for file in pictures.glob("*.txt"):
        if file.stem not in used:
            file.unlink()
    assert len(prepared(tmp_path, spec, entry).samples) == 2


@given(st.lists(st.text(min_size=1), unique=True, max_size=30), st.integers(1, 30), st.integers(0, 3), st.data())
def test_another_file_changes_at_most_one_of_the_chosen(
    files: list[str], most: int, seed: int, data: st.DataObject
) -> None:
    facts = VideoFacts("", 1, 1, 1, 0.0, 0.0)
    kept = [Kept(Path(name), name, facts) for name in files]
    picked = {each.name for each in chosen(kept, most, seed)}
    assert len(picked) == min(most, len(files))
    shuffled = data.draw(st.permutations(kept))
    assert {each.name for each in chosen(shuffled, most, seed)} == picked
    if files:
        fewer = {each.name for each in chosen(kept[1:], most, seed)}
        assert len(picked - fewer) <= 1


def test_eval_datasets_are_held_out_with_their_pictures_and_clips(
    tmp_path: Path, pictures: Path, spec: ModelSpec
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    render_clip(held / "clip.mp4", width=48, height=32, frames=9, fps=16, seed=1)
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(held / "picture.png")
    for name in ("clip", "picture"):
        (held / f"{name}.txt").write_text(name)
    data = prepared(
        tmp_path,
        spec,
        {"id": "p", "instance_data_dir": str(pictures), "repeats": 2, "probability": 0.5, "end_step": 9},
        {
            "id": "e",
            "dataset_type": "eval",
            "instance_data_dir": str(held),
            "video": {"num_frames": 9, "min_frames": 1},
        },
    )
    assert {sample.dataset_id for sample in data.samples} == {"p"}
    assert [sample.sample_id for sample in data.held_out] == ["e/clip.mp4", "e/picture.png"]
    assert [sample.bucket.frames for sample in data.held_out] == [9, 1]
    assert data.datasets["p"].schedule == Schedule(repeats=2, probability=0.5, end_step=9)
    assert set(data.datasets) == {"p", "e"}
    assert [each.dataset_id for each in data.report.datasets] == ["p", "e"]


def test_an_eval_dataset_without_a_usable_file_is_one_error(tmp_path: Path, pictures: Path, spec: ModelSpec) -> None:
    (tmp_path / "none").mkdir()
    eval_entry = {"id": "e", "dataset_type": "eval", "instance_data_dir": str(tmp_path / "none")}
    with pytest.raises(DataError, match=r"'e' has no video or image files(.|\n)*\.mp4(.|\n)*\.png"):
        prepared(tmp_path, spec, {"id": "p", "instance_data_dir": str(pictures)}, eval_entry)


def test_the_schedule_and_the_share_of_empty_prompts_reach_the_dataset(
    tmp_path: Path, pictures: Path, spec: ModelSpec
) -> None:
    entry = {
        "id": "p",
        "instance_data_dir": str(pictures),
        "start_epoch": 0,
        "end_epoch": 0,
        "start_step": 3,
        "end_step": 0,
        "caption_dropout_probability": 0.25,
        "is_regularisation_data": True,
    }
    other = {"id": "q", "instance_data_dir": str(pictures), "start_epoch": 2, "end_epoch": 4}
    datasets = prepared(tmp_path, spec, entry, other).datasets
    assert datasets["p"].schedule == Schedule(start_epoch=1, end_epoch=None, start_step=3, end_step=None)
    assert (datasets["p"].caption_dropout, datasets["p"].regularisation) == (0.25, True)
    assert datasets["q"].schedule == Schedule(start_epoch=2, end_epoch=4)


def test_what_does_nothing_is_in_the_report(tmp_path: Path, pictures: Path, spec: ModelSpec) -> None:
    data = prepared(
        tmp_path,
        spec,
        {"id": "p", "instance_data_dir": str(pictures), "skip_file_discovery": "vae", "caption_shuffle": True},
    )
    said = lines(data.report)
    assert any(line.startswith("p: skip_file_discovery does nothing") for line in said)
    assert any(line.startswith("p: caption_shuffle does nothing") for line in said)


def test_image_conditioning_is_said_to_be_unused_only_where_the_model_takes_no_image(
    tmp_path: Path, pictures: Path, spec: ModelSpec
) -> None:
    entry = {"id": "p", "instance_data_dir": str(pictures), "cache_dir_conditioning_image_embeds": "somewhere"}
    assert prepared(tmp_path, spec, entry).report.notes == (
        "dataset 'p': cache_dir_conditioning_image_embeds does nothing: fake-tiny takes no image embeddings",
    )
    takes_images = replace(spec, conditioning_frames=("first_frame",))
    assert prepared(tmp_path, takes_images, entry).report.notes == ()


class ShelfKeys(PluginConfig):
    """What an entry of the test's source has."""

    manifest: str = key("", "The table.")


class Shelf:
    """A source that lists files of a folder with captions of its own, and none for ``00.png``."""

    keys = ShelfKeys

    def listing(self, request: Request) -> Listing:
        from tuner.builtin.datasets.scanning import local_listing

        found = local_listing(Path(request.entry["instance_data_dir"]), request.suffixes)
        captions = {each.path: (f"from {Path(each.path).stem}",) for each in found.files if "00" not in each.path}
        return Listing(found.root, found.files, captions, ("read from the shelf",))


def test_a_source_that_knows_captions_is_asked_unless_the_dataset_says_otherwise(
    tmp_path: Path, pictures: Path, spec: ModelSpec
) -> None:
    entry = SIZES | {"id": "p", "instance_data_dir": str(pictures), "type": "shelf", "manifest": "shelf.csv"}

    def shelved(**more: Any) -> Prepared:
        core = CoreConfig(data_backend_config=[entry | more, TEXT], cache_dir=tmp_path / "cache")
        return prepare(core, spec, {"shelf": Shelf()}, show_progress=False)

    with pytest.raises(DataError, match=r"a clip has no caption in shelf\.csv: 00\.png"):
        shelved()
    with pytest.raises(DataError) as caught:
        shelved(manifest="https://me:secret@shelf.test/a.csv?key=secret")
    assert "no caption in https://shelf.test/a.csv: 00.png" in str(caught.value)
    assert shelved(caption_strategy="textfile").samples[0].captions == ("picture 00",)
    (pictures / "00.png").rename(tmp_path / "00.png")
    data = shelved()
    assert data.samples[0].captions == ("from 01",)
    assert "p: read from the shelf" in lines(data.report)
