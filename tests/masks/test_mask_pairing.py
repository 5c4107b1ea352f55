"""Files of the same name: found, told apart, and refused in one error where they do not fit."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.assembly import assemble
from tuner.data.samples import Prepared
from tuner.errors import DataError
from tuner.pipeline import survey

Settings = Callable[..., dict[str, Any]]
Half = Callable[..., np.ndarray]


def prepared(settings: dict[str, Any]) -> Prepared:
    return survey(assemble(settings)).prepared


def test_a_mask_of_the_same_name_belongs_to_its_clip(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    picture = masks.picture("clip 0.png", bright_half())
    clip = masks.clip("clip 1.mkv", [bright_half()] * 9)
    first, second = (sample.companion("mask") for sample in prepared(make_settings()).samples)
    assert (first.path, second.path) == (picture, clip)
    assert first.content_hash == hashlib.sha256(picture.read_bytes()).hexdigest()


def test_the_role_is_the_entrys(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half())
    samples = prepared(make_settings(conditioning={"conditioning_type": "segmentation"})).samples
    assert [[each.role for each in sample.companions] for sample in samples] == [["segmentation"]] * 2


def test_names_are_compared_with_their_folders(
    masks: Any, make_settings: Settings, bright_half: Half, toy_folder: Path, tmp_path: Path
) -> None:
    for folder in ("a", "b.2"):
        (tmp_path / "clips" / folder).mkdir(parents=True)
        for suffix in ("mp4", "txt"):
            shutil.copy(
                toy_folder / "clips" / f"clip 0.{suffix}", tmp_path / "clips" / folder / f"Kätzchen 🐈.{suffix}"
            )
        masks.picture(f"{folder}/Kätzchen 🐈.png", bright_half(200 if folder == "a" else 255))
    settings = make_settings(entry={"instance_data_dir": str(tmp_path / "clips")})
    for sample in prepared(settings).samples:
        assert sample.companion("mask").path.parent.name == sample.path.parent.name


def test_all_windows_of_a_clip_have_its_mask(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half())
    video = {"num_frames": 5, "cut": "uniform", "windows": 2}
    samples = prepared(make_settings(entry={"video": video})).samples
    assert {sample.companion("mask").path.stem for sample in samples if sample.path.stem == "clip 1"} == {"clip 1"}


def test_missing_masks_are_named_in_one_error(
    masks: Any, make_settings: Settings, bright_half: Half, toy_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(13):
        for suffix in ("mp4", "txt"):
            shutil.copy(toy_folder / "clips" / f"clip 0.{suffix}", folder / f"no {index:02}.{suffix}")
    masks.picture("no 05.png", bright_half())
    with pytest.raises(DataError) as caught:
        prepared(make_settings(entry={"instance_data_dir": str(folder)}))
    message = str(caught.value)
    assert "12 of 13 files of dataset 'clips' have no mask to use" in message
    assert message.count("there is no ") == 10
    assert "and 2 more" in message
    assert "no 05" not in message


def test_every_kind_of_misfit_is_said(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    masks.picture("clip 0.png", bright_half())
    masks.clip("clip 0.mkv", [bright_half()] * 9)
    masks.clip("clip 1.mkv", [bright_half()] * 5)
    with pytest.raises(DataError) as caught:
        prepared(make_settings())
    message = str(caught.value)
    assert "clip 0.mp4: there are clip 0.mkv and clip 0.png" in message
    assert "clip 1.mp4: clip 1.mkv has 5 frames, and 9 are needed" in message


def test_a_mask_of_another_aspect_is_refused_with_both_sizes(
    masks: Any, make_settings: Settings, bright_half: Half
) -> None:
    masks.picture("clip 0.png", bright_half(width=64))
    masks.picture("clip 1.png", bright_half(width=48, height=32))
    with pytest.raises(DataError, match=r"clip 0\.png is 64x64, and the file itself is 96x64") as caught:
        prepared(make_settings())
    assert "clip 1" not in str(caught.value), "half the size is the same aspect"


def test_a_mask_that_cannot_be_decoded_is_refused(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    masks.picture("clip 0.png", bright_half())
    (masks.path / "clip 1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"clip 1\.mp4: clip 1\.png cannot be decoded"):
        prepared(make_settings())


def test_a_later_window_needs_a_longer_mask(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    for index in range(2):
        masks.clip(f"clip {index}.mkv", [bright_half()] * 9)
    video = {"num_frames": 9, "cut": "uniform", "windows": 2}  # clip 1 has 13 frames
    with pytest.raises(DataError, match=r"clip 1\.mkv has 9 frames, and 13 are needed"):
        prepared(make_settings(entry={"video": video}))


def test_masks_are_not_opened_again_while_they_are_unchanged(
    masks: Any, make_settings: Settings, bright_half: Half
) -> None:
    """Whoever opened a file that only looks unchanged would find it spoilt."""
    files = [masks.picture(f"clip {index}.png", bright_half(200 + index)) for index in range(2)]
    before = [sample.companions for sample in prepared(make_settings()).samples]
    for file in files:
        status = file.stat()
        file.write_bytes(bytes(status.st_size))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [sample.companions for sample in prepared(make_settings()).samples] == before


def test_first_frames_are_not_asked_for_where_the_model_takes_none(masks: Any, make_settings: Settings) -> None:
    masks.path.mkdir()
    found = prepared(make_settings(conditioning={"conditioning_type": "first_frame"}))
    assert not any(sample.companions for sample in found.samples)
