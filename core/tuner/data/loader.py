"""From the plan's micro-batch to collated tensors, noise drawn and on the device, made ahead by one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tuner import rng
from tuner.data.cached import EMPTY_CAPTION, CachedData, Mask
from tuner.data.order import MicroBatch, Order
from tuner.data.samples import Dataset, Sample
from tuner.data.transfer import Lane

PURPOSE = "caption_dropout"
OF_THE_DEVICE = ("latents", "text", "video", "mask", "noise")
"""What of a batch only the device reads."""
Draw = Callable[[int, Sequence[int], Tensor], tuple[Tensor, Tensor]]
"""(step, positions, latents) -> noise levels (B,) and noise like the latents (B, C, F', h, w), on the CPU"""


@dataclass(frozen=True)
class LoadedBatch:
    """One micro-batch, on the CPU or, but for what the host reads, on the loader's CUDA device. B samples."""

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
    """the largest number of forced tokens of its samples; 0 where no token is forced"""
    mask: Tensor | None = None
    """(B, 1, F', h, w) float32 in [0, 1], 1 for samples without a mask; None where no sample has one"""
    forced: Tensor | None = None
    """(B, S) bool: tokens under a mask, none for samples without; None where no sample has a mask"""
    regularisation: tuple[bool, ...] = ()
    """which samples hold the model to its base"""
    sigmas: Tensor | None = None
    """(B,) float32 on the CPU; None where the loader draws nothing"""
    noise: Tensor | None = None
    """like ``latents``; None where the loader draws nothing"""

    def named(self, *names: str) -> dict[str, Any]:
        """Those of its fields."""
        return {name: getattr(self, name) for name in names}


class Loader:
    """Reads the micro-batches of a plan from the cache, each one during the backward of the one before."""

    def __init__(
        self,
        cached: CachedData,
        plan: Order,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int,
        caption_dropout: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        """Load for process ``rank`` of ``world``.

        Arguments
            caption_dropout: probability that a sample is trained with the empty caption, where its dataset says none.
            device: where batches go, on a stream of their own, where that is a GPU.
        """
        self.cached, self.plan, self.rank, self.world = cached, plan, rank, world
        self.seed, self.caption_dropout = seed, caption_dropout
        self.draw: Draw | None = None
        """Who draws the noise, while the step before is computed; set by whoever trains."""
        self._lane = Lane(device) if device is not None and device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: tuple[tuple[int, int], Future[LoadedBatch]] | None = None

    def load(self, step: int, slot: int) -> LoadedBatch:
        """Micro-batch ``slot`` (in the step's global list) of optimizer step ``step``.

        Raises DataError when an entry of the cache went missing or was damaged since the start.
        """
        wanted = (step, slot)
        begun = self._ahead[1] if self._ahead and self._ahead[0] == wanted else self._thread.submit(self._read, *wanted)
        loaded = begun.result()
        if self._lane is not None:
            self._lane.receive(loaded.named(*OF_THE_DEVICE))
        return loaded

    def read_ahead(self, step: int, slot: int) -> None:
        """Begin with the micro-batch after this one.

        To be called before its backward: that leaves Python to the thread, where a forward would share it.
        """
        following = self._after(step, slot)
        self._ahead = (following, self._thread.submit(self._read, *following))

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _after(self, step: int, slot: int) -> tuple[int, int]:
        """What this process will ask for next."""
        following = slot + self.world
        return (step, following) if following < self.plan.per_step else (step + 1, self.rank)

    def _read(self, step: int, slot: int) -> LoadedBatch:
        micro = self.plan.micro_batches(step)[slot]
        captions = self._captions(micro, step)
        clips = [self.cached.video(sample, view) for sample, view in zip(micro.samples, micro.views, strict=True)]
        video = {name: torch.stack([clip[name] for clip in clips]) for name in clips[0]}
        latents, masks = video.pop("latents"), self._masks(micro)
        text = collate_text([*map(self.cached.text, captions)])
        mask = self._stacked([None if each is None else each.weights for each in masks], absent=1)
        sigmas, noise = (None, None) if self.draw is None else self.draw(step, micro.positions, latents)
        moving: dict[str, Any] = dict(zip(OF_THE_DEVICE, (latents, text, video, mask, noise), strict=True))
        return LoadedBatch(
            **(moving if self._lane is None else self._lane.send(moving)),
            sample_ids=tuple(sample.sample_id for sample in micro.samples),
            positions=micro.positions,
            captions=captions,
            keep_at_least=max((int(each.forced.sum()) for each in masks if each is not None), default=0),
            forced=self._stacked([None if each is None else each.forced for each in masks], absent=0),
            regularisation=tuple(self._dataset(sample).regularisation for sample in micro.samples),
            sigmas=sigmas,
        )

    def _masks(self, micro: MicroBatch) -> list[Mask | None]:
        return [self.cached.mask(sample, view) for sample, view in zip(micro.samples, micro.views, strict=True)]

    def _stacked(self, tensors: Sequence[Tensor | None], absent: int) -> Tensor | None:
        """The tensors as one, those that are missing filled with ``absent``; None when all are missing."""
        present = next((tensor for tensor in tensors if tensor is not None), None)
        if present is None:
            return None
        filler = torch.full_like(present, absent)
        return torch.stack([filler if tensor is None else tensor for tensor in tensors])

    def _dataset(self, sample: Sample) -> Dataset:
        """What holds for the sample's dataset; a plan made from samples alone has none."""
        return self.cached.datasets.get(sample.dataset_id) or Dataset(sample.dataset_id)

    def _captions(self, micro: MicroBatch, step: int) -> tuple[str, ...]:
        """The caption of each sample, or the empty one with the probability of its dataset, else of the run."""

        def dropped(sample: Sample, position: int) -> bool:
            own = self._dataset(sample).caption_dropout
            draw = torch.rand((), generator=rng.generator(self.seed, PURPOSE, step, position))
            return bool(draw < (self.caption_dropout if own is None else own))

        turns = zip(micro.samples, micro.captions, micro.positions, strict=True)
        return tuple(EMPTY_CAPTION if dropped(sample, position) else caption for sample, caption, position in turns)


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
