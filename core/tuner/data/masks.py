"""Masks at the size of latents: how much each place counts in the loss, and which tokens no route may drop.

A mask lies over its clip: it is decoded with the clip's own view, whatever its own size, and averaged over
each latent cell. Latent frame 0 covers pixel frame 0, latent frame k the ``stride_time`` frames that end at
frame k * ``stride_time``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tuner import processes
from tuner.data.encoder import Encoder
from tuner.data.progress import progress
from tuner.data.samples import Companion, Decode, Sample, View
from tuner.data.store import Store, make_key
from tuner.data.writing import Writer
from tuner.errors import DataError
from tuner.spec import LatentGeometry, ModelSpec

MASK, SEGMENTATION = "mask", "segmentation"
ENCODING = 1
"""Bumped by hand when what is stored for a mask changes."""
BLACK = 8 / 255
"""What is no brighter is black: lossy video is never quite so."""
FORCED = 0.5
"""A token is forced when one of its latent cells is at least so bright."""


@dataclass(frozen=True)
class Mask:
    """The mask of one view of a sample."""

    weights: Tensor
    """(1, F', h, w) float32 in [0, 1], above 0 somewhere"""
    forced: Tensor
    """(S,) bool: tokens that no route may drop"""


def mask_of(sample: Sample) -> Companion | None:
    """The file that masks the sample, if there is one."""
    return sample.companion(MASK) or sample.companion(SEGMENTATION)


def mask_key(sample: Sample, view: View, mask: Companion, spec: ModelSpec) -> str:
    """The name of a mask's entry: its content and role, what is taken of it, and the geometry of the model."""
    latents, patch = spec.latents, spec.networks[0].patch
    geometry = (latents.stride_time, latents.stride_space, patch)
    return make_key("mask", ENCODING, mask.content_hash, mask.role, sample.bucket, view, geometry)


def mask_keys(samples: Sequence[Sample], spec: ModelSpec) -> dict[tuple[str, int], str]:
    """The entry of each masked view, by sample id and number of the view."""
    return {
        (sample.sample_id, index): mask_key(sample, view, mask, spec)
        for sample in samples
        if (mask := mask_of(sample)) is not None
        for index, view in enumerate(sample.views)
    }


def encode_masks(encoder: Encoder, samples: Sequence[Sample], keys: Mapping[tuple[str, int], str]) -> dict[str, str]:
    """Encode the masks whose entry is missing or damaged, of this process's share. ``keys``: see :func:`mask_keys`.

    Returns the reason by sample id for each sample whose mask cannot be decoded, or is black everywhere.
    """
    wanted = [
        ((sample, view), key, encoder.store(sample.cache))
        for sample in samples
        for index, view in enumerate(sample.views)
        if (key := keys.get((sample.sample_id, index))) is not None
    ]
    run, reasons = encoder.run, dict[str, str]()
    missing = encoder.missing(wanted, "masks")
    if missing:
        with (
            progress("encoding masks", len(missing), show=encoder.show) as advance,
            Writer(run.config.write_batch_size) as writer,
        ):
            for (sample, view), key, store in missing:
                processes.stop_if_one_failed()
                try:
                    mask = encode_mask(encoder.decode, sample, view, encoder.model.spec)
                except DataError as error:
                    reasons[key] = error.what
                    run.log.warning("left out: %s: %s", sample.path, error.what)
                else:
                    about = {"kind": "mask", "source": sample.path.name, "bucket": str(sample.bucket)}
                    writer.write(store, key, {"weights": mask.weights, "forced": mask.forced}, about)
                    encoder.tally.encoded += 1
                advance(1)
    return {name: reasons[key] for (name, _), key in keys.items() if key in reasons}


def encode_mask(decode: Decode, sample: Sample, view: View, spec: ModelSpec) -> Mask:
    """The mask of one view. Raises DataError when it cannot be decoded, or is black everywhere."""
    file = mask_of(sample)
    assert file is not None
    try:
        pixels = decode(file.path, view, sample.bucket)
    except DataError as error:
        raise DataError(f"its mask {file.path.name}: {error.what}", where=file.path) from error
    weights = to_latents(brightness(pixels, file.role), spec.latents)
    if not weights.any():
        raise DataError(
            f"its mask {file.path.name} is black everywhere, so nothing of it would be trained", where=file.path
        )
    return Mask(weights, forced_tokens(weights, spec.networks[0].patch))


def brightness(pixels: Tensor, role: str) -> Tensor:
    """(F, H, W) in [0, 1] of mask pixels (3, F, H, W) in [-1, 1].

    The brightest of the three colours counts: of grey, the grey; of pure red, 1. Black is exactly 0. In a
    segmentation whatever is not black is 1.
    """
    values = (pixels.amax(0) + 1) / 2
    coloured = values > BLACK
    return coloured.float() if role == SEGMENTATION else torch.where(coloured, values, 0)


def to_latents(values: Tensor, latents: LatentGeometry) -> Tensor:
    """(1, F', h, w): the mean of pixel values (F, H, W) over what each latent cell covers."""
    first, rest = values[:1], values[1:]
    frames = torch.cat([first, rest.unflatten(0, (-1, latents.stride_time)).mean(1)]) if len(rest) else first
    return functional.avg_pool2d(frames.unsqueeze(0), latents.stride_space)


def forced_tokens(weights: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(S,) bool, in the order of the network's tokens: whether any cell of a token's patch is bright.

    ``weights`` are (1, F', h, w).
    """
    return (functional.max_pool3d(weights, patch) >= FORCED).flatten()


def read_mask(store: Store, key: str) -> Mask:
    """A mask from the cache. Raises DataError when its entry is missing or damaged."""
    stored = store.read(key)
    return Mask(stored["weights"], stored["forced"])
