"""Colours fitted on the run's own clips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tuner.errors import DataError
from tuner.spec import LatentGeometry
from tuner.testing.opened import opened
from tuner_preview.projection import _means, _middle, fit, solve

Settings = Callable[..., dict[str, Any]]


def test_it_is_the_least_squares_solution() -> None:
    draw = torch.Generator().manual_seed(0)
    places = torch.randn(500, 16, generator=draw)
    colours = places @ torch.randn(16, 3, generator=draw) * 0.1 + 0.4 + 0.05 * torch.randn(500, 3, generator=draw)
    found = solve(places, colours)
    expected, missed, _, _ = np.linalg.lstsq(np.c_[places.numpy(), np.ones(500)], colours.numpy(), rcond=None)
    np.testing.assert_allclose(found.matrix.numpy(), expected, atol=1e-3)
    spread = ((colours - colours.mean(0)) ** 2).sum()
    assert found.explained == pytest.approx(1 - float(missed.sum() / spread), abs=1e-3)


def test_channels_that_say_nothing_and_a_single_colour_are_no_fault() -> None:
    places = torch.zeros(40, 8)
    places[:, 0] = torch.linspace(-1, 1, 40)
    places[:, 1] = places[:, 0]
    found = solve(places, torch.full((40, 3), 0.25))
    assert found.explained == 1.0
    assert torch.allclose(found.colours(torch.randn(2, 8, 3, 4)), torch.tensor(0.25), atol=1e-5)
    assert solve(torch.zeros(4, 2), torch.rand(4, 3)).matrix.isfinite().all()


def test_each_latent_place_is_the_mean_of_its_pixels() -> None:
    frames = torch.rand(9, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    found = _means(frames, LatentGeometry(16, 4, 8))
    assert found.shape == (3, 2, 3, 3)
    torch.testing.assert_close(found[0, 1, 2], frames[0, 8:, 16:].mean((0, 1)))
    torch.testing.assert_close(found[2, 0, 1], frames[5:9, :8, 8:16].mean((0, 1, 2)))
    torch.testing.assert_close(_means(frames[:1], LatentGeometry(16, 4, 8))[0], found[0])


def test_it_shows_what_the_vae_shows(make_settings: Settings) -> None:
    """The toy's VAE is linear, so that its mean colours are: only what it clips is not."""
    with opened(make_settings()) as session:
        run, model = session.run, session.model
        assert run.cached is not None
        found, again = (fit(run.cached, model, run.device) for _ in range(2))
        latents = _middle(run.cached.video(run.cached.samples[0])["latents"])
        seen = model.decode(latents.unsqueeze(0)).float() / 255
        shown = found.colours(latents.transpose(0, 1)).permute(0, 2, 3, 1)
    assert torch.equal(found.matrix, again.matrix)
    assert found.explained > 0.95
    assert (shown - _means(seen, model.spec.latents)).abs().mean() < 0.03


def test_nothing_to_fit_on_is_an_error(make_settings: Settings) -> None:
    with opened(make_settings()) as session:

        class Empty:
            samples = ()

        with pytest.raises(DataError, match="fitted on"):
            fit(Empty(), session.model, session.run.device)  # type: ignore[arg-type]
