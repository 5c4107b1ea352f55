"""Encoding masks: averaged over each cell of the latents, and stored beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tuner import processes
from tuner.builtin.encoding.encoder import Encoder
from tuner.builtin.encoding.writing import Writer
from tuner.data.masks import mask_of
from tuner.data.progress import progress
from tuner.data.samples import Sample, Weigh
from tuner.errors import DataError


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
