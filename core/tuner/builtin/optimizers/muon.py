"""Muon for matrices and AdamW for the rest, as one optimizer (arXiv:2502.16982)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon steps parameters of two axes, torch's AdamW all others: norms, biases, convolutions.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate and one weight decay fit both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """Arguments are those of ``torch.optim.Muon``, ``betas`` those of ``torch.optim.AdamW``.

        Raises ValueError as they do.
        """
        self._muon = torch.optim.Muon(
            [torch.zeros(1, 1)],
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._adamw = torch.optim.AdamW([torch.zeros(1)], weight_decay=weight_decay, betas=betas)
        groups = []
        for group in params:
            for optimizer, chosen in (
                (self._muon, [each for each in group["params"] if each.ndim == 2]),
                (self._adamw, [each for each in group["params"] if each.ndim != 2]),
            ):
                if chosen:
                    matrices = optimizer is self._muon
                    groups.append({**optimizer.defaults, **group, "params": chosen, "matrices": matrices})
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> Tensor | None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for optimizer, matrices in ((self._muon, True), (self._adamw, False)):
            optimizer.param_groups = [group for group in self.param_groups if group["matrices"] is matrices]
            optimizer.state = self.state
            optimizer.step()
        return None
