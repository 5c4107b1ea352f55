"""The dtype of queries, keys and values for libraries that autocast does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def halves(*tensors: Tensor) -> list[Tensor]:
    """The tensors in 16 bits, as torch's own kernels get them under autocast; the library takes nothing else."""
    last = tensors[-1]
    if last.dtype in (torch.bfloat16, torch.float16):
        dtype = last.dtype
    else:
        device = last.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.bfloat16
    return [each.to(dtype) for each in tensors]
