"""FlashAttention 3, called by ourselves: diffusers wraps it in an operator without a backward."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from tuner_attention.precision import halves


def flash_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact attention; everything (B, tokens, heads, head_dim)."""
    library: Any = import_module("flash_attn_interface")
    out: Any = library.flash_attn_func(*halves(query, key, value), causal=False)
    # Some releases answer with (output, log-sum-exp).
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
