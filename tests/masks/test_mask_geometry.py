"""Masks at the size of latents: arithmetic, held against plain NumPy and against torch's own patch embedding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tuner.builtin.datasets.mask_weights import brightness, forced_tokens, to_latents
from tuner.spec import LatentGeometry

GEOMETRIES = st.builds(
    LatentGeometry, channels=st.just(4), stride_time=st.sampled_from([1, 4, 8]), stride_space=st.sampled_from([1, 2, 8])
)


@given(GEOMETRIES, st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_each_cell_is_the_mean_of_the_pixels_it_covers(
    latents: LatentGeometry, more: int, rows: int, columns: int, seed: int
) -> None:
    time, space = latents.stride_time, latents.stride_space
    frames = 1 + more * time
    values = np.random.default_rng(seed).random((frames, rows * space, columns * space), np.float32)
    found = to_latents(torch.from_numpy(values), latents)
    assert tuple(found.shape[1:]) == latents.shape(frames, rows * space, columns * space)[1:]
    for cell in np.ndindex(more + 1, rows, columns):
        k, y, x = cell
        covered = slice(0, 1) if k == 0 else slice((k - 1) * time + 1, k * time + 1)
        pixels = values[covered, y * space : (y + 1) * space, x * space : (x + 1) * space]
        assert float(found[0, k, y, x]) == pytest.approx(pixels.astype(np.float64).mean(), abs=1e-6)


def test_a_mask_of_one_value_keeps_it() -> None:
    latents = LatentGeometry(16, 4, 8)
    assert to_latents(torch.ones(9, 64, 96), latents).eq(1).all()
    assert to_latents(torch.zeros(1, 64, 96), latents).eq(0).all()


def pixels_of(*colours: tuple[int, int, int]) -> torch.Tensor:
    """(3, 1, 1, n) in [-1, 1]."""
    return torch.tensor(colours).T.reshape(3, 1, 1, -1) / 127.5 - 1


def test_brightness_of_grey_is_the_grey_and_of_a_pure_colour_whole() -> None:
    seen = brightness(pixels_of((128, 128, 128), (255, 255, 255), (255, 0, 0), (0, 255, 0)), "mask").flatten()
    torch.testing.assert_close(seen, torch.tensor([128 / 255, 1, 1, 1]))


@pytest.mark.parametrize("role", ["mask", "segmentation"])
def test_what_lossy_video_makes_of_black_is_black(role: str) -> None:
    assert brightness(pixels_of((0, 0, 0), (3, 1, 2), (7, 7, 7)), role).eq(0).all()


def test_any_colour_of_a_segmentation_counts_wholly() -> None:
    seen = brightness(pixels_of((20, 0, 0), (0, 0, 200), (90, 90, 90), (0, 0, 0)), "segmentation")
    assert seen.flatten().tolist() == [1, 1, 1, 0]


@given(
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3])),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 2**32 - 1),
)
def test_forced_tokens_stand_where_the_networks_patches_do(
    patch: tuple[int, int, int], grid: tuple[int, int, int], seed: int
) -> None:
    """One bright cell forces the very token that a convolution over patches makes of it."""
    size = [count * side for count, side in zip(grid, patch, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(1, *size, generator=generator) < 0.2).float()
    embedding = nn.Conv3d(1, 1, patch, stride=patch, bias=False)
    nn.init.ones_(embedding.weight)
    tokens = embedding(weights.unsqueeze(0)).flatten(2).transpose(1, 2)[0, :, 0]
    assert torch.equal(forced_tokens(weights, patch), tokens > 0.5)


def test_a_token_is_forced_from_half_brightness_on() -> None:
    weights = torch.tensor([0.49, 0.5, 0.0, 1.0]).reshape(1, 1, 1, 4)
    assert forced_tokens(weights, (1, 1, 1)).tolist() == [False, True, False, True]
    assert forced_tokens(weights, (1, 1, 2)).tolist() == [True, True]
