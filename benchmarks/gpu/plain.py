"""What a step is held against: diffusers' network with PEFT's LoRA in a plain loop, as their examples write it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.training_utils import cast_training_params
from gpu_run import GIB, Case, described, settings
from peft import LoraConfig
from torch import Tensor

from gpu import floor
from gpu.ceilings import device
from tuner.assembly import assemble
from tuner.spec import ModelSpec

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def network(spec: ModelSpec) -> Any:
    """Random weights of the network's dimensions in bfloat16, but for what diffusers keeps in float32; LoRA in float32.

    Every block is checkpointed.
    """
    facts, before = spec.networks[0], torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            model: Any = WanTransformer3DModel(
                num_attention_heads=facts.heads,
                attention_head_dim=facts.dim // facts.heads,
                in_channels=facts.in_channels,
                out_channels=spec.latents.channels,
                text_dim=facts.text_dim,
                ffn_dim=facts.ffn_dim,
                num_layers=facts.blocks,
            )
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules).isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    cast_training_params(model, dtype=torch.float32)
    model.enable_gradient_checkpointing()
    return model.train()


def step(model: Any, optimizer: torch.optim.Optimizer, latents: Tensor, text: Tensor) -> None:
    """Flow matching's loss, its gradients, their norm's limit, an update. Latents (1, C, F', h, w), text (1, L, D)."""
    noise, level = torch.randn_like(latents), torch.rand(1, device=latents.device)
    with torch.autocast(latents.device.type, torch.bfloat16):
        noisy = torch.lerp(latents, noise, level).to(torch.bfloat16)
        result = model(noisy, level * 1000, text, return_dict=False)[0]
    torch.nn.functional.mse_loss(result.float(), noise - latents).backward()
    torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure(case: Case, warm_up: int, number: int) -> dict[str, Any]:
    """Seconds and peak of ``number`` steps of ``case``'s network and shape. Of its keys none is read."""
    where = device()
    with tempfile.TemporaryDirectory() as folder:
        _, spec, work = described(case, assemble(settings(case, Path(folder))))
    torch.manual_seed(0)
    model, facts = network(spec), spec.networks[0]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    latents = torch.randn(1, *spec.latents.shape(*case.shape), device=where)
    text = torch.randn(1, facts.text_tokens, facts.text_dim, device=where, dtype=torch.bfloat16)
    cuda = where.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = [timed(model, optimizer, latents, text) for _ in range(warm_up + number)][warm_up:]
    median = statistics.median(taken)
    found = {"seconds": median, "tokens": work.tokens, **floor.figures(work, median, floor.card())}
    if cuda:
        found |= {
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    return found


def timed(*given: Any) -> float:
    """Seconds of a step, the device waited for before and after it."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    began = time.perf_counter()
    step(*given)
    wait()
    return time.perf_counter() - began
