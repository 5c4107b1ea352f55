"""Flow matching, for any family: noise levels, shift, noisy latents, targets, loss.

With sigma in [0, 1]: noisy = (1 - sigma) * latents + sigma * noise, target = noise - latents, and the
network's time is 1000 * sigma, continuous and float32 (Lipman et al., arXiv:2210.02747; Esser et al.,
arXiv:2403.03206 for the logit-normal density and the shift).
"""

from __future__ import annotations

import math
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner import rng
from tuner.errors import ConfigError
from tuner.model import Batch, Loss

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tuner.config.keys import CoreConfig
    from tuner.spec import NetworkSpec

AUTO_SHIFT_TOKENS = (256, 4096)
AUTO_SHIFT_MU = (0.5, 1.15)
LEAST_WEIGHTED = 1e-3
"""The noise level that ``sigma_sqrt`` weighs most: below it the weight would grow without end."""


def check(core: CoreConfig, networks: Sequence[NetworkSpec] = ()) -> None:
    """Refuse flow keys that contradict one another, or the noise levels of ``networks``. Raises ConfigError."""
    if core.flow_schedule_auto_shift and core.flow_schedule_shift is not None:
        raise ConfigError(
            f"flow_schedule_auto_shift is on and flow_schedule_shift is {core.flow_schedule_shift:g}: choose one",
            remedy="drop flow_schedule_shift to derive the shift from the clip's size, "
            "or set flow_schedule_auto_shift to false",
        )
    if core.flow_custom_timesteps is not None:
        bad = [time for time in core.flow_custom_timesteps if not 0 <= time <= 1000]
        if bad or not core.flow_custom_timesteps:
            raise ConfigError(
                f"flow_custom_timesteps holds {bad[0] if bad else 'nothing'}",
                allowed="one or more numbers from 0 to 1000",
            )
        for network in networks:
            _check_custom(core.flow_custom_timesteps, network, len(networks))


def _check_custom(times: Sequence[float], network: NetworkSpec, networks: int) -> None:
    """Every custom timestep must belong to the network that is trained, or each of several must have some."""
    inside = [time for time in times if _holds(network.sigma_range, time / 1000)]
    if not inside or (networks == 1 and len(inside) < len(times)):
        outside = next((time for time in times if time not in inside), times[0])
        low, high = network.sigma_range
        raise ConfigError(
            f"flow_custom_timesteps holds {outside:g}, and {network.label or network.name} is trained on "
            f"{1000 * low:g} to {1000 * high:g}",
            remedy="leave out the timesteps of the other expert",
        )


def _holds(sigma_range: tuple[float, float], sigma: float) -> bool:
    """Whether a range of noise levels, half open below 1, holds ``sigma``."""
    low, high = sigma_range
    return low <= sigma < high or sigma == high == 1.0


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """sigma' = s * sigma / (1 + (s - 1) * sigma), elementwise; s = 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The noise level before the shift that maps to ``sigma``: the pre-shift boundary of an expert."""
    return sigma / (shift - (shift - 1) * sigma)


def auto_shift(tokens: int) -> float:
    """Shift for a sample of ``tokens`` tokens: exp(mu), mu linear in the tokens, which are clamped to [256, 4096].

    Unclamped, long videos would train on noise only (832x480x81 gives a shift of 404).
    """
    low, high = AUTO_SHIFT_TOKENS
    share = (min(max(tokens, low), high) - low) / (high - low)
    return math.exp(AUTO_SHIFT_MU[0] + share * (AUTO_SHIFT_MU[1] - AUTO_SHIFT_MU[0]))


def draw_sigma(
    core: CoreConfig, generator: torch.Generator, tokens: int, sigma_range: tuple[float, float] = (0.0, 1.0)
) -> float:
    """One noise level in ``sigma_range``, by the first of: custom timesteps, beta, uniform, logit-normal; then shifted.

    The range (an expert's) holds after the shift and is met exactly, by drawing from the truncated
    distribution through its inverse: no sample is rejected or clipped.
    """
    if core.flow_custom_timesteps:
        times = _custom(core.flow_custom_timesteps, sigma_range)
        return times[int(torch.randint(len(times), (), generator=generator))]
    return sigma_at(core, float(torch.rand((), generator=generator, dtype=torch.float64)), tokens, sigma_range)


def _custom(times: Sequence[float], sigma_range: tuple[float, float]) -> list[float]:
    """The noise levels of the custom timesteps that are in the range, as they are listed."""
    return [time / 1000 for time in times if _holds(sigma_range, time / 1000)]


def sigma_at(core: CoreConfig, uniform: float, tokens: int, sigma_range: tuple[float, float] = (0.0, 1.0)) -> float:
    """The noise level below which a share ``uniform``, in [0, 1), of all that are drawn lies: a quantile."""
    if core.flow_custom_timesteps:
        times = sorted(_custom(core.flow_custom_timesteps, sigma_range))
        return times[int(uniform * len(times))]
    shift = auto_shift(tokens) if core.flow_schedule_auto_shift else core.flow_schedule_shift or 1.0
    low, high = (unshift_sigma(bound, shift) for bound in sigma_range)
    if core.flow_use_beta_schedule:
        from scipy.stats import beta

        density = beta(core.flow_beta_schedule_alpha, core.flow_beta_schedule_beta)
        bottom, top = density.cdf(low), density.cdf(high)
        sigma = float(density.ppf(bottom + uniform * (top - bottom)))
    elif core.flow_use_uniform_schedule:
        sigma = low + uniform * (high - low)
    else:
        sigma = _logit_normal(uniform, low, high, core.flow_sigmoid_scale)
    return float(shift_sigmas(torch.tensor(sigma, dtype=torch.float64), shift))


def quantiles(core: CoreConfig, count: int, tokens: int, sigma_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Noise levels (count,) float32, ascending: the quantiles (i + 0.5) / count of those that are drawn."""
    levels = [sigma_at(core, (index + 0.5) / count, tokens, sigma_range) for index in range(count)]
    return _inside(torch.tensor(levels, dtype=torch.float32), sigma_range)


def _logit_normal(uniform: float, low: float, high: float, scale: float) -> float:
    """Inverse of the distribution function of sigmoid(scale * N(0, 1)), truncated to [low, high], at ``uniform``."""
    bounds = torch.special.logit(torch.tensor([low, high], dtype=torch.float64)) / scale
    bottom, top = torch.special.ndtr(bounds).tolist()
    normal = torch.special.ndtri(torch.tensor(bottom + uniform * (top - bottom), dtype=torch.float64))
    return float(torch.sigmoid(scale * normal))


def draw(
    core: CoreConfig,
    *,
    step: int,
    positions: Sequence[int],
    latents: Tensor,
    tokens: int,
    sigma_range: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) float32 and noise of the shape and type of ``latents`` (B, C, F', h, w), both on the CPU.

    Each sample has generators of its own.

    They depend on (seed, step, position in the global batch) alone: not on the process, the device or
    the other samples.
    """
    sigmas = [_sigma_of(core, step, at, tokens, sigma_range) for at in positions]
    noise = [
        torch.randn(latents.shape[1:], generator=rng.generator(core.seed, "noise", step, at), dtype=torch.float32)
        for at in positions
    ]
    return (
        _inside(torch.tensor(sigmas, dtype=torch.float32), sigma_range),
        torch.stack(noise).to(latents.dtype),
    )


def _sigma_of(core: CoreConfig, step: int, position: int, tokens: int, sigma_range: tuple[float, float]) -> float:
    """The noise level of one sample, from its own generator, or its turn among the custom timesteps."""
    if core.flow_custom_timesteps and core.flow_custom_timesteps_order == "round_robin":
        times = _custom(core.flow_custom_timesteps, sigma_range)
        return times[(step + position) % len(times)]
    return draw_sigma(core, rng.generator(core.seed, "sigma", step, position), tokens, sigma_range)


def loss_weights(core: CoreConfig, sigmas: Tensor) -> Tensor | None:
    """Weights (B,) of the losses at noise levels ``sigmas`` (B,) by ``loss_weighting``; None where all count alike.

    Esser et al., arXiv:2403.03206, section 3.1.
    """
    if core.loss_weighting == "sigma_sqrt":
        return sigmas.clamp_min(LEAST_WEIGHTED) ** -2
    if core.loss_weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return None


def _inside(sigmas: Tensor, sigma_range: tuple[float, float]) -> Tensor:
    """Float32 ``sigmas``, where rounding took one over a boundary put back to the nearest number inside it."""
    low, high = sigma_range
    floor, ceiling = (torch.tensor(bound, dtype=torch.float32) for bound in sigma_range)
    if float(floor) < low:
        floor = torch.nextafter(floor, torch.tensor(1.0))
    if high < 1.0 and float(ceiling) >= high:
        ceiling = torch.nextafter(ceiling, torch.tensor(0.0))
    return sigmas.clamp(floor, ceiling)


def mix(latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """(noisy, target) for latents and noise (B, C, F', h, w) and float32 ``sigmas`` (B,)."""
    level = sigmas.view(-1, *[1] * (latents.ndim - 1))
    return (1 - level) * latents + level * noise, noise - latents


def loss(core: CoreConfig, prediction: Tensor, batch: Batch) -> Loss:
    """Distance of ``prediction`` from ``batch.target`` (B, C, F', h, w), in float32, mean over all but the batch.

    With a mask m the mean is a weighted one, sum(m * distance) / sum(m): a small mask gives a loss as large as a
    large one does. Where m is 1 everywhere it changes nothing. A sample whose mask is 0 everywhere has the loss 0.
    """
    distance = _distance(core, prediction.float() - batch.target.float())
    if batch.mask is None:
        per_sample = distance.flatten(1).mean(1)
    else:
        weight = batch.mask.flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        per_sample = (batch.mask * distance).flatten(1).mean(1) / weight
    weights = loss_weights(core, batch.sigmas)
    return Loss(per_sample=per_sample if weights is None else per_sample * weights)


def _distance(core: CoreConfig, difference: Tensor) -> Tensor:
    """Elementwise loss of ``difference`` by ``loss_type``."""
    if core.loss_type == "l2":
        return difference.square()
    c = core.huber_c
    root = (difference.square() + c * c).sqrt() - c
    return 2 * c * root if core.loss_type == "huber" else 2 * root


def watch(scheduler: Any, predicted: Callable[[int, Tensor], None]) -> None:
    """Have one of diffusers' flow-matching schedulers tell what each step predicts, for the life of the scheduler.

    ``predicted`` is called after each step with the number of steps done and the clean latents, float32, in the shape
    in which the pipeline holds its latents: noisy - sigma * velocity, with the sigma that the network was asked at.
    """
    step, done = scheduler.step, 0

    @wraps(step)
    def watched(velocity: Tensor, time: Any, noisy: Tensor, *args: Any, **named: Any) -> Any:
        nonlocal done
        stepped = step(velocity, time, noisy, *args, **named)
        done += 1
        predicted(done, noisy.float() - scheduler.sigmas[scheduler.step_index - 1] * velocity.float())
        return stepped

    scheduler.step = watched
