"""What is refused before any file is opened, which files are left out, and what is said about those in use."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.builtin.datasets.decode import decode
from tuner.builtin.datasets.prepare import prepare as prepare_data
from tuner.config.keys import CoreConfig
from tuner.data.samples import Prepared, View
from tuner.errors import ConfigError, DataError
from tuner.spec import ModelSpec
from tuner.testing.clips import render_clip

Prepare = Callable[..., Prepared]


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of several shapes, lengths and rates; one of a variable rate."""
    folder = tmp_path_factory.mktemp("mixed")
    drawing, times = random.Random(0), [0]
    for _ in range(39):
        times.append(times[-1] + drawing.choice([40, 60, 120]))
    for name, width, height, frames, fps in [
        ("wide 40 at 16", 96, 64, 40, 16),
        ("tall 30 at 24", 64, 96, 30, 24),
        ("banner 20 at 10", 160, 32, 20, 10),
    ]:
        render_clip(folder / f"{name}.mp4", width=width, height=height, frames=frames, fps=fps, seed=frames)
    render_clip(folder / "uneven 40.mkv", width=96, height=64, frames=40, fps=16, seed=5, times=times)
    for each in [*folder.iterdir()]:
        each.with_suffix(".txt").write_text(each.stem, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that the clips are probed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepare(mixed: Path, probed: Path, make_core: Callable[..., CoreConfig], spec: ModelSpec) -> Prepare:
    """Prepare the clips with these keys of their dataset; ``core`` and ``spec`` are what they say."""

    def prepared(spec: ModelSpec = spec, **keys: Any) -> Prepared:
        return prepare_data(make_core(mixed, **({"cache_dir_vae": str(probed)} | keys)), spec, show_progress=False)

    return prepared


def reasons(data: Prepared) -> dict[str, tuple[str, str]]:
    return {each.path.stem: (each.reason, each.detail) for dataset in data.report.datasets for each in dataset.dropped}


def said(data: Prepared) -> list[str]:
    return [note for dataset in data.report.datasets for note in dataset.notes]


# Refused at once.


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"aspect_bucket_alignment": 24}, ["aspect_bucket_alignment 24", "16 pixels", "write 32"]),
        (
            {"resolution_type": "area", "resolution": 480},
            ["resolution 480", "480 megapixels", "write 0.23", "pixel_area"],
        ),
        ({"resolution_type": "pixel", "resolution": 0.5}, ["resolution 0.5", "16 is the least", "area"]),
        ({"minimum_image_size": 0.5}, ["minimum_image_size 0.5", "resolution_type: pixel_area"]),
        ({"crop": True, "target_downsample_size": 0.5}, ["target_downsample_size 0.5"]),
        ({"video": {"num_frames": 81, "max_frames": 50}}, ["81 frames needed", "50 of video.max_frames"]),
        ({"video": {"frame_buckets": [33, 49], "max_frames": 30}}, ["33 frames needed", "frame_buckets"]),
    ],
)
def test_keys_that_cannot_serve_the_model_are_one_error_before_any_file_is_opened(
    tmp_path: Path, prepare: Prepare, keys: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare(cache_dir_vae=str(tmp_path / "cache"), **keys)
    assert str(caught.value).count("where:") == 1
    for part in [*parts, "dataset 'clips'"]:
        assert part in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_all_that_is_wrong_is_said_together(prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match=r"no multiple of the 16(.|\n)*480 megapixels"):
        prepare(aspect_bucket_alignment=20, resolution_type="area", resolution=480)


def test_the_alignment_of_the_core_is_held_against_the_model(prepare: Prepare, spec: ModelSpec) -> None:
    assert prepare(core={"aspect_bucket_alignment": 32}).samples
    with pytest.raises(ConfigError, match="aspect_bucket_alignment 8 is no multiple"):
        prepare(core={"aspect_bucket_alignment": 8})
    assert prepare(replace(spec, size_multiple=8), core={"aspect_bucket_alignment": 8}).samples


# Left out.


def test_what_is_too_narrow_or_too_wide_is_left_out_with_its_numbers(prepare: Prepare) -> None:
    assert reasons(prepare(minimum_aspect_ratio=1, maximum_aspect_ratio=1.5)) == {
        "tall 30 at 24": ("too narrow", "64x96 is 0.667 times as wide as high, at least 1 wanted"),
        "banner 20 at 10": ("too wide", "160x32 is 5 times as wide as high, at most 1.5 wanted"),
    }
    two_decimals = prepare(minimum_aspect_ratio=0.67, maximum_aspect_ratio=4.999)
    assert reasons(two_decimals) == {}, "0.67 lets 2:3 in, and 4.999 lets 5 in"
    with pytest.raises(DataError, match=r"4 too wide(.|\n)*to do: +raise maximum_aspect_ratio"):
        prepare(maximum_aspect_ratio=0.5)


def test_lengths_are_counted_at_the_rate_that_is_asked_for(prepare: Prepare) -> None:
    """30 frames at 24 a second are 20 at 16; 20 at 10 are 32."""
    video: dict[str, Any] = {"num_frames": 9, "min_frames": 21, "fps": 16}
    assert reasons(prepare(video=video)) == {"tall 30 at 24": ("too short", "20 frames at 16 fps of 30, 21 needed")}
    video = {"num_frames": 9, "min_frames": 21}
    assert reasons(prepare(video=video)) == {"banner 20 at 10": ("too short", "20 frames, 21 needed")}
    video = {"num_frames": 9, "max_frames": 31, "fps": 16}
    left_out = reasons(prepare(video=video))
    assert left_out["banner 20 at 10"] == ("too long", "32 frames at 16 fps of 20, at most 31 wanted")
    assert "tall 30 at 24" not in left_out


def test_an_interval_and_frame_buckets_decide_what_is_too_short(prepare: Prepare) -> None:
    """By 16, 30 frames are 16 and 20 are 16: fewer than the 17 of the shortest bucket, which `min_frames` may raise."""
    video: dict[str, Any] = {"frame_buckets": [17, 33]}
    assert reasons(prepare(video=video)) == {}
    assert reasons(prepare(video=video | {"frame_interval": 16})) == {
        "tall 30 at 24": ("too short", "16 frames of 30, 17 needed"),
        "banner 20 at 10": ("too short", "16 frames of 20, 17 needed"),
    }
    assert set(reasons(prepare(video=video | {"min_frames": 25}))) == {"banner 20 at 10"}
    assert reasons(prepare(video=video | {"min_frames": 1})) == {}


def test_a_largest_size_alone_leaves_nothing_out(prepare: Prepare) -> None:
    for crop in (True, False):
        data = prepare(crop=crop, maximum_image_size=32)
        assert len(data.samples) == 4
        assert any("do nothing without" in line for line in said(data))


# Said.


def test_rounded_lengths_are_said(prepare: Prepare) -> None:
    data = prepare(video={"frame_buckets": [18, 9, 20]})
    assert "frame_buckets 9, 18, 20 becomes 9, 17: the model takes 4k+1 frames" in said(data)
    assert not any("becomes" in line for line in said(prepare()))


def test_other_rates_than_the_models_are_said_with_the_key_that_changes_it(prepare: Prepare) -> None:
    plain = said(prepare())
    assert any(line.startswith("3 of 4 clips do not have the model's 16 frames") for line in plain)
    assert sum("`video.fps: 16`" in line for line in plain) == 2
    assert any(line.startswith("1 of 4 clips have a variable frame rate; their frames") for line in plain)
    at_16 = said(prepare(video={"num_frames": 9, "fps": 16}))
    assert not any("learnt slower" in line or "as they are" in line for line in at_16)
    assert any(line.startswith("2 of 4 clips have fewer than the 16 frames per second") for line in at_16)
    at_8 = said(prepare(video={"num_frames": 9, "fps": 8}))
    assert any(line.startswith("video.fps 8 is not the model's 16") for line in at_8)
    assert not any("shown twice" in line for line in at_8)


def test_each_clip_counts_once_however_many_windows_it_gives(prepare: Prepare) -> None:
    data = prepare(resolution=128, video={"num_frames": 9, "cut": "uniform"})
    assert len(data.samples) == 4 + 3 + 2 + 4
    assert data.samples[0].sample_id == "clips/banner 20 at 10.mp4#0"
    assert any(line.startswith("3 of 4 clips do not have the model's") for line in said(data))
    assert any(line.startswith("4 of 4 clips are smaller than their bucket") for line in said(data))


def test_what_was_asked_for_and_cannot_be_had_is_said(prepare: Prepare) -> None:
    def notes(video: dict[str, Any], **keys: Any) -> str:
        return "\n".join(said(prepare(video={"num_frames": 17} | video, **keys)))

    assert "1 of 4 samples have fewer than 5 places to cut" in notes({"cut": "random"}, variants=5)
    assert "1 of 4 clips have fewer than 9 places for windows" in notes({"cut": "uniform", "windows": 9})
    assert "variants does nothing without" in notes({}, variants=2)
    assert "variants does nothing" not in notes({"cut": "random"}, variants=2)
    assert "1 of 4 clips have a variable frame rate and are cut at their beginning" in notes(
        {"cut": "middle", "fps": 16}
    )


# What is planned can be decoded.


@pytest.mark.parametrize("fps", [None, 7, 16, 24, 30])
@pytest.mark.parametrize("cut", ["beginning", "middle", "random", "uniform"])
def test_every_planned_view_can_be_decoded(mixed: Path, prepare: Prepare, cut: str, fps: float | None) -> None:
    keys: dict[str, Any] = {"video": {"num_frames": 33, "min_frames": 1, "cut": cut, "fps": fps}, "resolution": 32}
    data = prepare(crop=True, crop_style="random", variants=2, **keys)
    assert {sample.path.stem for sample in data.samples} == {each.stem for each in mixed.glob("*.txt")}
    for sample in data.samples:
        for view in sample.views:
            frames, height, width = sample.bucket.frames, sample.bucket.height, sample.bucket.width
            assert decode(sample, view).shape == (3, frames, height, width)


def test_windows_reach_from_the_first_frame_to_the_last(prepare: Prepare) -> None:
    data = prepare(video={"num_frames": 9, "cut": "uniform"})
    windows = [sample for sample in data.samples if sample.path.stem == "wide 40 at 16"]
    whole = replace(windows[0], bucket=replace(windows[0].bucket, frames=40))
    frames = decode(whole, View(windows[0].views[0].framing))
    assert torch.equal(decode(windows[0], windows[0].views[0]), frames[:, :9])
    assert torch.equal(decode(windows[-1], windows[-1].views[0]), frames[:, -9:])


def test_other_files_change_nothing_for_a_clip(mixed: Path, tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "alone").mkdir()
    for suffix in ("mp4", "txt"):
        shutil.copy(mixed / f"wide 40 at 16.{suffix}", tmp_path / "alone")
    keys: dict[str, Any] = {
        "video": {"num_frames": 9, "cut": "random"},
        "crop": True,
        "crop_style": "random",
        "crop_aspect": "random",
        "crop_aspect_buckets": [0.5, 1, 2],
    }
    alone = prepare(instance_data_dir=str(tmp_path / "alone"), cache_dir_vae=str(tmp_path / "cache"), **keys).samples
    (among_others,) = [each for each in prepare(**keys).samples if each.path.name == alone[0].path.name]
    assert (alone[0].bucket, alone[0].views) == (among_others.bucket, among_others.views)
    assert len(alone[0].views) == 4
