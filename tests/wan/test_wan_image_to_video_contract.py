"""A family's contract, held by models that are given frames as by those that are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tuner import flow
from tuner.testing.contract import FamilyContract
from tuner_wan.tiny import build_tiny


class TestBetweenTwoFrames(FamilyContract):
    """Wan from a first to a last frame, with embeddings of both."""

    plugin = "wan"

    def build(self, folder: Path) -> dict[str, Any]:
        base = build_tiny(folder / "wan", "flf2v-14b-2.1")
        return {"pretrained_model_name_or_path": str(base), "model_flavour": "flf2v-14b-2.1"}


class TestCleanFirstFrame(FamilyContract):
    """Wan 2.2 5B, whose first latent frame goes in without noise."""

    plugin = "wan"
    clip = (9, 32, 64)

    def build(self, folder: Path) -> dict[str, Any]:
        base = build_tiny(folder / "wan", "ti2v-5b-2.2")
        return {"pretrained_model_name_or_path": str(base), "model_flavour": "ti2v-5b-2.2"}

    def test_loss_is_that_of_the_prediction(self) -> None:
        """Of the frames that are not given."""
        bench = self.bench
        model, batch = bench.load(), bench.batch(bench.hand_over())
        with torch.no_grad():
            prediction = model.predict(batch)
            found = bench.hook.compute_loss(run=bench.run, model=model, batch=batch).per_sample
        rest = replace(batch, target=batch.target[:, :, 1:])
        torch.testing.assert_close(found, flow.loss(bench.run.config, prediction[:, :, 1:], rest).per_sample)
