"""Rows of training: a config of ours, by the real step, beside the plain loop of the same shape."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_run import GIB, Case, described, measure, opened, settings
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gpu import floor, plain
from gpu.running import Row, Skipped
from tuner.assembly import assemble
from tuner.errors import ConfigError
from tuner.train.step import train_step

COLUMNS = (
    *("tokens", "seconds", "times_plain", "times_bf16", "times_unrouted", "times_by_model", "floor_seconds"),
    *("of_floor", "mfu", "tflop", "peak_gib", "reserved_gib", "predicted_gib", "cosine"),
)
WARM_UP, STEPS = 1, 3
LONGEST = 240.0
"""Seconds after which a row takes no more than the fewest steps."""
AREA, CLIP, PICTURE = (81, 480, 480), (81, 480, 832), (1, 480, 832)
"""(frames, height, width) of 18 900, 32 760 and 1 560 tokens."""
TINY_CLIP = (5, 64, 64)
TINY: Mapping[str, Any] = {"blocks": 4, "dim": 24, "heads": 2, "ffn_dim": 32, "text_dim": 16}
FREE: Mapping[str, Any] = {"gradient_checkpointing": False}
FULL: Mapping[str, Any] = {"gradient_checkpointing": True}
SELECTIVE: Mapping[str, Any] = {"gradient_checkpointing": "selective"}
OFFLOADED: Mapping[str, Any] = {"gradient_checkpointing": "offload"}
FUSED: Mapping[str, Any] = {"fused_blocks": True}
STREAMED: Mapping[str, Any] = {"enable_group_offload": True, "group_offload_use_stream": True}
COMPILED: Mapping[str, Any] = {"dynamo_backend": "inductor"}
TREAD: Mapping[str, Any] = {
    "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}
}
PRODUCTS = ("int8-products", "fp8-products")
"""Values of ``base_model_precision`` that compute in 8 bits."""
ATTENTION = ("_native_cudnn", "_native_flash", "_native_efficient")


def ours(case: Case, warm_up: int, number: int) -> dict[str, Any]:
    """Seconds, peak and what they come to, of ``number`` steps of the real trainer."""
    _check(case)
    result = measure(case, number, time.time() + LONGEST, warm_up)
    if result.note.startswith("out of memory"):
        raise torch.OutOfMemoryError(result.note)
    if not result.seconds:
        raise Skipped(result.note)
    median = statistics.median(result.seconds)
    found: dict[str, Any] = {"seconds": median, "tokens": result.tokens, "predicted_gib": result.predicted / GIB}
    if result.allocated is not None and result.reserved is not None and result.context is not None:
        found |= {
            "peak_gib": result.allocated / GIB,
            "reserved_gib": result.reserved / GIB,
            "total_gib": (result.reserved + result.context) / GIB,
            "off_predicted": abs(result.predicted / result.allocated - 1),
        }
    if result.work is not None:
        found |= floor.figures(result.work, median, floor.card())
    return found


def _check(case: Case) -> None:
    """Raise Skipped where this version has no such key or value, or this machine cannot have it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            described(case, assemble(settings(case, Path(folder))))
        except ConfigError as error:
            raise Skipped(str(error)) from error


# Gradients

WIDTH = 0.01
"""Standard deviation of LoRA's parameters where gradients are compared: from none, half of the gradients are none."""


def gradients(case: Case) -> Tensor:
    """Of all of LoRA's parameters in the first step, as one vector on the CPU.

    Weights, LoRA, noise and batch are the same for all cases of one network and shape.
    """
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        assembly = assemble(settings(case, Path(folder)))
        run, spec, _ = described(case, assembly)
        torch.manual_seed(0)
        session = opened(case, assembly, run, spec)
        draw = torch.Generator().manual_seed(0)
        trained = [each for each in session.model.network.module.named_parameters() if each[1].requires_grad]
        for name, parameter in sorted(trained):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * WIDTH)
            parameter.register_post_accumulate_grad_hook(partial(_keep, found, name))
        train_step(session)
        session.loader.close()
    return torch.cat([found[name].flatten() for name in sorted(found)])


def _keep(found: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    found[name] = parameter.grad.detach().double().cpu().clone()


def cosine(case: Case, precision: str) -> dict[str, Any]:
    """Between LoRA's gradients over the base in bf16 and over the same base in ``precision``."""
    eight = replace(case, keys={**case.keys, "base_model_precision": precision})
    _check(eight)
    one = gradients(case)
    gc.collect()  # the first network's weights
    return {"cosine": float(cosine_similarity(one, gradients(eight), dim=0))}


# Rows


def kernel(name: str) -> dict[str, str]:
    """The keys that choose an attention kernel."""
    return {"attention_mechanism": name}


@dataclass(frozen=True)
class Part:
    """Rows of one network."""

    flavour: str
    smoke: bool

    def case(self, name: str, shape: tuple[int, int, int], *keys: Mapping[str, Any]) -> Case:
        """A tiny one of the same keys, where that is enough; compiled by a backend that takes no minute."""
        shape, narrow = (TINY_CLIP, TINY) if self.smoke else (shape, {})
        merged = {name: value for each in keys for name, value in each.items()}
        if self.smoke and "dynamo_backend" in merged:
            merged["dynamo_backend"] = "aot_eager"
        return Case(name, self.flavour, shape, merged, narrow=narrow)

    @property
    def attention(self) -> tuple[str, ...]:
        """Kernels to compare: torch's on CUDA, or those that any machine has."""
        return ("native",) if self.smoke else ATTENTION

    def ours(self, name: str, shape: tuple[int, int, int], *keys: Mapping[str, Any], **row: Any) -> Row:
        """A row of the real trainer. ``row``: other fields of :class:`Row`."""
        return Row(name, ours, (self.case(name, shape, *keys), WARM_UP, 1 if self.smoke else STEPS), **row)

    def plain(self, name: str, shape: tuple[int, int, int], **row: Any) -> Row:
        """A row of diffusers and PEFT."""
        return Row(name, plain.measure, (self.case(name, shape, FULL), WARM_UP, 1 if self.smoke else STEPS), **row)

    def cosine(self, name: str, precision: str, **row: Any) -> Row:
        """A row of gradients, of an image, so that it takes no time."""
        return Row(name, cosine, (self.case(name, PICTURE, FULL), precision), **row)
