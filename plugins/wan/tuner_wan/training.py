"""The loss of one micro-batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner import flow
from tuner_wan.encode import pad_states

if TYPE_CHECKING:
    from tuner.model import Batch, Loss, Model
    from tuner.run import Run

TIME_SCALE = 1000
"""The network's time at sigma 1."""


def compute_loss(run: Run, model: Model, batch: Batch) -> Loss:
    """Predict the velocity of ``batch.noisy`` (B, C, F', h, w) and compare it with ``batch.target``.

    Time is 1000 * sigma, continuous, float32. Latents and text go in as a diffusers pipeline passes
    them: in the dtype of the network's matrices, the text zero-padded to 512 tokens.
    """
    network = model.network
    dtype = network.dtype_of("patch_embedding.weight")
    (prediction,) = network.module(
        hidden_states=batch.noisy.to(dtype),
        timestep=batch.sigmas * TIME_SCALE,
        encoder_hidden_states=pad_states(batch.text["states"].to(dtype), network.spec.text_tokens),
        return_dict=False,
    )
    return flow.loss(run.config, prediction, batch)
