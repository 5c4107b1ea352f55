"""Encoding what the cache lacks of one kind: a phase for the captions, a phase for the clips.

A component is loaded when something of its kind is missing, and freed before the next kind begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tuner import processes
from tuner.builtin.encoding.clips import Clip, read_clip
from tuner.builtin.encoding.store import Store
from tuner.builtin.encoding.writing import Writer
from tuner.builtin.progress import progress
from tuner.data.samples import Bucket, Decode, Sample, View
from tuner.errors import DataError, ModelError
from tuner.model import EncodeBatch, Encoded, EncodeKind, Model
from tuner.run import Run

T = TypeVar("T")
Job = tuple[T, str, Store]
"""Something to encode, its key, and the store of its entry."""
ClipJob = Job[tuple[Sample, View]]
WHAT: dict[EncodeKind, str] = {"text": "captions", "video": "clips", "conditioning": "images"}
"""What people call it while it is encoded."""


class EncodeHooks(Protocol):
    """The hook that this room calls."""

    def encode_batch(self, *, run: Run, model: Model, batch: EncodeBatch) -> Encoded:
        """See ``tuner.hookspecs``."""


@dataclass
class Tally:
    """What one process did."""

    encoded: int = 0
    """entries made"""
    rebuilt: int = 0
    """of these, entries that were there but damaged"""


class Encoder:
    """Encodes what is missing of one kind after the other."""

    def __init__(
        self,
        run: Run,
        model: Model,
        hooks: EncodeHooks,
        decode: Decode,
        tally: Tally,
        *,
        show: bool = True,
        verify: bool = False,
    ) -> None:
        self.run, self.model, self.hooks, self.decode, self.tally = run, model, hooks, decode, tally
        self.show, self.verify = show, verify
        self._writer = Writer(1)

    def captions(self, keys: dict[str, str], root: Path, waiting: int) -> None:
        """Encode the captions whose entry is missing or damaged.

        Arguments
            keys: the key of each caption.
            waiting: encoded captions that may wait to be written.
        """
        store = self.store(root)
        missing = self.missing([(caption, key, store) for caption, key in keys.items()], "captions")
        batches = _chunks(missing, self.run.config.text_embed_batch_size)
        if not batches:
            return
        with (
            self.model.use(*self.model.spec.encoders["text"]),
            progress("encoding captions", len(missing), show=self.show) as advance,
            Writer(waiting) as self._writer,
        ):
            for batch in batches:
                processes.stop_if_one_failed()
                self._encode_captions(batch)
                self._done(len(batch), advance)

    def _encode_captions(self, batch: Sequence[Job[str]]) -> None:
        texts = tuple(caption for caption, _, _ in batch)
        encoded = self._encode(EncodeBatch("text", captions=texts), len(batch))
        for (caption, key, store), tensors in zip(batch, encoded, strict=True):
            if not _is_finite(tensors):
                raise ModelError(f"the text encoder gives non-finite numbers for {caption!r}")
            self._writer.write(store, key, tensors, {"kind": "text", "caption": caption})

    def clips(
        self, samples: Sequence[Sample], keys: Mapping[tuple[str, int], str], kind: EncodeKind = "video"
    ) -> dict[str, str]:
        """Encode the views whose entry of ``kind`` is missing or damaged; the reason by sample id for each that failed.

        Arguments
            keys: by sample id and number of the view; a view that is not among them has no entry of this kind.
        """
        spec = self.model.spec
        roles = spec.frames_taken if kind == "video" else spec.conditioning_frames
        wanted = [
            ((_needed(sample, kind, roles), view), key, self.store(root))
            for sample in samples
            if (root := sample.cache if kind == "video" else sample.image_cache) is not None
            for index, view in enumerate(sample.views)
            if (key := keys.get((sample.sample_id, index))) is not None
        ]
        alike: dict[tuple[Bucket, frozenset[str]], list[ClipJob]] = defaultdict(list)
        for job in self.missing(wanted, WHAT[kind]):
            sample = job[0][0]
            alike[sample.bucket, frozenset(each.role for each in sample.companions).intersection(roles)].append(job)
        size = self.run.config.vae_batch_size
        batches = [batch for jobs in alike.values() for batch in _chunks(jobs, size)]
        failures: dict[str, str] = {}
        if batches:
            self._encode_batches(kind, batches, partial(_read_all, self.decode, roles), failures)
        return _spread(failures, wanted)

    def _encode_batches(
        self,
        kind: EncodeKind,
        batches: Sequence[list[ClipJob]],
        read: Callable[[Sequence[ClipJob]], list[Clip | str]],
        failures: dict[str, str],
    ) -> None:
        """Encode batch after batch: while one is encoded, the next is decoded and the last is written."""
        with (
            self.model.use(*self.model.spec.encoders[kind]),
            progress(f"encoding {WHAT[kind]}", sum(map(len, batches)), show=self.show) as advance,
            Writer(self.run.config.write_batch_size) as self._writer,
            ThreadPoolExecutor(1) as reader,
        ):
            ahead = reader.submit(read, batches[0])
            for index, batch in enumerate(batches):
                decoded = ahead.result()
                if index + 1 < len(batches):
                    ahead = reader.submit(read, batches[index + 1])
                processes.stop_if_one_failed()
                self._encode_clips(kind, batch, decoded, failures)
                self._done(len(batch), advance)

    def store(self, root: Path) -> Store:
        """The store under ``root``, written to as the config says."""
        return Store(root, compress=self.run.config.compress_disk_cache)

    def _encode_clips(
        self, kind: EncodeKind, batch: list[ClipJob], decoded: list[Clip | str], failures: dict[str, str]
    ) -> None:
        """Encode one batch and store it; a batch that fails is tried clip by clip, to name the one at fault."""
        good = [(job, clip) for job, clip in zip(batch, decoded, strict=True) if isinstance(clip, Clip)]
        for ((sample, _), _, _), reason in zip(batch, decoded, strict=True):
            if isinstance(reason, str):
                self._fail(sample, reason, failures)
        try:
            self._encode_and_store(kind, good)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            if len(good) > 1:
                for each in good:
                    self._encode_clips(kind, [each[0]], [each[1]], failures)
            else:
                self.run.log.debug("encoding failed", exc_info=error)
                self._fail(good[0][0][0][0], f"{type(error).__name__}: {error}", failures)

    def _encode_and_store(self, kind: EncodeKind, good: Sequence[tuple[ClipJob, Clip]]) -> None:
        if not good:
            return
        pixels = torch.stack([clip.pixels for _, clip in good])
        frames = {role: torch.stack([clip.frames[role] for _, clip in good]) for role in good[0][1].frames}
        encoded = self._encode(EncodeBatch(kind, pixels=pixels, frames=frames), len(good))
        for (((sample, _), key, store), _), tensors in zip(good, encoded, strict=True):
            if kind == "video":
                self._check_shape(sample, tensors)
            if not _is_finite(tensors):
                raise ArithmeticError("the encoder gives non-finite numbers")
            self._writer.write(
                store, key, tensors, {"kind": kind, "source": sample.path.name, "bucket": str(sample.bucket)}
            )

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

    def missing(self, wanted: Sequence[Job[T]], what: str) -> list[Job[T]]:
        """What has no whole entry, each key once, of this process's share.

        The share is cut from what is wanted, not from what is missing: the others may be writing already.
        """
        unique = list({(key, store.root): (item, key, store) for item, key, store in wanted}.values())
        share = unique[self.run.process_index :: self.run.process_count]
        by_root: dict[Path, list[Job[T]]] = defaultdict(list)
        for job in share:
            by_root[job[2].root].append(job)
        missing: set[tuple[str, Path]] = set()
        with progress(f"checking cached {what}", len(share), show=self.show) as advance:
            for root, jobs in by_root.items():
                store = jobs[0][2]
                absent, damaged = store.lacking([key for _, key, _ in jobs], reread=self.verify, advance=advance)
                missing.update((key, root) for key in (*absent, *damaged))
                self.tally.rebuilt += len(damaged)
                for key in damaged:
                    self.run.log.warning("a damaged entry of the cache is made anew: %s", store.path(key))
        return [job for job in share if (job[1], job[2].root) in missing]

    def _done(self, count: int, advance: Callable[[int], None]) -> None:
        self.tally.encoded += count
        advance(count)


def _needed(sample: Sample, kind: EncodeKind, roles: Sequence[str]) -> Sample:
    """The sample with only so many frames as are encoded: where no last frame is embedded, one is enough."""
    if kind == "video" or "last_frame" in roles:
        return sample
    return replace(sample, bucket=replace(sample.bucket, frames=1))


def _read_all(decode: Decode, roles: Sequence[str], batch: Sequence[ClipJob]) -> list[Clip | str]:
    """Each clip, or the reason why there is none."""
    decoded: list[Clip | str] = []
    for (sample, view), _, _ in batch:
        try:
            decoded.append(read_clip(decode, sample, view, roles))
        except DataError as error:
            decoded.append(error.what)
    return decoded


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _spread(failures: dict[str, str], wanted: Sequence[ClipJob]) -> dict[str, str]:
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
