"""The base's own prediction as a training target."""

from __future__ import annotations

import torch

from tuner.data.transfer import sent
from tuner.model import Batch, Model


def take_base_as_target(model: Model, batch: Batch) -> None:
    """Replace ``batch.target`` (B, C, F', h, w) by what the base predicts, for the samples marked ``regularisation``.

    The base sees the same noisy latents, times and text. It runs on the whole batch, also where only some
    samples need it: on a part of it, matrices of another shape would round differently, and a model that has
    learnt nothing yet would already be told that it strayed.
    """
    with model.network.base():
        prediction = model.predict(batch)
    marked = sent(torch.tensor(batch.regularisation or (False,) * len(batch.target)), batch.target.device)
    where = marked.view(-1, *[1] * (batch.target.ndim - 1))
    # The wider of the two dtypes: neither the prediction nor the others' target may lose digits.
    batch.target = torch.where(where, prediction, batch.target)
