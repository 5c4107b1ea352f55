"""Masks in the cache: encoded once, found again, never stale; what would train nothing is left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuner.errors import DataError
from tuner.testing.opened import opened

Settings = Callable[..., dict[str, Any]]
Half = Callable[..., np.ndarray]


def mask_entries(folder: Path) -> dict[Path, int]:
    """Mask entries under ``folder``, and when each was written."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if file.metadata()["kind"] == "mask":
                found[path] = path.stat().st_mtime_ns
    return found


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_masks_are_encoded_once(masks: Any, make_settings: Settings, bright_half: Half, cache: Path) -> None:
    masks.picture("clip 0.png", bright_half())
    masks.clip("clip 1.mkv", [bright_half()] * 9)
    with opened(make_settings()) as session:
        assert session.run.cached.encoded == 2 + 2 + 3  # clips, masks, captions with the empty one
    before = mask_entries(cache)
    assert len(before) == 2
    with opened(make_settings()) as session:
        assert session.run.cached.encoded == 0
    assert mask_entries(cache) == before


def test_each_view_of_a_held_out_clip_has_its_mask(
    masks: Any, make_settings: Settings, bright_half: Half, toy_folder: Path
) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half())
    held_out = {
        "id": "held-out",
        "dataset_type": "eval",
        "instance_data_dir": str(toy_folder / "clips"),
        "conditioning_data": "masks",
        "resolution": 64,
        "video": {"num_frames": 9},
    }
    with opened(make_settings(more=[held_out])) as session:
        cached = session.run.cached
        assert len(cached.prepared.held_out) == 2
        assert all(cached.mask(sample) is not None for sample in cached.prepared.held_out)


def test_another_mask_or_role_is_another_entry(
    masks: Any, make_settings: Settings, bright_half: Half, cache: Path
) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half(100))

    def means(**conditioning: Any) -> list[float]:
        with opened(make_settings(conditioning=conditioning)) as session:
            return [
                round(float(session.run.cached.mask(each).weights.mean()), 3) for each in session.run.cached.samples
            ]

    assert means() == pytest.approx([100 / 255 / 2] * 2, abs=0.01)
    assert means(conditioning_type="segmentation") == pytest.approx([0.5] * 2, abs=0.02)
    masks.picture("clip 1.png", bright_half(200))
    assert means() == pytest.approx([100 / 255 / 2, 200 / 255 / 2], abs=0.01)
    assert len(mask_entries(cache)) == 1 + 1 + 1, "clips that share mask, size and view share the entry"


def test_a_damaged_mask_is_made_anew(masks: Any, make_settings: Settings, bright_half: Half, cache: Path) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", bright_half())
    with opened(make_settings()):
        pass
    (entry,) = mask_entries(cache)
    whole, data = load_file(entry), entry.read_bytes()
    entry.write_bytes(data[:-1])
    with opened(make_settings()) as session:
        assert (session.run.cached.encoded, session.run.cached.rebuilt) == (1, 1)
    made = load_file(entry)
    assert all(torch.equal(made[name], tensor) for name, tensor in whole.items())


def test_a_black_mask_leaves_its_clip_out(
    masks: Any, make_settings: Settings, bright_half: Half, caplog: pytest.LogCaptureFixture
) -> None:
    masks.picture("clip 0.png", bright_half())
    masks.clip("clip 1.mkv", [np.full((64, 96), 4, np.uint8)] * 9)
    with caplog.at_level(logging.WARNING), opened(make_settings()) as session:
        cached = session.run.cached
    assert [sample.path.stem for sample in cached.samples] == ["clip 0"]
    (dropped,) = cached.prepared.report.datasets[0].dropped
    assert dropped.path.stem == "clip 1"
    assert "clip 1.mkv is black everywhere" in dropped.detail
    assert "clip 1.mkv is black everywhere" in caplog.text


def test_black_masks_alone_are_an_error(masks: Any, make_settings: Settings) -> None:
    for index in range(2):
        masks.picture(f"clip {index}.png", np.zeros((64, 96), np.uint8))
    with pytest.raises(DataError, match="black everywhere"), opened(make_settings()):
        pass


def test_a_mask_moves_with_its_clip(masks: Any, make_settings: Settings, cache: Path) -> None:
    """A mask bright in one frame alone is bright in the one latent frame that covers it."""
    frames = [np.zeros((64, 96), np.uint8) for _ in range(9)]
    frames[6][:] = 255
    for index in range(2):
        masks.clip(f"clip {index}.mkv", frames)
    with opened(make_settings()) as session:
        mask = session.run.cached.mask(session.run.cached.samples[0])
        spec = session.model.spec
    torch.testing.assert_close(mask.weights.mean((0, 2, 3)), torch.tensor([0, 0, 0.25]), atol=1e-3, rtol=0)
    assert not mask.forced.any(), "a quarter is less than half"
    assert mask.forced.shape == (spec.networks[0].tokens(*mask.weights.shape[1:]),)


def test_a_mask_of_half_the_size_covers_the_same(masks: Any, make_settings: Settings, bright_half: Half) -> None:
    masks.picture("clip 0.png", bright_half())
    masks.picture("clip 1.png", bright_half(width=48, height=32))
    with opened(make_settings()) as session:
        whole, small = (session.run.cached.mask(sample) for sample in session.run.cached.samples)
    torch.testing.assert_close(small.weights, whole.weights, atol=0.1, rtol=0)
    assert torch.equal(small.forced, whole.forced)
