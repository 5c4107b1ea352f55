"""WanModel: what the core holds of a Wan model while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuner.model import Batch, Component, Model, Network, SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.spec import ModelSpec
    from tuner_wan.experts import Pair

OTHER_EXPERT = "other_expert"
"""The component that is the expert which is not trained, for validation."""


class WanModel(Model):
    """A Wan model with one denoiser to train, or the two experts of Wan 2.2."""

    guidance = frozenset({"rescale", "layer_skip"})

    def __init__(
        self,
        spec: ModelSpec,
        networks: Sequence[Network],
        components: Mapping[str, Component],
        scheduler_config: Mapping[str, Any],
        flow_shift: float,
        *,
        global_time: bool = False,
    ) -> None:
        super().__init__(spec, networks, components)
        self.scheduler_config = dict(scheduler_config)
        self.flow_shift = flow_shift
        """Shift of the sampler where a request names none."""
        self.global_time = global_time
        """One time per clip, also where the model has a time for each token (``wan_force_2_1_time_embedding``)."""

    def predict(self, batch: Batch) -> Tensor:
        """Velocity (B, C, F', h, w) of ``batch.noisy`` at ``batch.sigmas``."""
        from tuner_wan.training import predict

        return predict(self.network, batch, self.spec, global_time=self.global_time)

    def forced_tokens(self, grid: tuple[int, int, int]) -> Tensor | None:
        """The tokens of a first frame that goes in without noise: all others look at it."""
        from tuner_wan import conditions

        clean = conditions.starts_clean(self.spec, grid[0])
        return conditions.first_frame_tokens(self.network.spec, grid) if clean else None

    def sample(self, request: SampleRequest) -> Tensor:
        """Normalised latents (1, C, F', h, w) of a rendered clip, through the network's own forward, without routes."""
        from tuner_wan.sampling import sample

        shift = request.flow_shift or self.flow_shift
        with self._pair() as pair:
            return sample(self.network, self.spec, self.scheduler_config, request, flow_shift=shift, pair=pair)

    @contextmanager
    def _pair(self) -> Iterator[Pair | None]:
        """Both experts, where both are trained or the other one is wanted for validation; else None."""
        from tuner_wan.experts import Expert, Pair

        boundary = self.spec.boundary
        if boundary is None or (len(self.networks) == 1 and OTHER_EXPERT not in self.components):
            yield None
        elif len(self.networks) > 1:
            high, low = (Expert.of(network) for network in self.networks.values())
            yield Pair(high, low, boundary)
        else:
            with self.use(OTHER_EXPERT) as (module,):
                ours, other = Expert.of(self.network), Expert(module, module.to)
                trains_high = self.network.spec.sigma_range[1] == 1.0
                yield Pair(ours, other, boundary) if trains_high else Pair(other, ours, boundary)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8, on the CPU, of normalised latents (1, C, F', h, w)."""
        from tuner_wan.encode import decode_latents

        with self.use("vae") as (vae,):
            return decode_latents(vae, latents)
