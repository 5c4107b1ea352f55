"""torchao's optimizers with moments in fp8, refused on a device that has no fp8."""

from __future__ import annotations

from typing import Any

import torch
from torchao import optim

from tuner.errors import ConfigError

CAPABILITY = (8, 9)
"""The first CUDA capability that converts to fp8 (Ada, Hopper)."""


class OnlyWhereThereIsFp8:
    """Before one of torchao's classes, in its bases."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ConfigError where its parameters are on a device without fp8."""
        super().add_param_group(param_group)  # type: ignore[misc]
        for parameter in param_group["params"]:
            if parameter.device.type == "cuda" and torch.cuda.get_device_capability(parameter.device) < CAPABILITY:
                raise ConfigError(
                    f"{type(self).__name__} needs fp8, which {torch.cuda.get_device_name(parameter.device)} has not",
                    allowed="ao-adamw8bit, ao-adam8bit, bnb-adamw8bit and all others",
                    remedy="choose one of these as the optimizer",
                )


class AdamFp8(OnlyWhereThereIsFp8, optim.AdamFp8):
    """Adam, moments in fp8."""


class AdamWFp8(OnlyWhereThereIsFp8, optim.AdamWFp8):
    """AdamW, moments in fp8."""
