"""Buckets: the published rule, its symmetry, and what the frame rule makes of lengths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.builtin.buckets import (
    ResolutionType,
    bucket_frames,
    bucket_size,
    framing,
    measure,
    resolution_for,
    scale_to,
)
from tuner.data.samples import Bucket
from tuner.spec import LatentGeometry

GOLDEN = json.loads((Path(__file__).parent / "bucket_sizes.json").read_text())
WAN = LatentGeometry(channels=16, stride_time=4, stride_space=8)
edges = st.integers(16, 4096)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['original']}-{case['edge']}-{case['align']}")
def test_sizes_equal_the_reference(case: dict[str, Any]) -> None:
    found = bucket_size(
        *case["original"], resolution=case["edge"], unit="pixel_area", multiple=case["align"], rounding=2
    )
    assert list(found) == case["target"]


def test_632_keeps_832x480() -> None:
    assert bucket_size(832, 480, resolution=632, unit="pixel_area", multiple=16, rounding=2) == (832, 480)


@given(width=edges, height=edges, resolution=st.integers(64, 1024), unit=st.sampled_from(["pixel_area", "pixel"]))
def test_a_turned_source_gets_the_turned_bucket_and_framing(
    width: int, height: int, resolution: int, unit: ResolutionType
) -> None:
    options: dict[str, Any] = {"resolution": resolution, "unit": unit, "multiple": 16, "rounding": 2}
    wide, high = bucket_size(width, height, **options)
    assert bucket_size(height, width, **options) == (high, wide)
    assert wide % 16 == 0
    assert high % 16 == 0
    upright = framing(width, height, Bucket(1, high, wide))
    turned = framing(height, width, Bucket(1, wide, high))
    assert (upright.width, upright.height, upright.left, upright.top) == (
        turned.height,
        turned.width,
        turned.top,
        turned.left,
    )


@given(width=edges, height=edges)
def test_the_cut_lies_inside_the_resized_picture_and_centred(width: int, height: int) -> None:
    wide, high = bucket_size(width, height, resolution=480, unit="pixel_area", multiple=16, rounding=2)
    made = framing(width, height, Bucket(1, high, wide))
    assert made.left >= 0
    assert made.top >= 0
    for whole, part, start in [(made.width, wide, made.left), (made.height, high, made.top)]:
        assert start + part <= whole
        assert abs(whole - part - 2 * start) <= 1
    assert made.width == wide or made.height == high, "no more is cut away than the aspect asks for"


def test_only_the_aspect_counts() -> None:
    options: dict[str, Any] = {"resolution": 480, "unit": "pixel_area", "multiple": 16, "rounding": 2}
    assert bucket_size(16, 9, **options) == bucket_size(1920, 1080, **options) == (640, 352)
    assert bucket_size(1, 1, **options) == (480, 480)
    assert bucket_size(0.75, 1, **options) == bucket_size(3, 4, **options)


@given(
    size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    multiple=st.sampled_from([8, 16, 32]),
    rounding=st.integers(0, 4),
    unit=st.sampled_from(["pixel_area", "pixel", "area"]),
)
def test_the_resolution_for_a_size_gives_exactly_that_size(
    size: tuple[int, int], multiple: int, rounding: int, unit: ResolutionType
) -> None:
    width, height = (side * multiple for side in size)
    found = resolution_for(width, height, unit=unit, multiple=multiple, rounding=rounding)
    if found is not None:
        sides = bucket_size(width, height, resolution=found, unit=unit, multiple=multiple, rounding=rounding)
        assert sides == (width, height)
        turned = resolution_for(height, width, unit=unit, multiple=multiple, rounding=rounding)
        assert turned == found
    if rounding == 4 and max(size) <= 2 * min(size):
        assert found is not None, "an aspect known this well has a resolution for every size"


@pytest.mark.parametrize(
    ("width", "height", "unit", "expected"),
    [(832, 480, "pixel_area", 632), (480, 832, "pixel", 480), (1280, 720, "area", 0.92), (1280, 720, "pixel", 720)],
)
def test_the_resolution_for_the_usual_sizes_is_a_round_number(
    width: int, height: int, unit: ResolutionType, expected: float
) -> None:
    assert resolution_for(width, height, unit=unit, multiple=16, rounding=2) == expected


def test_there_is_no_resolution_for_a_size_that_is_no_multiple() -> None:
    assert resolution_for(854, 480, unit="pixel_area", multiple=16, rounding=2) is None
    # The aspect 1.62 becomes 2 at no decimals: every resolution gives a size twice as wide as high.
    assert resolution_for(1296, 800, unit="pixel_area", multiple=16, rounding=0) is None


@given(width=edges, height=edges, resolution=st.integers(64, 2048), multiple=st.sampled_from([8, 16, 32]))
def test_no_side_is_further_from_the_exact_one_than_half_a_multiple(
    width: int, height: int, resolution: int, multiple: int
) -> None:
    sides = bucket_size(width, height, resolution=resolution, unit="pixel_area", multiple=multiple, rounding=2)
    aspect = round(max(width, height) / min(width, height), 2)
    exact = (resolution / math.sqrt(aspect), resolution * math.sqrt(aspect))
    for side, ideal in zip(sorted(sides), exact, strict=True):
        assert side % multiple == 0
        assert abs(side - ideal) <= multiple / 2 + 1e-6 or (side == multiple and ideal < multiple)


def test_pixel_means_the_shorter_edge_and_area_means_megapixels() -> None:
    assert bucket_size(1920, 1080, resolution=480, unit="pixel", multiple=16, rounding=2) == (848, 480)
    assert bucket_size(1920, 1080, resolution=0.4, unit="area", multiple=16, rounding=2) == (
        bucket_size(1920, 1080, resolution=math.sqrt(0.4e6), unit="pixel_area", multiple=16, rounding=2)
    )


@pytest.mark.parametrize("unit", ["pixel_area", "pixel", "area"])
def test_scaling_to_a_size_gives_that_size(unit: ResolutionType) -> None:
    factor = scale_to(1920, 1080, 0.25 if unit == "area" else 300, unit)
    expected = 0.25 if unit == "area" else 300
    assert measure(round(1920 * factor * 1e3), round(1080 * factor * 1e3), unit) / (1e6 if unit == "area" else 1e3) == (
        pytest.approx(expected, rel=1e-4)
    )


@given(frames=st.integers(1, 400), wanted=st.integers(1, 400))
def test_frames_fit_the_model_and_never_exceed_clip_or_wish(frames: int, wanted: int) -> None:
    found = bucket_frames(frames, wanted, WAN)
    assert found % 4 == 1
    assert min(frames, wanted) - 4 < found <= min(frames, wanted)


def test_75_frames_become_73() -> None:
    assert bucket_frames(200, 75, WAN) == 73
