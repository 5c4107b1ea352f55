"""Noise levels, shift, noise and loss, against figures and formulas computed elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tuner import flow, rng
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.model import Batch

GOLDEN = Path(__file__).parent / "golden"
DRAWS = 4000


def golden(name: str) -> list[dict]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("case", golden("flow_shift"), ids=lambda case: f"shift {case['shift']}")
def test_shift_matches_independent_figures(case):
    shifted = flow.shift_sigmas(torch.tensor(case["sigma"], dtype=torch.float64), case["shift"])
    assert shifted.tolist() == pytest.approx(case["out"], abs=1e-12)


@pytest.mark.parametrize("case", golden("boundary_pre_shift"), ids=str)
def test_boundary_before_the_shift(case):
    assert flow.unshift_sigma(case["boundary"], case["shift"]) == pytest.approx(case["u"], abs=1e-12)


@pytest.mark.parametrize("case", golden("auto_shift"), ids=str)
def test_auto_shift_matches_independent_figures(case):
    _, _, frames, height, width = case["latent_shape"]
    assert flow.auto_shift(frames * (height // 2) * (width // 2)) == pytest.approx(case["implied_shift"], rel=1e-6)


def test_auto_shift_is_clamped_for_long_videos():
    assert flow.auto_shift(32_760) == pytest.approx(math.exp(1.15))
    assert flow.auto_shift(10) == pytest.approx(math.exp(0.5))


def sigmas(core: CoreConfig, sigma_range=(0.0, 1.0), tokens=1000) -> list[float]:
    return [flow.draw_sigma(core, rng.generator(0, "test", at), tokens, sigma_range) for at in range(DRAWS)]


@pytest.mark.parametrize(
    ("keys", "distribution"),
    [
        ({}, lambda x: stats.norm.cdf(math.log(x / (1 - x)))),
        ({"flow_sigmoid_scale": 0.5}, lambda x: stats.norm.cdf(math.log(x / (1 - x)) / 0.5)),
        ({"flow_use_uniform_schedule": True}, lambda x: x),
        (
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 2.0, "flow_beta_schedule_beta": 3.0},
            stats.beta(2, 3).cdf,
        ),
    ],
)
def test_each_schedule_draws_its_distribution(keys, distribution):
    drawn = sigmas(CoreConfig(**keys))
    assert stats.kstest(drawn, lambda values: np.array([distribution(value) for value in values])).pvalue > 0.01


def test_shift_moves_the_drawn_levels():
    plain, shifted = sigmas(CoreConfig()), sigmas(CoreConfig(flow_schedule_shift=3.0))
    expected = [3 * value / (1 + 2 * value) for value in plain]
    assert shifted == pytest.approx(expected, abs=1e-9)


def test_a_range_holds_after_the_shift_and_is_not_clipped():
    drawn = sigmas(CoreConfig(flow_schedule_shift=5.0), sigma_range=(0.9, 1.0))
    assert min(drawn) >= 0.9
    assert len(set(drawn)) == DRAWS  # clipping would pile samples up at the boundary


def test_custom_timesteps_are_the_only_ones_drawn():
    assert set(sigmas(CoreConfig(flow_custom_timesteps=[1000, 250.0]))) == {1.0, 0.25}


def test_contradicting_keys_are_refused():
    with pytest.raises(ConfigError, match="flow_schedule_auto_shift"):
        flow.check(CoreConfig(flow_schedule_auto_shift=True, flow_schedule_shift=3))
    with pytest.raises(ConfigError, match="1200"):
        flow.check(CoreConfig(flow_custom_timesteps=[1200]))


def test_noise_belongs_to_the_position_not_to_the_batch():
    core, latents = CoreConfig(), torch.zeros(2, 4, 1, 2, 2)
    pair_sigmas, pair = flow.draw(core, step=3, positions=(0, 1), latents=latents, tokens=8)
    alone_sigmas, alone = flow.draw(core, step=3, positions=(1,), latents=latents[:1], tokens=8)
    assert torch.equal(pair[1], alone[0])
    assert pair_sigmas[1] == alone_sigmas[0]
    assert not torch.equal(pair[0], pair[1])
    _, later = flow.draw(core, step=4, positions=(1,), latents=latents[:1], tokens=8)
    assert not torch.equal(later, alone)


def test_noisy_latents_and_target():
    clean, noise = torch.full((1, 2, 1, 1, 1), 2.0), torch.full((1, 2, 1, 1, 1), 10.0)
    noisy, target = flow.mix(clean, noise, torch.tensor([0.25]))
    assert noisy.unique().tolist() == [4.0]
    assert target.unique().tolist() == [8.0]


@pytest.mark.parametrize(
    ("loss_type", "formula"),
    [
        ("l2", lambda d: d * d),
        ("huber", lambda d: 2 * 0.1 * (math.sqrt(d * d + 0.01) - 0.1)),
        ("smooth_l1", lambda d: 2 * (math.sqrt(d * d + 0.01) - 0.1)),
    ],
)
def test_loss_is_per_sample_float32_and_follows_its_formula(loss_type, formula):
    target = torch.zeros(2, 3, 1, 2, 2)
    prediction = torch.stack([torch.full_like(target[0], 0.5), torch.full_like(target[0], -2.0)]).to(torch.bfloat16)
    batch = Batch(*[target] * 1, {}, {}, ("a", "b"), (0, 1), target, target, target, target)
    loss = flow.loss(CoreConfig(loss_type=loss_type, huber_c=0.1), prediction, batch)
    assert loss.per_sample.dtype == torch.float32
    assert loss.per_sample.tolist() == pytest.approx([formula(0.5), formula(-2.0)], rel=1e-6)
