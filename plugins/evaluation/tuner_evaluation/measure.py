"""The loss on held-out samples: each at the same noise levels and with the same noise whenever it is measured.

So a curve shows the weights alone, and those of two runs with one seed can be laid over one another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from tuner import flow, rng
from tuner.builtin.progress import progress
from tuner.data.loader import collate_text
from tuner.model import Batch, Model
from tuner.train.turns import hand_over

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.data.samples import Sample
    from tuner.run import Run


class Measurement(NamedTuple):
    """The loss of one sample at one noise level."""

    dataset_id: str
    sigma: float
    loss: float


def means(measured: Sequence[Measurement]) -> dict[str, float]:
    """Mean losses by name: ``loss`` over all, ``loss/<dataset id>``, ``loss/t<timestep>``."""
    losses: dict[str, list[float]] = defaultdict(list)
    for dataset_id, sigma, loss in measured:
        for name in ("loss", f"loss/{dataset_id}", f"loss/t{round(1000 * sigma)}"):
            losses[name].append(loss)
    return {name: math.fsum(each) / len(each) for name, each in losses.items()}


def measure(run: Run, model: Model, samples: Sequence[Sample], levels: int) -> list[Measurement]:
    """The loss of each sample at ``levels`` noise levels of each trained network, as the family makes it.

    Expects evaluation mode, autocast and no gradients (the validation stage gives all three). Every process measures
    all of them: a sharded network needs every process in each forward.
    """
    trained = [network.name for network in model.networks.values() if network.adapter is not None]
    trained.sort(key=lambda name: name != model.active)  # the one that is on the device comes first
    measured: list[Measurement] = []
    with progress("held-out loss", len(trained) * len(samples), show=run.is_main) as advance:
        for name in trained:
            with active(model, name, run.device):
                for sample in samples:
                    measured += _measured(run, model, sample, levels)
                    advance(1)
    return measured


@contextmanager
def active(model: Model, name: str, device: torch.device) -> Iterator[None]:
    """Within, the network called ``name`` is the model's active one and on ``device``; then the one before is again."""
    before, network = model.network, model.networks[name]
    if network is before:
        yield
        return
    hand_over(before, network, device)
    model.active = name
    try:
        yield
    finally:
        hand_over(network, before, device)
        model.active = before.name


def _measured(run: Run, model: Model, sample: Sample, levels: int) -> Iterable[Measurement]:
    """One sample by itself, one level at a time: its loss depends on no other, and takes the least memory."""
    assert run.plain_loss is not None  # the model is described
    losses, sigmas = [], []
    for batch in batches(run, model, sample, levels):
        losses.append(run.plain_loss(model, batch).per_sample)
        sigmas.append(batch.sigmas)
    pairs = zip(torch.cat(sigmas).tolist(), torch.cat(losses).tolist(), strict=True)
    return [Measurement(sample.dataset_id, sigma, loss) for sigma, loss in pairs]


def batches(run: Run, model: Model, sample: Sample, levels: int) -> Iterator[Batch]:
    """The sample, in its first view and with its first caption, at each noise level: batches of one."""
    assert run.cached is not None  # the cache is built
    video = {name: _alone(run, tensor) for name, tensor in run.cached.video(sample).items()}
    latents = video.pop("latents")
    text = collate_text([run.cached.text(sample.captions[0])])
    mask = run.cached.mask(sample)
    spec = model.network.spec
    tokens = spec.tokens(latents.shape[2], latents.shape[3], latents.shape[4])
    for index, sigma in enumerate(flow.quantiles(run.config, levels, tokens, spec.sigma_range)):
        noise = _noise(run, sample, index, latents)
        sigmas = sigma.unsqueeze(0).to(run.device)
        noisy, target = flow.mix(latents, noise, sigmas)
        yield Batch(
            latents=latents,
            text={name: tensor.to(run.device) for name, tensor in text.items()},
            video=video,
            sample_ids=(sample.sample_id,),
            positions=(0,),
            sigmas=sigmas,
            noise=noise,
            noisy=noisy,
            target=target,
            mask=None if mask is None else _alone(run, mask.weights),
        )


def _alone(run: Run, tensor: Tensor) -> Tensor:
    """A tensor of one sample as a batch of one, on the device."""
    return tensor.unsqueeze(0).to(run.device)


def _noise(run: Run, sample: Sample, index: int, latents: Tensor) -> Tensor:
    """Noise like ``latents`` (1, C, F', h, w): a function of the seed, the sample and the number of the level."""
    generator = rng.generator(run.config.seed, f"evaluation/{sample.sample_id}", index)
    return torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)
