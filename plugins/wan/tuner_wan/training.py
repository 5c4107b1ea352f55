"""What the network is asked in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner_wan.encode import pad_states

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.model import Batch, Network

TIME_SCALE = 1000
"""The network's time at sigma 1."""


def predict(network: Network, batch: Batch) -> Tensor:
    """Velocity (B, C, F', h, w) of ``batch.noisy`` (B, C, F', h, w) at ``batch.sigmas`` (B,).

    Time is 1000 * sigma, continuous, float32. Latents and text go in as a diffusers pipeline passes
    them: in the dtype of the network's matrices, the text zero-padded to 512 tokens.
    """
    dtype = network.dtype_of("patch_embedding.weight")
    prediction: Tensor
    (prediction,) = network.module(
        hidden_states=batch.noisy.to(dtype),
        timestep=batch.sigmas * TIME_SCALE,
        encoder_hidden_states=pad_states(batch.text["states"].to(dtype), network.spec.text_tokens),
        return_dict=False,
    )
    return prediction
