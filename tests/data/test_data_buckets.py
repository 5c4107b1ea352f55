"""Buckets: the published rule, its symmetry, and what the frame rule makes of lengths."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data.buckets import bucket_frames, bucket_size, framing, measure, scale_to
from tuner.data.samples import Bucket
from tuner.spec import LatentGeometry

GOLDEN = json.loads((Path(__file__).parent / "bucket_sizes.json").read_text())
WAN = LatentGeometry(channels=16, stride_time=4, stride_space=8)
edges = st.integers(16, 4096)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['original']}-{case['edge']}-{case['align']}")
def test_sizes_equal_the_reference(case: dict[str, object]) -> None:
    width, height = case["original"]  # type: ignore[misc]
    found = bucket_size(width, height, resolution=case["edge"], unit="pixel_area", multiple=case["align"], rounding=2)  # type: ignore[arg-type]
    assert list(found) == case["target"]


def test_632_keeps_832x480() -> None:
    assert bucket_size(832, 480, resolution=632, unit="pixel_area", multiple=16, rounding=2) == (832, 480)


@given(width=edges, height=edges, resolution=st.integers(64, 1024), unit=st.sampled_from(["pixel_area", "pixel"]))
def test_a_turned_source_gets_the_turned_bucket_and_framing(
    width: int, height: int, resolution: int, unit: str
) -> None:
    options = {"resolution": resolution, "unit": unit, "multiple": 16, "rounding": 2}
    wide, high = bucket_size(width, height, **options)  # type: ignore[arg-type]
    assert bucket_size(height, width, **options) == ((high, wide) if width != height else (wide, high))  # type: ignore[arg-type]
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


def test_a_square_crop_ignores_the_aspect() -> None:
    assert bucket_size(1920, 1080, resolution=480, unit="pixel", multiple=16, rounding=2, square=True) == (480, 480)


def test_pixel_means_the_shorter_edge_and_area_means_megapixels() -> None:
    assert bucket_size(1920, 1080, resolution=480, unit="pixel", multiple=16, rounding=2) == (848, 480)
    assert bucket_size(1920, 1080, resolution=0.4, unit="area", multiple=16, rounding=2) == (
        bucket_size(1920, 1080, resolution=math.sqrt(0.4e6), unit="pixel_area", multiple=16, rounding=2)
    )


@pytest.mark.parametrize("unit", ["pixel_area", "pixel", "area"])
def test_scaling_to_a_size_gives_that_size(unit: str) -> None:
    factor = scale_to(1920, 1080, 0.25 if unit == "area" else 300, unit)  # type: ignore[arg-type]
    expected = 0.25 if unit == "area" else 300
    assert measure(round(1920 * factor * 1e3), round(1080 * factor * 1e3), unit) / (1e6 if unit == "area" else 1e3) == (
        pytest.approx(expected, rel=1e-4)
    )  # type: ignore[arg-type]


@given(frames=st.integers(1, 400), wanted=st.integers(1, 400))
def test_frames_fit_the_model_and_never_exceed_clip_or_wish(frames: int, wanted: int) -> None:
    found = bucket_frames(frames, wanted, WAN)
    assert found % 4 == 1
    assert min(frames, wanted) - 4 < found <= min(frames, wanted)


def test_75_frames_become_73() -> None:
    assert bucket_frames(200, 75, WAN) == 73
