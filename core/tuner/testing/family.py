"""A model family on the test bench: its hooks called as the core calls them, in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tuner import flow
from tuner.blocks import StepContext
from tuner.config.keys import CoreConfig
from tuner.manager import Manager
from tuner.materialise import materialise
from tuner.model import Batch, EncodeBatch, Encoded, EncodeKind, Model
from tuner.plugin import AnyPlugin
from tuner.run import Run
from tuner.spec import ModelSpec

CAPTIONS = ("a red circle moves", "a blue square")


class FamilyBench:
    """One family plugin with a tiny model, and clips and captions to try it with."""

    def __init__(self, plugin: AnyPlugin, settings: Mapping[str, Any], clip: tuple[int, int, int]) -> None:
        manager = Manager()
        manager.add(plugin.name, plugin)
        self.hook = manager.hook
        self.settings = {"mixed_precision": "no", **settings}
        self.clip = clip
        self.run = Run(CoreConfig(**self.settings), {plugin.name: plugin})
        self.run.place(torch.device("cpu"), torch.float32)
        self.run.spec = self.spec

    @cached_property
    def spec(self) -> ModelSpec:
        """What the family says of its model."""
        spec: ModelSpec = self.hook.describe_model(run=self.run)
        return spec

    @cached_property
    def pixels(self) -> Tensor:
        """Clips (2, 3, F, H, W) in [-1, 1]: noise, so that no two cells are alike."""
        return torch.rand(len(CAPTIONS), 3, *self.clip, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @cached_property
    def cached(self) -> tuple[Encoded, Encoded]:
        """The encodings of the clips and of their captions."""
        model = self.hand_over()
        return self.encode_clips(model, self.pixels), self.encode_captions(model, CAPTIONS)

    def hand_over(self) -> Model:
        """The model as the family hands it over: networks without storage."""
        model: Model = self.hook.load_model(run=self.run)
        return model

    def load(self) -> Model:
        """The model with its weights."""
        model = self.hand_over()
        for network in model.networks.values():
            materialise(network, device=self.run.device)
        return model

    def encode_clips(self, model: Model, pixels: Tensor) -> Encoded:
        """What the cache would hold for ``pixels`` (B, 3, F, H, W), the embeddings of their frames among it."""
        clips = self._encode(model, "video", pixels=pixels)
        if not self.spec.conditioning_frames:
            return clips
        images = self._encode(model, "conditioning", pixels=pixels)
        return [clip | image for clip, image in zip(clips, images, strict=True)]

    def encode_captions(self, model: Model, captions: Sequence[str]) -> Encoded:
        """What the cache would hold for ``captions``."""
        return self._encode(model, "text", captions=tuple(captions))

    def _encode(self, model: Model, kind: EncodeKind, **what: Any) -> Encoded:
        with torch.no_grad(), model.use(*self.spec.encoders[kind]):
            encoded: Encoded = self.hook.encode_batch(run=self.run, model=model, batch=EncodeBatch(kind, **what))
        return encoded

    def batch(self, model: Model) -> Batch:
        """A micro-batch of the clips, with noise and times drawn as in training."""
        clips, texts = self.cached
        latents = torch.stack([each["latents"] for each in clips])
        positions = tuple(range(len(clips)))
        tokens = model.network.spec.tokens(*latents.shape[2:])
        sigmas, noise = flow.draw(self.run.config, step=0, positions=positions, latents=latents, tokens=tokens)
        noisy, target = flow.mix(latents, noise, sigmas)
        return Batch(
            latents=latents,
            text={name: pad_sequence([each[name] for each in texts], batch_first=True) for name in texts[0]},
            video={name: torch.stack([each[name] for each in clips]) for name in clips[0] if name != "latents"},
            sample_ids=tuple(f"clip-{position}" for position in positions),
            positions=positions,
            sigmas=sigmas,
            noise=noise,
            noisy=noisy,
            target=target,
        )

    def learn(self, model: Model, context: StepContext) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Losses (B,) and the gradient of every weight of the active network, run with ``context``."""
        network = model.network
        network.module.train().requires_grad_(True).zero_grad(set_to_none=True)
        network.trampoline.context = context
        losses: Tensor = self.hook.compute_loss(run=self.run, model=model, batch=self.batch(model)).per_sample
        losses.mean().backward()  # type: ignore[no-untyped-call]
        gradients = {name: parameter.grad for name, parameter in network.module.named_parameters()}
        network.module.zero_grad(set_to_none=True)
        network.trampoline.context = StepContext()
        return losses.detach(), gradients
