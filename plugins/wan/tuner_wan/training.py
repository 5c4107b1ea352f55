"""What the network is asked in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner_wan import conditions
from tuner_wan.encode import pad_states

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.model import Batch, Network
    from tuner.spec import ModelSpec

TIME_SCALE = 1000
"""The network's time at sigma 1."""


def predict(network: Network, batch: Batch, spec: ModelSpec, *, global_time: bool = False) -> Tensor:
    """Velocity (B, C, F', h, w) of ``batch.noisy`` (B, C, F', h, w) at ``batch.sigmas`` (B,).

    Time is 1000 * sigma, continuous, float32. Latents, conditions and text go in as a diffusers pipeline passes
    them: in the dtype of the network's matrices, the text zero-padded to 512 tokens.

    Arguments
        global_time: one time per sample, also where the model has a time for each token.
    """
    dtype = network.dtype_of("patch_embedding.weight")
    times = batch.sigmas * TIME_SCALE
    images = conditions.image_states(spec, batch.video)
    prediction: Tensor
    (prediction,) = network.module(
        hidden_states=conditions.network_input(spec, batch.noisy, batch.video).to(dtype),
        timestep=times if global_time else conditions.token_times(spec, network.spec, times, batch.noisy),
        encoder_hidden_states=pad_states(batch.text["states"].to(dtype), network.spec.text_tokens),
        encoder_hidden_states_image=None if images is None else images.to(dtype),
        return_dict=False,
    )
    return prediction
