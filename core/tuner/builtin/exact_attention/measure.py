"""Which exact kernel is the fastest for the shapes of a run: forward and backward, timed once, then remembered.

On Hopper cuDNN's kernel is up to twice as fast as FlashAttention 2, on other devices it may be slower: a second of
measuring is cheaper than a table that ages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.files import atomic_write_text
from tuner.run import log

if TYPE_CHECKING:
    from tuner.run import Run

ROUNDS = 3
ROWS = 2**16
"""Query rows to measure with, over all heads: enough to fill a device, and little memory."""

Timer = Callable[[str], float]
"""Seconds that a kernel takes; raises RuntimeError where it cannot run."""


def best(run: Run, candidates: Sequence[str]) -> str | None:
    """The fastest of ``candidates`` for the denoiser and the clips of ``run``; None where none can run."""
    if run.spec is None or run.trained_shape is None:
        return None
    network = run.spec.networks[0]
    tokens = network.tokens(*run.spec.latents.shape(*run.trained_shape)[1:])
    head_dim = network.dim // network.heads
    size = 1 << (tokens - 1).bit_length()
    key = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {size} tokens of {head_dim}, {run.dtype}"
    return remembered(cache_file(), key, lambda: fastest(candidates, cuda_timer(tokens, head_dim, run.dtype)))


def cache_file() -> Path:
    """Where measurements are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner" / "attention-kernels.json"


def remembered(path: Path, key: str, measure: Callable[[], str | None]) -> str | None:
    """The answer under ``key`` in the JSON file ``path``, or that of ``measure``, which is then written there.

    A file that cannot be read or written only costs the measurement.
    """
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    if isinstance(known.get(key), str):
        return str(known[key])
    found = measure()
    if found is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps({**known, key: found}, indent=2) + "\n")
        except OSError as error:
            log.debug("the choice of attention kernel could not be written to %s: %s", path, error)
    return found


def fastest(candidates: Sequence[str], timer: Timer) -> str | None:
    """The candidate with the shortest time, of those that can run; the first of equals."""
    times: dict[str, float] = {}
    for name in candidates:
        try:
            times[name] = min(timer(name) for _ in range(ROUNDS))
        except RuntimeError as error:
            log.debug("attention kernel %s cannot run here: %s", name, error)
    if not times:
        return None
    shown = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
    log.info("attention kernels, forward and backward of a part of one layer: %s", shown)
    return min(times, key=lambda name: times[name])


def cuda_timer(tokens: int, head_dim: int, dtype: torch.dtype) -> Timer:
    """Times forward and backward of self-attention over ``tokens`` on the current CUDA device."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    heads = max(1, min(16, ROWS // tokens))
    rows = [torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]

    def timer(name: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = dispatch_attention_fn(*rows, backend=AttentionBackendName(name))
        torch.autograd.grad(out, rows, torch.ones_like(out))
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return timer
