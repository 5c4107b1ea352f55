"""Whole steps in turns: our loop and a bare one, our blocks and diffusers' with PEFT, with and without routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import saving
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

import tread
from rows.row import Row, paired
from tuner.blocks import StepContext
from tuner.flops import step_flops
from tuner.testing.opened import opened
from tuner.train.session import Session
from tuner.train.step import make_batch, train_step
from tuner_kernels import block as fused
from tuner_wan.encode import pad_states

PAIRS, FEW, MANY = 5, 3, 11
"""Pairs of steps: of a goal, of a row for comparison or of long steps, of a goal within a hundredth."""


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Rows of the loop, the blocks and the routes."""
    return [*loop(folder, tiny=tiny), *blocks(tiny=tiny), *routes(tiny=tiny)]


# The loop


def loop(folder: Path, *, tiny: bool) -> list[Row]:
    """`train_step` beside a bare torch loop on the same module, on a step of some length and on a short one."""
    rows = []
    if not tiny:
        with opened(config(folder / "long", layers=3, heads=3, head_dim=128, ffn_dim=1536, pixels=320)) as session:
            found = paired(advanced(session), bare(session), MANY)
        note = f"steps of {found.one.wall:.2f} s; of time on the clock {found.wall:.3f}"
        rows.append(Row("our loop / bare torch loop, CPU time", round(found.cpu, 3), 1.01, note=note))
    with opened(config(folder / "short", layers=2, heads=2, head_dim=12, ffn_dim=32, pixels=64)) as session:
        found = paired(advanced(session), bare(session), 2 if tiny else 100)
    more = 1000 * (found.one.wall - found.other.wall)
    note = f"medians of steps of {1000 * found.one.wall:.1f} and {1000 * found.other.wall:.1f} ms"
    return [*rows, Row("our loop - bare torch loop", round(more, 2), 2, unit="ms a step", note=note)]


def advanced(session: Session) -> Callable[[], None]:
    """A step as the loop makes it, each with the batch that was read ahead in the one before."""

    def step() -> None:
        train_step(session)
        session.run.step += 1

    return step


def config(folder: Path, *, layers: int, heads: int, head_dim: int, ffn_dim: int, pixels: int) -> dict[str, Any]:
    """A config over a Wan of that size and one clip."""
    from tuner.testing.clips import render_clip
    from tuner_wan.tiny import build_tiny_t2v

    made = build_tiny_t2v(folder / "net", layers=layers, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim)
    render_clip(folder / "films" / "clip.mp4", width=pixels, height=pixels, frames=9, fps=16, seed=1)
    found = saving.config(folder)
    [clips, text] = found["data_backend_config"]
    clips = {**clips, "instance_data_dir": str(folder / "films"), "resolution": pixels}
    return {
        **found,
        "pretrained_model_name_or_path": str(made),
        "lora_rank": 16,
        "gradient_checkpointing": False,
        "data_backend_config": [clips, text],
    }


def bare(session: Session) -> Callable[[], float]:
    """A step as one would write it by hand, on the session's own module and a batch that lies ready."""
    network = session.take_turn()
    batch = make_batch(session, session.loader.load(0, 0))
    module, latents = network.module, batch.latents
    text = pad_states(batch.text["states"], network.spec.text_tokens)  # as every Wan reads it
    trained = [each for each in module.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> float:
        network.trampoline.context = StepContext()
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents))
        noisy = latents + (noise - latents) * sigma.view(-1, 1, 1, 1, 1)
        found = module(noisy, sigma * 1000, text, return_dict=False)[0]
        loss = nn.functional.mse_loss(found, noise - latents)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


# Blocks


def scale_of(*, tiny: bool) -> tread.Scale:
    """Two blocks and 4 096 tokens."""
    small = tread.Scale(2, 1, 64, (1, 8, 8), torch.float32)
    return small if tiny else replace(tread.SMALL, blocks=2)


def blocks(*, tiny: bool) -> list[Row]:
    """A checkpointed step of our blocks, and with ``fused_blocks``, beside diffusers and PEFT."""
    scale = scale_of(tiny=tiny)
    ours, ours_fused = (tread.Bench(scale, torch.device("cpu")) for _ in range(2))
    for name, parameter in ours.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    weights = ours.module.state_dict()
    ours_fused.module.load_state_dict(weights)
    for each in ours_fused.module.blocks:
        fused.install(each)
    theirs = diffusers_step(ours, weights)
    context = StepContext(checkpointing=True)
    expected = theirs()
    rows = []
    for name, bench, goal in (("ours", ours, None), ("ours, fused_blocks", ours_fused, 0.95)):
        bench.trampoline.context = context
        with torch.no_grad():
            loss = bench.module(*bench.inputs, return_dict=False)[0].square().mean().item()
        rows.append(Row(f"loss of {name}, off diffusers'", abs(loss / expected - 1), 1e-5))
        pairs = 1 if tiny else FEW if goal is None else PAIRS
        found = paired(lambda bench=bench: bench.step(context), theirs, pairs)
        note = f"steps of {found.one.wall:.2f} and {found.other.wall:.2f} s; on the clock {found.wall:.3f}"
        rows.append(Row(f"step of {name} / diffusers + PEFT, CPU time", round(found.cpu, 3), goal, note=note))
    return rows


def diffusers_step(like: tread.Bench, weights: dict[str, Any]) -> Callable[[], float]:
    """diffusers' own forward and checkpointing with PEFT's LoRA: a step that gives its loss."""
    module = WanTransformer3DModel.from_config(like.module.config).requires_grad_(False)
    module.add_adapter(LoraConfig(r=tread.RANK, lora_alpha=tread.RANK, target_modules=list(tread.TARGETS)))
    module.load_state_dict(weights)
    module.enable_gradient_checkpointing()
    module.train()
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=1e-5)

    def step() -> float:
        loss = module(*like.inputs, return_dict=False)[0].float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


# Routes


def routes(*, tiny: bool) -> list[Row]:
    """TREAD's step beside the FLOP model, and the router by itself."""
    scale = replace(scale_of(tiny=True), blocks=8) if tiny else replace(tread.SMALL, blocks=6)
    bench = tread.Bench(scale, torch.device("cpu"))
    settings = tread.scaled(tread.CONFIGURATIONS["0.5 over 2..-2"], scale.blocks)
    routed, plain = tread.context(settings), tread.context(None)
    found = paired(lambda: bench.step(routed), lambda: bench.step(plain), 1 if tiny else FEW)
    flops = [step_flops(tread.workload(scale, each)).hardware for each in (settings, None)]
    model = flops[0] / flops[1]
    own = tread.router_seconds(bench, routed, 1 if tiny else 5)
    share = own / found.one.cpu
    note = f"measured {found.cpu:.3f} of CPU time, {found.wall:.3f} on the clock; model {model:.3f}"
    return [
        Row("TREAD, measured / FLOP model: off by", round(abs(found.cpu / model - 1), 4), 0.05, note=note),
        Row("TREAD's router, share of the step", round(share, 4), 0.005),
    ]
