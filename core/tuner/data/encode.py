"""Fill the cache: text first, then clips; only what is missing, in pieces, so that it can be interrupted.

A component is loaded when something of its kind is missing, and freed before the next kind begins. Where
there are several processes each encodes its share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tuner.data.decode import decode
from tuner.data.fingerprint import fingerprint
from tuner.data.progress import progress
from tuner.data.report import Dropped
from tuner.data.samples import Bucket, Dataset, Prepared, Sample, View
from tuner.data.store import Store, make_key
from tuner.errors import DataError, ModelError
from tuner.model import EncodeBatch, Encoded, EncodeKind, Model
from tuner.run import Run

ENCODING = 2
"""Bumped by hand when decoding, framing or the layout of entries changes what is stored (see the golden test)."""
EMPTY_CAPTION = ""
"""Always encoded: what a sample is trained with when its caption is dropped."""
CHECK_THREADS = 4

T = TypeVar("T")


class EncodeHooks(Protocol):
    """The hook that this room calls."""

    def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        """See ``tuner.hookspecs``."""


@dataclass(frozen=True)
class CachedData:
    """The samples that are encoded, and their encodings."""

    prepared: Prepared
    """what was prepared, without the samples that could not be encoded; its report names them"""
    encoded: int
    """entries made now, in all processes"""
    rebuilt: int
    """of these, entries that were there but damaged"""
    text_keys: dict[str, str]
    video_keys: dict[tuple[str, int], str]
    """by sample id and number of the view"""

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples that are trained on."""
        return self.prepared.samples

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        """What holds for the samples of each dataset alike."""
        return self.prepared.datasets

    def text(self, caption: str) -> dict[str, Tensor]:
        """The encoding of a caption: tensors whose first axis is its true length.

        Raises KeyError for a caption that was not asked for, DataError for a damaged entry.
        """
        return Store(self.prepared.text_cache).read(self.text_keys[caption])

    def video(self, sample: Sample, view: int = 0) -> dict[str, Tensor]:
        """The encoding of a clip's view: ``latents`` (C, F', h, w) and whatever else the family stores."""
        return Store(sample.cache).read(self.video_keys[sample.sample_id, view])


@dataclass
class _Tally:
    encoded: int = 0
    rebuilt: int = 0


def text_key(caption: str, encoder: str) -> str:
    """The name of a caption's entry. ``encoder``: the fingerprints of the components."""
    return make_key("text", ENCODING, encoder, caption)


def video_key(sample: Sample, view: View, encoder: str) -> str:
    """The name of the entry of a clip's view: its content, what is taken of it, the encoder; not where it lies."""
    return make_key("video", ENCODING, encoder, sample.content_hash, sample.bucket, view)


def build_cache(
    run: Run,
    model: Model,
    hooks: EncodeHooks,
    prepared: Prepared,
    extra_captions: Iterable[str] = (),
    *,
    show_progress: bool = True,
) -> CachedData:
    """Encode every caption and clip that the cache does not hold. Called on every process.

    A clip that cannot be decoded or encoded is named, counted in the report and left out. What is encoded is
    kept whatever happens later, so a run that was interrupted goes on where it stopped.

    Arguments
        extra_captions: captions to encode beside the datasets' own, such as validation prompts.
    Raises DataError when the disk is full or no clip is left; ModelError when a family's encoding is not what
    it promised.
    """
    tally, show = _Tally(), show_progress and run.is_main
    samples = (*prepared.samples, *prepared.held_out)
    captions = [caption for sample in samples for caption in sample.captions]
    text_encoder = _encoder(model, "text")
    text_keys = {caption: text_key(caption, text_encoder) for caption in [*captions, EMPTY_CAPTION, *extra_captions]}
    video_encoder = _encoder(model, "video")
    video_keys = {
        (sample.sample_id, index): video_key(sample, view, video_encoder)
        for sample in samples
        for index, view in enumerate(sample.views)
    }

    encoder = _Encoder(run, model, hooks, tally, show)
    with torch.no_grad():
        encoder.captions(text_keys, Store(prepared.text_cache))
        failures = encoder.clips(samples, video_keys)
    failures, encoded, rebuilt = _everywhere(failures, tally)
    counts = f"{encoded} entries encoded, {rebuilt} of them because they were damaged, {len(failures)} clips failed"
    run.log.info("cache: %s", counts)
    left = _without(prepared, failures)
    if not left.samples:
        reasons = "; ".join(f"{Path(name).name}: {reason}" for name, reason in list(failures.items())[:3])
        raise DataError(f"not one of {len(prepared.samples)} clips could be encoded ({reasons})")
    return CachedData(left, encoded, rebuilt, text_keys, video_keys)


def _without(prepared: Prepared, failures: dict[str, str]) -> Prepared:
    """``prepared`` without the samples that failed, which its report then names."""
    if not failures:
        return prepared
    everything = (*prepared.samples, *prepared.held_out)
    failed = [(_dropped(sample, failures), sample.bucket) for sample in everything if sample.sample_id in failures]
    return replace(
        prepared,
        samples=tuple(sample for sample in prepared.samples if sample.sample_id not in failures),
        held_out=tuple(sample for sample in prepared.held_out if sample.sample_id not in failures),
        report=prepared.report.without(failed),
    )


def _dropped(sample: Sample, failures: dict[str, str]) -> Dropped:
    return Dropped(sample.dataset_id, sample.path, "cannot be encoded", failures[sample.sample_id])


def _encoder(model: Model, kind: EncodeKind) -> str:
    """The fingerprints of the components of one kind, as one text."""
    return "/".join(fingerprint(name, model.components[name]) for name in model.spec.encoders[kind])


class _Encoder:
    """Encodes what is missing of one kind after the other."""

    def __init__(self, run: Run, model: Model, hooks: EncodeHooks, tally: _Tally, show: bool) -> None:
        self.run, self.model, self.hooks, self.tally, self.show = run, model, hooks, tally, show

    def captions(self, keys: dict[str, str], store: Store) -> None:
        """Encode the captions whose entry is missing or damaged."""
        wanted = [(caption, key, store) for caption, key in keys.items()]
        missing = self._missing(wanted, "captions")
        batches = _chunks(missing, self.run.config.text_embed_batch_size)
        if not batches:
            return
        count = sum(map(len, batches))
        with (
            self.model.use(*self.model.spec.encoders["text"]),
            progress("encoding captions", count, show=self.show) as advance,
        ):
            for batch in batches:
                texts = tuple(caption for caption, _, _ in batch)
                encoded = self._encode(EncodeBatch("text", captions=texts), len(batch))
                for (caption, key, _), tensors in zip(batch, encoded, strict=True):
                    if not _is_finite(tensors):
                        raise ModelError(f"the text encoder gives non-finite numbers for {caption!r}")
                    store.write(key, tensors, {"kind": "text", "caption": caption})
                self._done(len(batch), advance)

    def clips(self, samples: Sequence[Sample], keys: dict[tuple[str, int], str]) -> dict[str, str]:
        """Encode the views whose entry is missing or damaged; the reason by sample id for each clip that failed."""
        wanted = [
            ((sample, view), keys[sample.sample_id, index], Store(sample.cache))
            for sample in samples
            for index, view in enumerate(sample.views)
        ]
        missing = self._missing(wanted, "clips")
        by_bucket: dict[Bucket, list[_Job]] = defaultdict(list)
        for job in missing:
            by_bucket[job[0][0].bucket].append(job)
        size = self.run.config.vae_batch_size
        batches = [batch for jobs in by_bucket.values() for batch in _chunks(jobs, size)]
        failures: dict[str, str] = {}
        if batches:
            count = sum(map(len, batches))
            with (
                self.model.use(*self.model.spec.encoders["video"]),
                progress("encoding clips", count, show=self.show) as advance,
                ThreadPoolExecutor(1) as reader,
            ):
                # One batch is decoded while the one before it is encoded.
                ahead = reader.submit(_decode_all, batches[0])
                for index, batch in enumerate(batches):
                    decoded = ahead.result()
                    if index + 1 < len(batches):
                        ahead = reader.submit(_decode_all, batches[index + 1])
                    self._encode_clips(batch, decoded, failures)
                    self._done(len(batch), advance)
        return _spread(failures, wanted)

    def _encode_clips(self, batch: list[_Job], decoded: list[Tensor | str], failures: dict[str, str]) -> None:
        """Encode one batch and store it; a batch that fails is tried clip by clip, to name the one at fault."""
        good = [(job, pixels) for job, pixels in zip(batch, decoded, strict=True) if isinstance(pixels, Tensor)]
        for ((sample, _), _, _), reason in zip(batch, decoded, strict=True):
            if isinstance(reason, str):
                self._fail(sample, reason, failures)
        try:
            self._encode_and_store(good)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if len(good) > 1:
                for each in good:
                    self._encode_clips([each[0]], [each[1]], failures)
            else:
                self.run.log.debug("encoding failed", exc_info=error)
                self._fail(good[0][0][0][0], f"{type(error).__name__}: {error}", failures)

    def _encode_and_store(self, good: Sequence[tuple[_Job, Tensor]]) -> None:
        if not good:
            return
        pixels = torch.stack([pixels for _, pixels in good])
        encoded = self._encode(EncodeBatch("video", pixels=pixels), len(good))
        for (((sample, _), key, store), _), tensors in zip(good, encoded, strict=True):
            self._check_shape(sample, tensors)
            if not _is_finite(tensors):
                raise ArithmeticError("the encoder gives non-finite numbers")
            store.write(key, tensors, {"kind": "video", "source": sample.path.name, "bucket": str(sample.bucket)})

    def _encode(self, batch: EncodeBatch, count: int) -> Encoded:
        try:
            encoded = self.hooks.encode_batch(run=self.run, model=self.model, batch=batch)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
                raise _no_memory(batch, count) from error
            raise
        if len(encoded) != count or not all(encoded):
            raise ModelError(f"encode_batch was given {count} items of kind {batch.kind} and answered {len(encoded)}")
        return encoded

    def _check_shape(self, sample: Sample, tensors: dict[str, Tensor]) -> None:
        bucket = sample.bucket
        expected = self.model.spec.latents.shape(bucket.frames, bucket.height, bucket.width)
        found = tuple(tensors["latents"].shape) if "latents" in tensors else None
        if found != expected:
            raise ModelError(
                f"encode_batch gives latents of shape {found} for {bucket}, and the model's description says {expected}"
            )

    def _fail(self, sample: Sample, reason: str, failures: dict[str, str]) -> None:
        failures[sample.sample_id] = reason
        self.run.log.warning("left out: %s: %s", sample.path, reason)

    def _missing(self, wanted: Sequence[tuple[T, str, Store]], what: str) -> list[tuple[T, str, Store]]:
        """What has no whole entry, each key once, of this process's share.

        The share is cut from what is wanted, not from what is missing: the others may be writing already.
        """
        unique = list({(key, store.root): (item, key, store) for item, key, store in wanted}.values())
        share = unique[self.run.process_index :: self.run.process_count]
        missing = []
        with (
            progress(f"checking cached {what}", len(share), show=self.show) as advance,
            ThreadPoolExecutor(CHECK_THREADS) as pool,
        ):
            for job, whole in zip(share, pool.map(lambda job: job[2].is_whole(job[1]), share), strict=True):
                advance(1)
                if not whole:
                    missing.append(job)
        for _, key, store in missing:
            if store.has(key):
                self.run.log.warning("a damaged entry of the cache is made anew: %s", store.path(key))
                self.tally.rebuilt += 1
        return missing

    def _done(self, count: int, advance: Any) -> None:
        self.tally.encoded += count
        advance(count)


_Job = tuple[tuple[Sample, View], str, Store]


def _decode_all(batch: Sequence[_Job]) -> list[Tensor | str]:
    """The pixels of each clip, or the reason why there are none."""
    decoded: list[Tensor | str] = []
    for (sample, view), _, _ in batch:
        try:
            decoded.append(decode(sample, view))
        except DataError as error:
            decoded.append(error.what)
    return decoded


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _spread(failures: dict[str, str], wanted: Sequence[_Job]) -> dict[str, str]:
    """Failures with every other sample that shares a failed entry: equal files fail alike."""
    reasons = {
        (key, store.root): failures[sample.sample_id]
        for (sample, _), key, store in wanted
        if sample.sample_id in failures
    }
    return {
        sample.sample_id: reasons[key, store.root] for (sample, _), key, store in wanted if (key, store.root) in reasons
    }


def _is_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _no_memory(batch: EncodeBatch, count: int) -> DataError:
    shape = "x".join(map(str, batch.pixels.shape[2:])) if batch.pixels is not None else ""
    key = "text_embed_batch_size" if batch.kind == "text" else "vae_batch_size, resolution or num_frames"
    return DataError(
        f"not enough memory to encode {count} item{'s' * (count > 1)} of kind {batch.kind} {shape}".rstrip(),
        remedy=f"lower {key}; what is encoded already is kept",
    )


def _everywhere(failures: dict[str, str], tally: _Tally) -> tuple[dict[str, str], int, int]:
    """Failures and counts of all processes, once all are done."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return failures, tally.encoded, tally.rebuilt
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (failures, tally.encoded, tally.rebuilt))
    merged = {name: reason for found, _, _ in gathered for name, reason in sorted(found.items())}
    return merged, sum(encoded for _, encoded, _ in gathered), sum(rebuilt for _, _, rebuilt in gathered)
