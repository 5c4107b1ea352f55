"""LtxModel: what tuner holds of an LTX-Video model while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuner.model import Batch, Component, Model, Network, SampleRequest
from tuner_ltx.encode import decode_latents, padded

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.spec import ModelSpec

TIME_SCALE = 1000
"""The network's time at sigma 1."""


class LtxModel(Model):
    """One transformer; latents are (B, C, F', h, w) everywhere but inside it."""

    def __init__(
        self,
        spec: ModelSpec,
        networks: Sequence[Network],
        components: Mapping[str, Component],
        scheduler_config: Mapping[str, Any],
    ) -> None:
        super().__init__(spec, networks, components)
        self.scheduler_config = dict(scheduler_config)

    def predict(self, batch: Batch) -> Tensor:
        """Velocity (B, C, F', h, w) of ``batch.noisy`` at ``batch.sigmas``; its time is 1000 * sigma, float32."""
        network = self.network
        dtype = network.dtype_of("proj_in.weight")
        grid = tuple(batch.noisy.shape[2:])
        states, mask = padded(batch.text, network.spec.text_tokens)
        (tokens,) = network.module(
            hidden_states=pack(batch.noisy).to(dtype),
            encoder_hidden_states=states.to(dtype),
            timestep=batch.sigmas * TIME_SCALE,
            encoder_attention_mask=mask,
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            rope_interpolation_scale=self.rope_scale,
            return_dict=False,
        )
        return unpack(tokens, grid)

    @property
    def rope_scale(self) -> tuple[float, int, int]:
        """How far apart tokens lie, in seconds and pixels, as ``LTXPipeline`` computes it."""
        latents = self.spec.latents
        return latents.stride_time / self.spec.fps, latents.stride_space, latents.stride_space

    def sample(self, request: SampleRequest) -> Tensor:
        """Normalised latents (1, C, F', h, w) of a rendered clip, through the network's own forward, without routes."""
        from tuner_ltx.sampling import sample

        return sample(self.network, self.spec, self.scheduler_config, request)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8, on the CPU, of normalised latents (1, C, F', h, w)."""
        with self.use("vae") as (vae,):
            return decode_latents(vae, latents)


def pack(latents: Tensor) -> Tensor:
    """Tokens (B, F' * h * w, C) of latents (B, C, F', h, w): one for each place, frames outermost."""
    tokens: Tensor = latents.flatten(2).transpose(1, 2)
    return tokens


def unpack(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Latents (B, C, F', h, w) of tokens (B, F' * h * w, C): what :func:`pack` undoes."""
    latents: Tensor = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    return latents
