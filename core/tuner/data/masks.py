"""Masks at the size of latents: how much each place counts in the loss, and which tokens no route may drop.

A mask lies over its clip: it is decoded with the clip's own view, whatever its own size, and averaged over
each latent cell. Latent frame 0 covers pixel frame 0, latent frame k the ``stride_time`` frames that end at
frame k * ``stride_time``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from tuner.data.decode import decode
from tuner.data.progress import progress
from tuner.data.samples import Companion, Sample, View
from tuner.data.store import Store, make_key
from tuner.errors import DataError
from tuner.run import Run
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


@dataclass
class MaskTally:
    """What encoding masks came to, in this process."""

    encoded: int = 0
    rebuilt: int = 0
    """of these, entries that were there but damaged"""
    failures: dict[str, str] = field(default_factory=dict)
    """the reason by id of each sample whose mask cannot be used"""


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


def encode_masks(
    run: Run,
    spec: ModelSpec,
    samples: Sequence[Sample],
    keys: Mapping[tuple[str, int], str],
    store_of: Callable[[Sample], Store],
    *,
    show_progress: bool = True,
) -> MaskTally:
    """Encode the masks whose entry is missing or damaged, of this process's share. ``keys``: see :func:`mask_keys`.

    A sample whose mask cannot be decoded, or is black everywhere, is named and counted as a failure.
    """
    views = {(each.key, each.sample.cache): each for sample in samples for each in _masked_views(sample, keys)}
    share = list(views.values())[run.process_index :: run.process_count]
    tally, reasons = MaskTally(), dict[str, str]()
    missing = _missing(share, store_of, tally)
    if missing:
        with progress("encoding masks", len(missing), show=show_progress) as advance:
            for each in missing:
                try:
                    mask = encode_mask(each.sample, each.view, spec)
                except DataError as error:
                    reasons[each.key] = error.what
                    run.log.warning("left out: %s: %s", each.sample.path, error.what)
                else:
                    _write(store_of(each.sample), each.key, mask, each.sample)
                    tally.encoded += 1
                advance(1)
    tally.failures = {name: reasons[key] for (name, _), key in keys.items() if key in reasons}
    return tally


def encode_mask(sample: Sample, view: View, spec: ModelSpec) -> Mask:
    """The mask of one view. Raises DataError when it cannot be decoded, or is black everywhere."""
    file = mask_of(sample)
    assert file is not None
    pixels = decode(replace(sample, path=file.path), view)
    weights = to_latents(brightness(pixels, file.role), spec.latents)
    if not weights.any():
        raise DataError(f"its mask {file.path} is black everywhere, so nothing of it would be trained")
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


@dataclass(frozen=True)
class _MaskedView:
    sample: Sample
    view: View
    key: str


def _masked_views(sample: Sample, keys: Mapping[tuple[str, int], str]) -> list[_MaskedView]:
    numbered = enumerate(sample.views)
    return [
        _MaskedView(sample, view, keys[at]) for index, view in numbered if (at := (sample.sample_id, index)) in keys
    ]


def _missing(wanted: Sequence[_MaskedView], store_of: Callable[[Sample], Store], tally: MaskTally) -> list[_MaskedView]:
    """Those of ``wanted`` that have no whole entry; damaged ones are counted."""
    missing = []
    for each in wanted:
        store = store_of(each.sample)
        if not store.is_whole(each.key):
            missing.append(each)
            tally.rebuilt += store.has(each.key)
    return missing


def _write(store: Store, key: str, mask: Mask, sample: Sample) -> None:
    about = {"kind": "mask", "source": sample.path.name, "bucket": str(sample.bucket)}
    counted = {"forced_tokens": str(int(mask.forced.sum()))}
    store.write(key, {"weights": mask.weights, "forced": mask.forced}, about | counted)
