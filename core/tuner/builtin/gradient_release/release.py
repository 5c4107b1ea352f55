"""Steps in backward: the optimizer sees one parameter at a time, when its gradient is complete.

Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (arXiv:2306.09782), with any
optimizer that treats each tensor by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tuner.errors import TrainingError


class Release:
    """A :class:`tuner.train.optimizers.GradientRelease` for any ``torch.optim.Optimizer``."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_value: float) -> None:
        """Give each parameter a group of its own, so that what a library counts in groups is counted for each once.

        Arguments
            clip_value: clip every element of a gradient to plus or minus this; 0 does not clip.
        """
        self.reached: set[Tensor] = set()
        self._optimizer = optimizer
        self._clip_value = clip_value
        self._norms: list[Tensor] = []
        optimizer.param_groups = [
            {**group, "params": [parameter]} for group in optimizer.param_groups for parameter in group["params"]
        ]
        self._index = {group["params"][0]: index for index, group in enumerate(optimizer.param_groups)}
        for parameter in self._index:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        """Called by autograd. Raises TrainingError where one backward has two gradients for a parameter."""
        if parameter in self.reached:
            raise TrainingError(
                f"a parameter of shape {tuple(parameter.shape)} got two gradients in one backward, and was stepped "
                "after the first",
                remedy="leave gradient_release out: something in this network runs a backward inside backward",
            )
        gradient = parameter.grad
        assert gradient is not None
        self.reached.add(parameter)
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))
        if self._clip_value:
            nn.utils.clip_grad_value_([parameter], self._clip_value)
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [groups[self._index[parameter]]]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def finish(self) -> Tensor:
        """The global L2 norm of the gradients since the last call; what was reached is forgotten."""
        norm = nn.utils.get_total_norm(self._norms)
        self.reached.clear()
        self._norms.clear()
        return norm
