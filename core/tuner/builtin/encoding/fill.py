"""Fill the cache: text first, then clips; only what is missing, in pieces, so that it can be interrupted.

Where there are several processes each encodes its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from tuner import processes
from tuner.builtin.encoding.encoder import EncodeHooks, Encoder, Tally
from tuner.builtin.encoding.encodings import Encodings, entry_keys
from tuner.builtin.encoding.masks import encode_masks
from tuner.data.report import Dropped
from tuner.data.samples import Prepared, Sample
from tuner.errors import DataError
from tuner.model import Model
from tuner.run import Run


def build_cache(
    run: Run,
    model: Model,
    hooks: EncodeHooks,
    prepared: Prepared,
    extra_captions: Iterable[str] = (),
    *,
    show_progress: bool = True,
    verify: bool = False,
) -> Encodings:
    """Encode every caption and clip that the cache does not hold. Called on every process.

    A clip that cannot be decoded or encoded is named, counted in the report and left out. What is encoded is
    kept whatever happens later, so a run that was interrupted goes on where it stopped.

    Arguments
        extra_captions: captions to encode beside the datasets' own, such as validation prompts.
        verify: read every entry, also those whose checksum was found right before and whose file did not change.
    Raises DataError when the disk is full or no clip is left; ModelError when a family's encoding is not what
    it promised; FailedElsewhere when one of these happened in another process.
    """
    tally, failures = Tally(), dict[str, str]()
    encoder = Encoder(run, model, hooks, prepared.decode, tally, show=show_progress and run.is_main, verify=verify)
    samples = prepared.encoded
    with processes.together(), torch.no_grad():
        keys = entry_keys(model, prepared, extra_captions)
        encoder.captions(keys.text, prepared.text_cache, prepared.text_write_batch_size)
        failures.update(encoder.clips(samples, keys.image, "conditioning"))
        failures.update(encoder.clips(samples, keys.video))
        if prepared.weigh is not None:
            failures.update(encode_masks(encoder, samples, keys.mask, prepared.weigh))
    everywhere = processes.gather((failures, tally))
    failures = {name: reason for found, _ in everywhere for name, reason in sorted(found.items())}
    encoded, rebuilt = (sum(getattr(each, name) for _, each in everywhere) for name in ("encoded", "rebuilt"))
    if run.is_main:
        counts = f"{encoded} entries encoded, {rebuilt} of them because they were damaged, {len(failures)} clips failed"
        run.log.info("cache: %s", counts)
    with processes.together():
        left = _without(prepared, failures)
    return Encodings(left, encoded, rebuilt, keys.text, keys.video, keys.mask, keys.image)


def _without(prepared: Prepared, failures: dict[str, str]) -> Prepared:
    """``prepared`` without the samples that failed, which its report then names. DataError when none is left."""
    if not failures:
        return prepared
    everything = (*prepared.samples, *prepared.held_out)
    kept = tuple(sample for sample in prepared.samples if sample.sample_id not in failures)
    if not kept:
        reasons = "; ".join(f"{Path(name).name}: {reason}" for name, reason in list(failures.items())[:3])
        raise DataError(f"not one of {len(prepared.samples)} clips could be encoded ({reasons})")
    failed = [(_dropped(sample, failures), sample.bucket) for sample in everything if sample.sample_id in failures]
    return replace(
        prepared,
        samples=kept,
        held_out=tuple(sample for sample in prepared.held_out if sample.sample_id not in failures),
        extra=tuple(sample for sample in prepared.extra if sample.sample_id not in failures),
        report=prepared.report.without(failed),
    )


def _dropped(sample: Sample, failures: dict[str, str]) -> Dropped:
    return Dropped(sample.dataset_id, sample.path, "cannot be encoded", failures[sample.sample_id])
