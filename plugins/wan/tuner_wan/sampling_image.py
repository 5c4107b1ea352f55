"""Rendering from images: diffusers' own ``WanImageToVideoPipeline``, given what the cache holds, without encoders."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tuner.errors import PluginError
from tuner_wan import conditions

if TYPE_CHECKING:
    from tuner.model import SampleRequest
    from tuner.spec import ModelSpec


class CachedImageToVideo(WanImageToVideoPipeline):  # type: ignore[misc]
    """The pipeline without VAE and CLIP: conditions and embeddings are those that were encoded before."""

    spec: ModelSpec
    images: Mapping[str, Tensor]

    def encode_image(self, image: Any, device: torch.device | None = None) -> Tensor:
        """The cached embeddings (frames, tokens, width)."""
        return self.images[conditions.STATES].to(device)

    def prepare_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        num_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        last_image: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Noise (1, C, F', h, w) and the cached condition, as the pipeline's own loop takes them."""
        shape = (batch_size, *self.spec.latents.shape(num_frames, height, width))
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if self.spec.condition == conditions.CLEAN:
            unknown = torch.ones(1, 1, *shape[2:], dtype=dtype, device=device)
            unknown[:, :, 0] = 0
            return noise, self.images[conditions.CLEAN_LATENT].unsqueeze(0).to(device, dtype), unknown
        encoded = self.images[conditions.CONDITION].unsqueeze(0).to(device, dtype)
        return noise, conditions.with_mask(encoded, self.spec.condition, self.spec.latents.stride_time)


def make_pipeline(spec: ModelSpec, request: SampleRequest, parts: Mapping[str, Any]) -> CachedImageToVideo:
    """The pipeline for ``request``, of ``parts`` (denoisers, scheduler) as diffusers names them.

    Raises PluginError where the request has no images.
    """
    if not request.images:
        raise PluginError(
            f"{spec.flavour} renders from images, and none was encoded", remedy="set validation_images to some"
        )
    pipeline = CachedImageToVideo(
        tokenizer=None, text_encoder=None, vae=None, expand_timesteps=spec.condition == conditions.CLEAN, **parts
    )
    # The loop asks the VAE for its channels, and for nothing else where latents are wanted.
    pipeline.vae = SimpleNamespace(config=SimpleNamespace(z_dim=spec.latents.channels))
    pipeline.spec, pipeline.images = spec, request.images
    return pipeline


def image_arguments(request: SampleRequest) -> dict[str, Tensor]:
    """What the pipeline's call must be given in the place of a picture, which nothing looks at."""
    return {"image": torch.zeros(1, 3, request.height, request.width)}
