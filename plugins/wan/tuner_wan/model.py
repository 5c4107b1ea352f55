"""WanModel: what the core holds of a Wan model while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tuner.model import Batch, Component, Model, Network, SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.spec import ModelSpec


class WanModel(Model):
    """A Wan text-to-video model with one denoiser."""

    def __init__(
        self,
        spec: ModelSpec,
        networks: Sequence[Network],
        components: Mapping[str, Component],
        scheduler_config: Mapping[str, Any],
        flow_shift: float,
    ) -> None:
        super().__init__(spec, networks, components)
        self.scheduler_config = dict(scheduler_config)
        self.flow_shift = flow_shift
        """Shift of the sampler where a request names none."""

    def predict(self, batch: Batch) -> Tensor:
        """Velocity (B, C, F', h, w) of ``batch.noisy`` at ``batch.sigmas``."""
        from tuner_wan.training import predict

        return predict(self.network, batch)

    def sample(self, request: SampleRequest) -> Tensor:
        """Normalised latents (1, C, F', h, w) of a rendered clip, through the network's own forward, without routes."""
        from tuner_wan.sampling import sample

        shift = request.flow_shift or self.flow_shift
        return sample(self.network, self.spec.latents, self.scheduler_config, request, flow_shift=shift)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8, on the CPU, of normalised latents (1, C, F', h, w)."""
        from tuner_wan.encode import decode_latents

        with self.use("vae") as (vae,):
            return decode_latents(vae, latents)
