"""Views: which frames and which part of the picture are taken of any source, under any keys."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tuner.builtin.datasets.entries import EvalDataset, ImageDataset, Trained, VideoDataset
from tuner.builtin.datasets.judge import judge
from tuner.builtin.datasets.probe import Probed
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.views import Window, drawn, windows
from tuner.data.samples import Bucket, View
from tuner.spec import LatentGeometry, ModelSpec

SPEC = ModelSpec(
    family="fake",
    flavour="fake-tiny",
    base="none",
    networks=(),
    latents=LatentGeometry(channels=4, stride_time=4, stride_space=8),
    size_multiple=16,
    fps=16.0,
    adapter_targets=(),
)
SIZES: dict[str, Any] = {
    "id": "d",
    "cache_dir_vae": "cache",
    "resolution": 480,
    "resolution_type": "pixel_area",
    "minimum_image_size": 0,
    "aspect_bucket_rounding": 2,
    "aspect_bucket_alignment": None,
    "caption_dropout_probability": None,
}


def clips(video: dict[str, Any] | None = None, **keys: Any) -> VideoDataset:
    """A dataset of clips."""
    return VideoDataset(**(SIZES | {"video": video or {}} | keys))


def clip(
    frames: int = 81, fps: float = 16.0, width: int = 832, height: int = 480, variable: bool = False
) -> VideoFacts:
    """What probing finds in a clip."""
    return VideoFacts("hash", width, height, frames, fps, frames / fps, variable)


PICTURE = VideoFacts("hash", 640, 480, 1, 0.0, 0.0)


def made(dataset: Trained, facts: VideoFacts, name: str = "a.mp4", seed: int = 1) -> list[Window]:
    return windows(dataset, name, facts, SPEC, seed)


def starts(dataset: Trained, facts: VideoFacts, name: str = "a.mp4", seed: int = 1) -> list[list[int]]:
    """For each window the first frames of its views."""
    return [[view.start for view in window.views] for window in made(dataset, facts, name, seed)]


def is_kept(dataset: Trained, facts: VideoFacts) -> bool:
    return bool(judge(dataset, Path(), [Probed("a.mp4", facts)], SPEC)[0])


def last_frame(view: View, bucket: Bucket, facts: VideoFacts) -> int:
    """The source's frame on the screen when the last frame of a view is due, by a clip's even clock."""
    rate = facts.frames / facts.duration
    return view.start + math.floor((bucket.frames - 1) * (1 if view.fps is None else rate / view.fps) + 1e-6)


# How a clip's frames are taken.

videos = st.fixed_dictionaries(
    {
        "num_frames": st.integers(1, 100),
        "min_frames": st.none() | st.integers(1, 60),
        "max_frames": st.none() | st.integers(60, 400),
        "frame_buckets": st.none() | st.lists(st.integers(1, 120), min_size=1, max_size=4),
        "frame_interval": st.none() | st.integers(1, 12),
        "fps": st.none() | st.sampled_from([8.0, 12.0, 16.0, 23.976, 24.0, 60.0]) | st.floats(1, 120),
        "cut": st.sampled_from(["beginning", "middle", "random", "uniform"]),
        "windows": st.none() | st.integers(1, 9),
    }
)
crops = st.fixed_dictionaries(
    {
        "crop": st.booleans(),
        "crop_aspect": st.sampled_from(["square", "preserve", "closest", "random"]),
        "crop_aspect_buckets": st.just((0.75, 1.0, 1.33)),
        "crop_style": st.sampled_from(["center", "centre", "random", "corner"]),
        "variants": st.integers(1, 6),
        "resolution": st.integers(64, 900),
        "resolution_type": st.sampled_from(["pixel", "pixel_area"]),
        "maximum_image_size": st.none() | st.integers(100, 900),
        "target_downsample_size": st.none() | st.integers(100, 900),
        "aspect_bucket_alignment": st.sampled_from([None, 16, 32]),
    }
)
sources = st.builds(
    clip,
    frames=st.integers(1, 500),
    fps=st.sampled_from([10.0, 12.5, 16.0, 24.0, 25.0, 29.97, 30.0, 60.0]),
    width=st.integers(64, 2000),
    height=st.integers(64, 2000),
    variable=st.booleans(),
)


@given(video=videos, crop=crops, facts=sources, seed=st.integers(0, 5))
def test_every_kept_clip_has_one_bucket_and_views_inside_itself(
    video: dict[str, Any], crop: dict[str, Any], facts: VideoFacts, seed: int
) -> None:
    dataset = clips(video, **crop)
    assume(is_kept(dataset, facts))
    found = made(dataset, facts, seed=seed)
    (bucket,) = {window.bucket for window in found}
    multiple = dataset.aspect_bucket_alignment or 16
    assert bucket.frames % 4 == 1
    assert bucket.frames <= max(video["frame_buckets"] or [video["num_frames"]])
    assert bucket.width % multiple == bucket.height % multiple == 0
    for window in found:
        assert 1 <= len(window.views) <= dataset.variants
        assert len(set(window.views)) == len(window.views), "the same view is not encoded twice"
        for view in window.views:
            framing = view.framing
            assert framing.left >= 0
            assert framing.top >= 0
            assert framing.left + bucket.width <= framing.width
            assert framing.top + bucket.height <= framing.height
            assert 0 <= view.start <= last_frame(view, bucket, facts) < facts.frames
            assert view.start == 0 or view.fps is None or not facts.variable
    assert found == made(dataset, facts, seed=seed), "the same again"


@given(video=videos, facts=sources)
def test_a_turned_source_gives_the_turned_windows(video: dict[str, Any], facts: VideoFacts) -> None:
    dataset = clips(video)
    assume(is_kept(dataset, facts))
    for upright, turned in zip(
        made(dataset, facts), made(dataset, facts._replace(width=facts.height, height=facts.width)), strict=True
    ):
        assert upright.bucket == Bucket(turned.bucket.frames, turned.bucket.width, turned.bucket.height)
        for one, other in zip(upright.views, turned.views, strict=True):
            assert (one.start, one.fps) == (other.start, other.fps)
            assert (one.framing.width, one.framing.left) == (other.framing.height, other.framing.top)


@pytest.mark.parametrize(("cut", "expected"), [("beginning", [[0]]), ("middle", [[10]]), ("uniform", [[0], [20]])])
def test_where_a_longer_clip_is_cut(cut: str, expected: list[list[int]]) -> None:
    assert starts(clips({"num_frames": 17, "cut": cut}), clip(37)) == expected


def test_frames_are_those_of_the_rate_and_never_behind_the_end() -> None:
    """121 frames at 24 a second: the 81st moment at 16 a second is the last frame's. With 120 there is none."""
    dataset = clips({"num_frames": 81, "min_frames": 1, "fps": 16})
    (window,) = made(dataset, clip(121, 24))
    assert (window.bucket.frames, window.views[0].fps, window.views[0].start) == (81, 16, 0)
    (window,) = made(dataset, clip(120, 24))
    assert window.bucket.frames == 77
    assert made(dataset, clip(81, 16))[0].views[0].fps is None, "nothing to resample where the rates agree"


def test_a_resampled_window_starts_at_the_nearest_frame_of_the_source() -> None:
    """240 frames at 48 a second are 80 at 16: windows of 21 start at 0 and so that the last one ends at the end."""
    dataset = clips({"num_frames": 21, "fps": 16, "cut": "uniform", "windows": 2})
    assert starts(dataset, clip(240, 48)) == [[0], [(80 - 21) * 3]]
    assert starts(clips({"num_frames": 21, "fps": 16, "cut": "middle"}), clip(240, 48)) == [[88]]


def test_a_resampled_clip_of_variable_rate_is_taken_from_its_beginning() -> None:
    for cut in ("middle", "random", "uniform"):
        dataset = clips({"num_frames": 17, "fps": 8, "cut": cut})
        assert starts(dataset, clip(200, 16, variable=True)) == [[0]]
        assert starts(clips({"num_frames": 17, "cut": cut}), clip(200, variable=True)) != [[0]], "frames as they are"


@given(frames=st.integers(1, 400), length=st.sampled_from([1, 5, 17, 33, 81]))
def test_uniform_windows_use_the_whole_clip_side_by_side(frames: int, length: int) -> None:
    assume(frames >= length)
    found = [each[0] for each in starts(clips({"num_frames": length, "cut": "uniform"}), clip(frames))]
    assert len(found) == frames // length
    assert found[0] == 0
    assert len(found) == 1 or found[-1] == frames - length
    gaps = [after - before for before, after in pairwise(found)]
    assert all(gap >= length for gap in gaps), "no frame twice"
    assert not gaps or max(gaps) - min(gaps) <= 1, "evenly spread"


def test_a_number_of_windows_may_overlap_and_is_never_more_than_there_are_places() -> None:
    video: dict[str, Any] = {"num_frames": 17, "cut": "uniform"}
    assert starts(clips(video | {"windows": 3}), clip(25)) == [[0], [4], [8]]
    assert starts(clips(video | {"windows": 9}), clip(19)) == [[0], [1], [2]]
    assert starts(clips(video | {"windows": 1}), clip(99)) == [[0]]


def test_random_cuts_are_different_places_that_depend_on_seed_and_name_alone() -> None:
    dataset = clips({"num_frames": 17, "cut": "random"}, variants=8)
    (found,) = starts(dataset, clip(500))
    assert len(set(found)) == 8
    assert starts(dataset, clip(500), name="b.mp4") != [found]
    assert starts(dataset, clip(500), seed=2) != [found]
    assert starts(clips({"num_frames": 17, "cut": "random"}, variants=3), clip(500)) == [found[:3]], "more only adds"
    (few,) = starts(dataset, clip(19))
    assert sorted(few) == [0, 1, 2], "all places, once each, where there are fewer"


@given(count=st.integers(1, 40), among=st.integers(1, 60), seed=st.integers(0, 3))
def test_drawn_numbers_differ_and_a_larger_count_only_adds(count: int, among: int, seed: int) -> None:
    found = drawn(count, among, seed, "test")
    assert len(set(found)) == len(found) == min(count, among)
    assert set(found) <= set(range(among))
    assert drawn(count + 5, among, seed, "test")[: len(found)] == found


def test_drawn_numbers_are_spread_over_all_places() -> None:
    """Each of ten places is as likely as another: 2000 draws of one, 200 expected, within five deviations."""
    counts = [0] * 10
    for index in range(2000):
        counts[drawn(1, 10, 0, f"file {index}")[0]] += 1
    assert all(abs(count - 200) < 5 * math.sqrt(180) for count in counts)


# Lengths.


def test_a_clip_goes_to_the_longest_bucket_it_fills() -> None:
    dataset = clips({"frame_buckets": [81, 18, 49], "num_frames": 5})
    lengths = {frames: made(dataset, clip(frames))[0].bucket.frames for frames in (17, 18, 48, 49, 80, 81, 500)}
    assert lengths == {17: 17, 18: 17, 48: 17, 49: 49, 80: 49, 81: 81, 500: 81}
    assert not is_kept(dataset, clip(16))


def test_an_interval_rounds_a_clips_frames_down_first() -> None:
    dataset = clips({"num_frames": 81, "min_frames": 1, "frame_interval": 10})
    assert {frames: made(dataset, clip(frames))[0].bucket.frames for frames in (79, 80, 39, 100)} == {
        79: 69,
        80: 77,
        39: 29,
        100: 81,
    }


def test_a_picture_is_one_frame_in_any_dataset_that_takes_it() -> None:
    held_out = EvalDataset(**(SIZES | {"video": {"num_frames": 81, "fps": 8, "cut": "uniform"}}))
    pictures = ImageDataset(**SIZES)
    for dataset in (held_out, pictures):
        assert is_kept(dataset, PICTURE)
        (window,) = made(dataset, PICTURE)
        assert window.bucket == Bucket(1, 416, 560)
        assert [(view.start, view.fps) for view in window.views] == [(0, None)]
    assert is_kept(held_out, clip(200, 8))
    assert not is_kept(held_out, clip(80, 8))
    assert not is_kept(clips(), PICTURE), "a picture is no clip"


# Sizes.


def size(dataset: Trained, facts: VideoFacts, name: str = "a.mp4") -> tuple[int, int]:
    bucket = made(dataset, facts, name)[0].bucket
    return bucket.width, bucket.height


def test_the_aspects_that_a_crop_cuts_to() -> None:
    wide = clip(width=1920, height=1080)
    keys: dict[str, Any] = {"crop": True, "crop_aspect_buckets": [1.0, 0.75, 1.33]}
    assert size(clips(), wide) == (640, 352)
    assert size(clips(**keys, crop_aspect="square"), wide) == (480, 480)
    assert size(clips(**keys, crop_aspect="preserve"), wide) == (640, 352)
    assert size(clips(**keys, crop_aspect="closest"), wide) == (560, 416)
    assert size(clips(**keys, crop_aspect="closest"), clip(width=1080, height=1920)) == (416, 560)
    assert size(clips(**keys, crop_aspect="closest"), clip(width=1000, height=900)) == (480, 480)
    drawn_sizes = [size(clips(**keys, crop_aspect="random"), wide, f"{index}.mp4") for index in range(40)]
    assert set(drawn_sizes) == {(480, 480), (416, 560), (560, 416)}
    assert drawn_sizes == [size(clips(**keys, crop_aspect="random"), wide, f"{index}.mp4") for index in range(40)]


def test_the_nearest_aspect_is_by_ratio() -> None:
    """1.4 is 1.4 times 1 and 0.7 of 2: nearer to 1 by ratio; 1.45 is nearer to 2, though further by difference."""
    keys: dict[str, Any] = {
        "crop": True,
        "crop_aspect": "closest",
        "crop_aspect_buckets": [1.0, 2.0],
        "resolution_type": "pixel",
    }
    assert size(clips(**keys), clip(width=1400, height=1000)) == (480, 480)
    assert size(clips(**keys), clip(width=1450, height=1000)) == (960, 480)


@pytest.mark.parametrize("style", ["center", "centre", "corner"])
def test_where_a_crop_cuts(style: str) -> None:
    (view,) = made(clips(crop=True, crop_style=style), clip(width=1920, height=1080))[0].views
    assert (view.framing.width, view.framing.height) == (853, 480)
    assert (view.framing.left, view.framing.top) == ((0, 0) if style == "corner" else (186, 0))


def test_random_crops_are_different_places_that_depend_on_seed_and_name_alone() -> None:
    dataset = clips(crop=True, crop_style="random", variants=5)
    facts = clip(width=1920, height=1080)
    views = made(dataset, facts)[0].views
    assert len({view.framing.left for view in views}) == 5
    assert {view.framing.top for view in views} == {0}
    assert made(dataset, facts, name="b.mp4")[0].views != views
    assert made(dataset, facts, seed=2)[0].views != views
    assert len(made(dataset, clip(width=480, height=480))[0].views) == 1, "there is one place in what fits exactly"
    plain = made(clips(crop_style="random", variants=5), facts)[0].views
    assert len(plain) == 1, "nothing is drawn without `crop: true`"


def test_random_cuts_and_random_crops_vary_together() -> None:
    dataset = clips({"num_frames": 17, "cut": "random"}, crop=True, crop_style="random", variants=4)
    views = made(dataset, clip(500, width=1920, height=1080))[0].views
    assert len({view.start for view in views}) == len({view.framing.left for view in views}) == 4
    # Two places to start from and many to cut: all views differ. Two of each: all four pairs.
    assert len(set(made(dataset, clip(18, width=1920, height=1080))[0].views)) == 4
    views = made(dataset, clip(18, width=481, height=480))[0].views
    assert {(view.start, view.framing.left) for view in views} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_each_uniform_window_has_its_own_random_crops() -> None:
    dataset = clips({"num_frames": 17, "cut": "uniform"}, crop=True, crop_style="random", variants=3)
    first, second = made(dataset, clip(34, width=1920, height=1080))
    assert [view.start for view in first.views] == [0, 0, 0]
    assert [view.start for view in second.views] == [17, 17, 17]
    assert [view.framing for view in first.views] != [view.framing for view in second.views]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (853, 480)),
        ({"maximum_image_size": 1000, "target_downsample_size": 600}, (1067, 600)),
        ({"maximum_image_size": 1080, "target_downsample_size": 600}, (853, 480)),
        ({"maximum_image_size": 1000, "target_downsample_size": 100}, (853, 480)),
    ],
)
def test_what_is_too_large_is_scaled_down_before_it_is_cut(keys: dict[str, Any], expected: tuple[int, int]) -> None:
    """By the shorter edge: 1080 is above 1000 and not above 1080; a target below the bucket still fills the bucket."""
    facts = clip(width=1920, height=1080)
    (view,) = made(clips(crop=True, resolution_type="pixel", **keys), facts)[0].views
    assert (view.framing.width, view.framing.height) == expected
    (whole,) = made(clips(resolution_type="pixel", **keys), facts)[0].views
    assert (whole.framing.width, whole.framing.height) == (853, 480), "nothing of it without `crop: true`"


def test_the_alignment_is_the_datasets_own_or_the_models() -> None:
    facts = clip(width=1280, height=720)
    assert size(clips(), facts) == (640, 352)
    assert size(clips(aspect_bucket_alignment=64), facts) == (640, 384)
    finer = replace(SPEC, size_multiple=8)
    assert windows(clips(), "a.mp4", facts, finer, 0)[0].bucket == Bucket(81, 360, 640)
