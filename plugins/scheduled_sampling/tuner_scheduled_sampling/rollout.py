"""The rollout: from a noisier level down to the one that is trained, by the model's own steps.

A sample at noise level sigma is started k sampler steps earlier, at x = (1 - sigma_k) * x0 + sigma_k * noise, and
brought down to sigma without gradient. What is trained there is the velocity that leads from the point x that was
reached to the clean latents: target = (x - x0) / sigma. Without a rollout that is noise - x0, as ever.

Levels are exact: the sampler's levels are evenly spaced before the shift s, so with u = sigma / (s - (s - 1) * sigma)
the level of j steps earlier is that of u + j / n, shifted: no table, no rounding to it (float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuner import flow
from tuner.data.transfer import sent
from tuner.model import Batch, Loss, Model

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner_scheduled_sampling import ScheduledSamplingConfig

PURPOSE = "scheduled_sampling"
LEAST_SIGMA = 1e-3
"""Below it the target would be a division by nearly nothing: such samples are trained as ever."""
TRAIN_TIMES = 1000
Step = Callable[[Tensor, Tensor, int], Tensor]
"""(velocity, state, steps left) -> the state one step further, each (1, C, F', h, w)."""


def share(config: ScheduledSamplingConfig, step: int) -> float:
    """The share of samples that are rolled out in optimizer step ``step`` (from 0)."""
    begun = step - config.scheduled_sampling_start_step
    if begun < 0:
        return 0.0
    full = config.scheduled_sampling_probability
    end = full if config.scheduled_sampling_prob_end is None else config.scheduled_sampling_prob_end
    if not config.scheduled_sampling_ramp_steps:
        return full
    done = min(1.0, begun / config.scheduled_sampling_ramp_steps)
    if config.scheduled_sampling_ramp_shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return config.scheduled_sampling_prob_start + (end - config.scheduled_sampling_prob_start) * done


def levels(sigma: float, offset: int, steps: int, shift: float) -> list[float]:
    """Noise levels from ``offset`` sampler steps before ``sigma`` down to ``sigma`` itself: offset + 1 of them."""
    unshifted = flow.unshift_sigma(sigma, shift)
    earlier = (unshifted + index / steps for index in range(offset, 0, -1))
    return [*(shift * each / (1 + (shift - 1) * each) for each in earlier), sigma]


def roll_out(config: ScheduledSamplingConfig, run: Run, model: Model, batch: Batch) -> int:
    """Replace ``batch.noisy`` and ``batch.target`` (B, C, F', h, w) of the samples that are rolled out.

    Returns how many forwards of the network that took. What is random depends on seed, step and position alone.
    """
    network = model.network
    tokens = network.spec.tokens(*batch.latents.shape[2:])
    core = run.config
    shift = flow.auto_shift(tokens) if core.flow_schedule_auto_shift else core.flow_schedule_shift or 1.0
    sigmas = batch.levels or batch.sigmas.tolist()
    highest = flow.unshift_sigma(network.spec.sigma_range[1], shift)
    offsets = [
        _offset(config, run, position, highest - flow.unshift_sigma(sigma, shift)) if sigma > LEAST_SIGMA else 0
        for sigma, position in zip(sigmas, batch.positions, strict=True)
    ]
    longest = max(offsets)
    if longest == 0:
        return 0
    steps = config.scheduled_sampling_num_inference_steps
    paths = [levels(sigma, offset, steps, shift) for sigma, offset in zip(sigmas, offsets, strict=True)]
    make = _unipc if config.scheduled_sampling_sampler == "unipc" else _euler
    samplers = [make(path) for path in paths]
    start = torch.tensor([path[0] for path in paths], dtype=torch.float32)
    start = sent(start, batch.sigmas.device)
    state, _ = flow.mix(batch.latents, batch.noise, start)
    with network.inference():
        for left in range(longest, 0, -1):
            now = torch.tensor([path[-1 - min(left, len(path) - 1)] for path in paths], dtype=torch.float32)
            velocity = model.predict(replace(batch, noisy=state, sigmas=sent(now, batch.sigmas.device))).to(state.dtype)
            moved = [
                sampler(velocity[at : at + 1], state[at : at + 1], left) if left <= offset else state[at : at + 1]
                for at, (sampler, offset) in enumerate(zip(samplers, offsets, strict=True))
            ]
            state = torch.cat(moved)
    _put(batch, state, torch.tensor([offset > 0 for offset in offsets]))
    return longest


def _offset(config: ScheduledSamplingConfig, run: Run, position: int, room: float) -> int:
    """How many steps a sample is rolled out; ``room``: to the highest level, before the shift."""
    generator = run.rng(PURPOSE, position)
    chosen, drawn = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    most = min(
        config.scheduled_sampling_max_step_offset, int(room * config.scheduled_sampling_num_inference_steps + 1e-9)
    )
    if chosen >= share(config, run.step) or most == 0:
        return 0
    if config.scheduled_sampling_strategy == "biased_early":
        drawn = drawn * drawn
    elif config.scheduled_sampling_strategy == "biased_late":
        drawn = math.sqrt(drawn)
    return 1 + int(drawn * most)


def _euler(path: Sequence[float]) -> Step:
    """Euler's steps along ``path``: x + (sigma_next - sigma) * velocity."""
    return lambda velocity, state, left: state + (path[-left] - path[-left - 1]) * velocity


def _unipc(path: Sequence[float]) -> Step:
    """The steps of diffusers' UniPC along the very levels of ``path``."""
    from diffusers import UniPCMultistepScheduler

    scheduler: Any = UniPCMultistepScheduler(
        num_train_timesteps=TRAIN_TIMES, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(len(path))
    scheduler.sigmas = torch.tensor([*path, 0.0], dtype=torch.float32)
    scheduler.timesteps = torch.arange(len(path), 0, -1)

    def step(velocity: Tensor, state: Tensor, left: int) -> Tensor:
        moved: Tensor = scheduler.step(velocity, scheduler.timesteps[len(path) - 1 - left], state, return_dict=False)[0]
        return moved

    return step


def _put(batch: Batch, reached: Tensor, rolled: Tensor) -> None:
    """Train the samples ``rolled`` (B,) bool from the points ``reached``; the others stay as they are, bit for bit."""
    where = sent(rolled, reached.device).view(-1, *[1] * (reached.ndim - 1))
    sigma = batch.sigmas.clamp(min=LEAST_SIGMA).view(-1, *[1] * (reached.ndim - 1)).to(reached.dtype)
    batch.noisy = torch.where(where, reached, batch.noisy)
    batch.target = torch.where(where, (reached - batch.latents) / sigma, batch.target)


def with_cost(loss: Loss, forwards: int) -> Loss:
    """The loss with the number of extra forwards among its numbers, for the log."""
    return replace(loss, metrics={**loss.metrics, f"{PURPOSE}/forwards": torch.tensor(float(forwards))})
