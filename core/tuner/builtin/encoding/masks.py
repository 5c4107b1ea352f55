"""Masks at the size of latents: how much each place counts in the loss, and which tokens no route may drop.

What a mask's pixels mean is the answer of whoever prepares the data (``Prepared.weigh``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner import processes
from tuner.builtin.encoding.encoder import Encoder
from tuner.builtin.encoding.store import Store, make_key
from tuner.builtin.encoding.writing import Writer
from tuner.builtin.progress import progress
from tuner.data.cached import MASK, SEGMENTATION, Mask
from tuner.data.samples import Companion, Sample, View, Weigh
from tuner.errors import DataError
from tuner.spec import ModelSpec

ENCODING = 1
"""Bumped by hand when what is stored for a mask changes."""


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


def read_mask(store: Store, key: str) -> Mask:
    """A mask from the cache. Raises DataError when its entry is missing or damaged."""
    stored = store.read(key)
    return Mask(stored["weights"], stored["forced"])


def encode_masks(
    encoder: Encoder, samples: Sequence[Sample], keys: Mapping[tuple[str, int], str], weigh: Weigh
) -> dict[str, str]:
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
                    file = mask_of(sample)
                    assert file is not None
                    weights, forced = weigh(file, view, sample.bucket, encoder.model.spec)
                except DataError as error:
                    reasons[key] = error.what
                    run.log.warning("left out: %s: %s", sample.path, error.what)
                else:
                    about = {"kind": "mask", "source": sample.path.name, "bucket": str(sample.bucket)}
                    writer.write(store, key, {"weights": weights, "forced": forced}, about)
                    encoder.tally.encoded += 1
                advance(1)
    return {name: reasons[key] for (name, _), key in keys.items() if key in reasons}
