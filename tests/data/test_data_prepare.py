"""From folders to samples: what is kept, what is left out, and what is said about it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tuner.builtin.data_report.table import lines, show_report
from tuner.builtin.datasets.prepare import prepare
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket
from tuner.errors import DataError
from tuner.spec import ModelSpec

MakeCore = Callable[..., CoreConfig]


def test_samples_know_their_bucket_captions_and_source(clips: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    prepared = prepare(make_core(clips, video={"num_frames": 9}), spec)
    tall, wide_two, wide = prepared.samples
    assert [each.sample_id for each in prepared.samples] == ["clips/tall.mp4", "clips/wide two.mp4", "clips/wide.mp4"]
    assert tall.bucket == Bucket(9, 80, 48)
    assert wide.bucket == wide_two.bucket == Bucket(9, 48, 80)
    assert wide.captions == ("wide, first", "wide, second")
    assert (tall.width, tall.height, tall.frames, tall.fps) == (64, 96, 9, 24.0)
    (report,) = prepared.report.datasets
    assert report.kept == 3
    assert dict(report.buckets) == {Bucket(9, 48, 80): 2, Bucket(9, 80, 48): 1}


def test_every_file_is_kept_or_left_out_with_its_reason(
    clips: Path, tmp_path: Path, make_core: MakeCore, spec: ModelSpec
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    (folder / "broken.mp4").write_text("no video")
    core = make_core(
        folder, video={"num_frames": 17, "max_frames": 19}, minimum_image_size=10, resolution_type="pixel_area"
    )
    prepared = prepare(core, spec)
    assert [each.sample_id for each in prepared.samples] == ["clips/wide two.mp4"]
    (report,) = prepared.report.datasets
    assert {each.path.name: each.reason for each in report.dropped} == {
        "broken.mp4": "cannot be decoded",
        "tall.mp4": "too short",
        "wide.mp4": "too long",
    }
    assert report.reasons == {"cannot be decoded": 1, "too short": 1, "too long": 1}
    assert (folder / "broken.mp4").exists(), "a bad file is left where it is"


@pytest.mark.parametrize(("unit", "minimum"), [("pixel_area", 78.4), ("pixel", 64), ("area", 0.006144)])
def test_minimum_size_is_inclusive_and_in_the_datasets_unit(
    clips: Path, make_core: MakeCore, spec: ModelSpec, unit: str, minimum: float
) -> None:
    """All clips have 96 x 64 pixels: an edge of 78.38, a shorter side of 64, 0.006144 megapixels."""
    resolution = 0.004 if unit == "area" else 64
    below, above = minimum * 0.99, minimum * 1.01
    entry = {"resolution_type": unit, "resolution": resolution}
    assert len(prepare(make_core(clips, **entry, minimum_image_size=below), spec).samples) == 3
    with pytest.raises(DataError, match=r"3 too small(.|\n)*lower minimum_image_size"):
        prepare(make_core(clips, **entry, minimum_image_size=above), spec)


def test_frames_are_rounded_down_and_said_once_per_dataset(clips: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    prepared = prepare(make_core(clips, video={"num_frames": 19}), spec)
    assert {each.bucket.frames for each in prepared.samples} == {17}
    said = [line for line in lines(prepared.report) if "num_frames 19 becomes 17" in line]
    assert len(said) == 1


def test_min_frames_is_taken_at_its_word(clips: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    """Without it a 17-frame clip serves `num_frames: 19`; with it, it does not."""
    strict = prepare(make_core(clips, video={"num_frames": 19, "min_frames": 19}), spec)
    assert [each.sample_id for each in strict.samples] == ["clips/wide.mp4"]
    lenient = prepare(make_core(clips, video={"num_frames": 17, "min_frames": 5}), spec)
    assert {each.sample_id: each.bucket.frames for each in lenient.samples} == {
        "clips/tall.mp4": 9,
        "clips/wide two.mp4": 17,
        "clips/wide.mp4": 17,
    }


def test_nothing_left_is_one_error_with_counts_and_what_to_change(
    clips: Path, make_core: MakeCore, spec: ModelSpec
) -> None:
    with pytest.raises(DataError) as caught:
        prepare(make_core(clips, video={"num_frames": 81}), spec)
    text = str(caught.value)
    for part in ["'clips'", "of 3 files 3 too short", "9 frames, 81 needed", "lower video.num_frames"]:
        assert part in text


def test_a_folder_without_videos_is_one_error(tmp_path: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"has no video files(.|\n)*\.mp4"):
        prepare(make_core(tmp_path / "empty"), spec)


def test_a_missing_caption_is_an_error_before_anything_is_encoded(
    clips: Path, tmp_path: Path, make_core: MakeCore, spec: ModelSpec
) -> None:
    folder = tmp_path / "uncaptioned"
    shutil.copytree(clips, folder)
    (folder / "wide two.txt").unlink()
    with pytest.raises(DataError, match=r"wide two\.mp4 needs .*wide two\.txt"):
        prepare(make_core(folder), spec)


def test_a_square_crop_and_scaling_down_before_it(clips: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    plain = prepare(make_core(clips, crop=True, resolution=32), spec).samples[-1]
    assert plain.bucket == Bucket(9, 32, 32)
    assert (plain.views[0].framing.width, plain.views[0].framing.height) == (48, 32), "the whole height is shown"
    entry = {"crop": True, "resolution": 32, "resolution_type": "pixel"}
    zoomed = prepare(make_core(clips, **entry, maximum_image_size=60, target_downsample_size=48), spec).samples[-1]
    framing = zoomed.views[0].framing
    assert (framing.width, framing.height) == (72, 48), "scaled to a shorter edge of 48, then cut"
    assert (framing.left, framing.top) == (20, 8)


def test_what_a_user_should_know_is_noted(clips: Path, make_core: MakeCore, spec: ModelSpec) -> None:
    said = "\n".join(lines(prepare(make_core(clips, resolution=128, maximum_image_size=480), spec).report))
    assert "1 of 3 clips do not have the model's 16 frames per second" in said
    assert "3 of 3 clips are smaller than their bucket" in said
    assert "do nothing without `crop: true`" in said


def test_conditioning_data_of_a_model_without_images_is_said_to_be_unused(
    clips: Path, make_core: MakeCore, spec: ModelSpec
) -> None:
    core = make_core(clips)
    images = {"id": "images", "dataset_type": "conditioning_image_embeds"}
    entries = core.data_backend_config
    assert isinstance(entries, list)
    prepared = prepare(core.model_copy(update={"data_backend_config": [*entries, images]}), spec)
    assert prepared.report.notes == ("dataset 'images' is not used: fake-tiny takes no image embeddings",)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_report_on_screen(
    clips: Path, tmp_path: Path, make_core: MakeCore, spec: ModelSpec, terminal: bool
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    for index in range(25):
        (folder / f"broken [{index}].mp4").write_text("no video")
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=160, no_color=True)
    show_report(prepare(make_core(folder, repeats=2), spec, show_progress=False).report, console)
    text = out.getvalue()
    for part in ["3 x 3" if terminal else "3 kept", "25 cannot be decoded", "80x48, 9 frames (2)", "broken [1].mp4"]:
        assert part in text
    assert "and 5 more" in text, "a long list is cut, and counted"
