"""From the plan's micro-batch to collated CPU tensors, read ahead by one thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner import rng
from tuner.data.encode import EMPTY_CAPTION, CachedData
from tuner.data.plan import MicroBatch, Plan

PURPOSE = "caption_dropout"


@dataclass(frozen=True)
class LoadedBatch:
    """One micro-batch on the CPU (pinned where there is a CUDA device). B samples."""

    latents: Tensor
    """(B, C, F', h, w)"""
    text: dict[str, Tensor]
    """(B, L, …), zero-padded to the longest caption L of the batch"""
    video: dict[str, Tensor]
    """what the family stored beside ``latents``, stacked"""
    sample_ids: tuple[str, ...]
    positions: tuple[int, ...]
    captions: tuple[str, ...]
    """what each sample is trained with; empty where it was dropped"""
    keep_at_least: int = 0
    """the largest number of forced tokens in the global micro-batch; 0 while no dataset forces any"""


class Loader:
    """Reads the micro-batches of a plan from the cache, each one while the one before is computed."""

    def __init__(
        self,
        cached: CachedData,
        plan: Plan,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int,
        caption_dropout: float = 0.0,
        pin_memory: bool | None = None,
    ) -> None:
        """Load for process ``rank`` of ``world``.

        Arguments
            caption_dropout: probability that a sample is trained with the empty caption.
            pin_memory: put batches into page-locked memory; where there is a CUDA device when None.
        """
        self.cached, self.plan, self.rank, self.world = cached, plan, rank, world
        self.seed, self.caption_dropout = seed, caption_dropout
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[tuple[int, int], Future[LoadedBatch]] | None = None

    def load(self, step: int, slot: int) -> LoadedBatch:
        """Micro-batch ``slot`` (in the step's global list) of optimizer step ``step``; starts on the next one.

        Raises DataError when an entry of the cache went missing or was damaged since the start.
        """
        wanted = (step, slot)
        future = self._ahead[1] if self._ahead and self._ahead[0] == wanted else self._submit(wanted)
        loaded = future.result()
        following = self._after(step, slot)
        self._ahead = (following, self._submit(following))
        return loaded

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, wanted: tuple[int, int]) -> Future[LoadedBatch]:
        return self._thread.submit(self._read, *wanted)

    def _after(self, step: int, slot: int) -> tuple[int, int]:
        """What this process will ask for next."""
        following = slot + self.world
        return (step, following) if following < self.plan.per_step else (step + 1, self.rank)

    def _read(self, step: int, slot: int) -> LoadedBatch:
        micro = self.plan.micro_batches(step)[slot]
        captions = self._captions(micro, step)
        clips = [self.cached.video(sample, view) for sample, view in zip(micro.samples, micro.views, strict=True)]
        video = {name: self._pinned(torch.stack([clip[name] for clip in clips])) for name in clips[0]}
        text = {name: self._pinned(tensor) for name, tensor in collate_text([*map(self.cached.text, captions)]).items()}
        return LoadedBatch(
            latents=video.pop("latents"),
            text=text,
            video=video,
            sample_ids=tuple(sample.sample_id for sample in micro.samples),
            positions=micro.positions,
            captions=captions,
        )

    def _captions(self, micro: MicroBatch, step: int) -> tuple[str, ...]:
        """The caption of each sample, or the empty one with probability ``caption_dropout``."""

        def dropped(position: int) -> bool:
            draw = torch.rand((), generator=rng.generator(self.seed, PURPOSE, step, position))
            return bool(draw < self.caption_dropout)

        pairs = zip(micro.captions, micro.positions, strict=True)
        return tuple(EMPTY_CAPTION if dropped(position) else caption for caption, position in pairs)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._pin else tensor


def collate_text(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack encodings (L_i, …) to (B, L, …), zero-padded along the first axis to the longest; scalars to (B,)."""
    collated = {}
    for name in encoded[0]:
        tensors = [each[name] for each in encoded]
        longest = max((tensor.shape[0] for tensor in tensors if tensor.ndim), default=0)
        collated[name] = torch.stack([_padded(tensor, longest) for tensor in tensors])
    return collated


def _padded(tensor: Tensor, length: int) -> Tensor:
    if tensor.ndim == 0:
        return tensor
    return pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, length - tensor.shape[0]))
