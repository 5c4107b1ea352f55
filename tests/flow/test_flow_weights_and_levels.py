"""Weights by noise level, timesteps in turn, and the histogram of what was trained."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from tuner import flow
from tuner.builtin.noise_levels import NoiseLevelsConfig, NoiseLevelsPlugin
from tuner.builtin.noise_levels.histogram import Histogram
from tuner.config.keys import CoreConfig
from tuner.model import Loss

SIGMAS = torch.tensor([0.02, 0.25, 0.5, 0.875, 1.0])


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_are_diffusers_own(scheme: str) -> None:
    weights = flow.loss_weights(CoreConfig(loss_weighting=scheme), SIGMAS)
    assert weights is not None
    assert torch.allclose(weights, compute_loss_weighting_for_sd3(scheme, SIGMAS))


def batch_of(sigmas: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(len(sigmas), 4, 2, 3, 3, generator=generator)
    return SimpleNamespace(target=target, mask=mask, sigmas=sigmas)


def test_a_weight_multiplies_each_samples_loss_and_none_changes_no_bit() -> None:
    batch = batch_of(SIGMAS)
    prediction = torch.zeros_like(batch.target)
    plain = flow.loss(CoreConfig(), prediction, batch).per_sample
    assert torch.equal(plain, batch.target.square().flatten(1).mean(1))
    weighted = flow.loss(CoreConfig(loss_weighting="cosmap"), prediction, batch).per_sample
    exact = (
        batch.target.double().square().flatten(1).mean(1)
        * 2
        / (torch.pi * (1 - 2 * SIGMAS.double() + 2 * SIGMAS.double() ** 2))
    )
    assert torch.allclose(weighted.double(), exact, rtol=1e-6)


def test_the_weight_stays_finite_without_noise() -> None:
    weights = flow.loss_weights(CoreConfig(loss_weighting="sigma_sqrt"), torch.tensor([0.0]))
    assert weights is not None
    assert weights.isfinite().all()


def test_custom_timesteps_in_turn_are_all_trained_equally_often() -> None:
    core = CoreConfig(flow_custom_timesteps=[900, 600, 300], flow_custom_timesteps_order="round_robin")
    latents = torch.zeros(2, 1, 1, 1, 1)
    seen = Counter(
        round(float(sigma), 3)
        for step in range(6)
        for sigma in flow.draw(core, step=step, positions=(0, 1), latents=latents, tokens=9)[0]
    )
    assert seen == {0.9: 4, 0.6: 4, 0.3: 4}


def test_the_histogram_counts_and_averages() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([0.05, 0.31, 0.39]), torch.tensor([1.0, 2.0, 4.0]))
    histogram.add(torch.tensor([1.0, 0.0]), torch.tensor([8.0, 3.0]))
    kept = {name: value.clone() for name, value in histogram.state().items()}
    expected = {"samples/0": 2, "loss/0": 2, "samples/0.3": 2, "loss/0.3": 3, "samples/0.9": 1, "loss/0.9": 8}
    assert histogram.take() == expected
    assert histogram.take() == {}
    histogram.load(kept)
    assert histogram.take() == expected


def test_the_plugin_counts_what_the_optimizer_gets_and_keeps_its_graph() -> None:
    plugin = NoiseLevelsPlugin("noise_levels", NoiseLevelsConfig(noise_levels_interval=3))
    assert [step for step in range(1, 8) if plugin.validates_at(step, 0)] == [3, 6]
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    wrapper = plugin.compute_loss(
        run=SimpleNamespace(process_index=0, sharing=1), batch=SimpleNamespace(sigmas=torch.tensor([0.41, 0.44]))
    )
    next(wrapper)
    with pytest.raises(StopIteration) as done:
        wrapper.send(Loss(per_sample=losses * 2))
    assert done.value.value.per_sample.requires_grad
    assert plugin.validate(run=SimpleNamespace(step=2)) is None
    assert dict(plugin.validate(run=SimpleNamespace(step=3)).metrics) == {"samples/0.4": 2, "loss/0.4": 4}
