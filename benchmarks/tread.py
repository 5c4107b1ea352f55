"""How much of a training step TREAD's routes leave, beside what the FLOP model of ``tuner plan`` says they leave.

    python benchmarks/tread.py                      CPU, a narrow Wan of 8 blocks, 4 096 tokens: 10 minutes
    python benchmarks/tread.py --device cuda --full Wan 2.1 1.3B's dimensions, 32 760 tokens, bf16

A real Wan network with random weights, LoRA of rank 16 on its attention, checkpointing, the real block driver and the
real plugin; a step is forward, backward and AdamW. Steps without routes and with each set of routes take turns, so
that what else the machine does hits all alike; of each round's ratios the median counts. On a busy machine look at the
ratio of CPU seconds, and take one thread: threads that wait for each other count as work. The router is also timed by
itself: the same routes over blocks that do nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tuner.blocks import BlockStack, StepContext, Stream, install, run_stack
from tuner.config.keys import CoreConfig
from tuner.flops import step_flops
from tuner.run import Run
from tuner.spec import LatentGeometry, NetworkSpec
from tuner.workload import Workload
from tuner_tread import RouteSettings, TreadConfig, TreadPlugin, TreadSettings
from tuner_tread.ranges import dropped_shares, resolve
from tuner_wan.stack import WanStack

RANK, TEXT_TOKENS, TEXT_WIDTH = 16, 512, 4096
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ORIGINAL = 30
"""Blocks of the network that the users' routes were written for."""
CONFIGURATIONS = {
    "0.1 over 2..-2": ((0.1, 2, 28),),
    "progressive": ((0.1, 2, 8), (0.25, 9, 11), (0.35, 12, 15), (0.25, 16, 23), (0.1, 24, 28)),
    "0.5 over 2..-2": ((0.5, 2, 28),),
}
"""Routes on 30 blocks: (share dropped, first block, last block)."""


@dataclass(frozen=True)
class Scale:
    """Size of the network and of its clip."""

    blocks: int
    heads: int
    ffn: int
    latents: tuple[int, int, int]
    """(frames, height, width) of the latents"""
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        """Width D."""
        return self.heads * 128


SMALL = Scale(8, 3, 2240, (4, 64, 64), torch.float32)
"""The fewest blocks on which each of the progressive routes has one."""
FULL = Scale(30, 12, 8960, (21, 60, 104), torch.bfloat16)


class Bench:
    """A network in training, and its step."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        self.scale, self.device = scale, device
        torch.manual_seed(0)
        with torch.device(device):
            self.module = WanTransformer3DModel(
                num_attention_heads=scale.heads,
                attention_head_dim=128,
                text_dim=TEXT_WIDTH,
                ffn_dim=scale.ffn,
                num_layers=scale.blocks,
            )
            draw = torch.randn(1, 16, *scale.latents)
            self.inputs = (draw, torch.tensor([500.0]), torch.randn(1, TEXT_TOKENS, TEXT_WIDTH).to(scale.dtype))
        self.module.to(scale.dtype).requires_grad_(False)
        self.module.rope = type(self.module.rope)(128, (1, 2, 2), 1024).to(device)  # its tables stay exact
        self.module.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)))
        self.module.train()
        trained = [each for each in self.module.parameters() if each.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.trampoline = install(self.module, WanStack(self.module))

    def step(self, context: StepContext) -> None:
        """Forward, backward, AdamW."""
        self.trampoline.context = context
        mixed = self.scale.dtype != torch.float32
        with torch.autocast(self.device.type, self.scale.dtype, enabled=mixed):
            (output,) = self.module(self.inputs[0].to(self.scale.dtype), *self.inputs[1:], return_dict=False)
            loss = output.float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, work: Callable[[], None]) -> tuple[float, float]:
        """(wall-clock seconds, CPU seconds of this process) of ``work``; the device's own clock where it is a GPU."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000, 0.0
        wall, busy = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - wall, time.process_time() - busy


def scaled(routes: Sequence[tuple[float, int, int]], blocks: int) -> TreadSettings:
    """Routes on 30 blocks, on a network of ``blocks``: both ends as far from the ends, the bounds between in scale."""

    def at(bound: int) -> int:
        return 2 + round((bound - 2) * (blocks - 3) / (ORIGINAL - 3))

    written = [
        RouteSettings(selection_ratio=ratio, start_layer_idx=at(start), end_layer_idx=at(last + 1) - 1)
        for ratio, start, last in routes
    ]
    return TreadSettings(routes=tuple(written))


def context(settings: TreadSettings | None) -> StepContext:
    """A step with the plugin's own routes, another step's each time; None is without."""
    if settings is None:
        return StepContext(checkpointing=True)
    plugin = TreadPlugin("tread", TreadConfig(tread_config=settings))
    run = Run(CoreConfig(), {"tread": plugin})
    run.token_selectors = plugin.token_selectors(run=run)

    def router(request: Any) -> Any:
        run.step += 1
        return plugin.route_tokens(run=run, request=request)

    return StepContext(router=router, checkpointing=True)


# The model


def workload(scale: Scale, settings: TreadSettings | None) -> Workload:
    """The step in the terms of ``tuner plan``."""
    network = NetworkSpec("net", scale.blocks, scale.dim, scale.heads, scale.ffn, TEXT_WIDTH, TEXT_TOKENS, 16)
    frames, height, width = scale.latents
    pair = 2 * RANK * scale.dim  # of each of eight matrices, two of them on the text
    plain = Workload(
        network,
        LatentGeometry(16, 4, 8),
        (4 * frames - 3, 8 * height, 8 * width),
        samples=1,
        adapter_parameters=8 * pair * scale.blocks,
        adapter_parameters_on_text=2 * pair * scale.blocks,
    )
    if settings is None:
        return plain
    return replace(plain, dropped=dropped_shares(resolve(settings, scale.blocks), scale.blocks))


# The router by itself


class IdleStack(BlockStack):
    """The real stream, over blocks that do nothing."""

    def __init__(self, stream: Stream, blocks: int) -> None:
        super().__init__(nn.Identity(), [nn.Identity() for _ in range(blocks)])
        self.stream = stream

    def embed(self) -> Stream:
        """The same each time, its tokens wanting a gradient."""
        return replace(self.stream, tokens=self.stream.tokens.detach().requires_grad_(True))

    def block(self, block: nn.Module, stream: Stream) -> Stream:
        """Nothing, but what autograd cannot leave out."""
        return replace(stream, tokens=stream.tokens.view_as(stream.tokens))

    def unembed(self, stream: Stream) -> Tensor:
        """The tokens."""
        return stream.tokens


def router_seconds(bench: Bench, step: StepContext, repeats: int) -> float:
    """Drawing, sorting, gathering and scattering, forward and backward: CPU seconds, or the GPU's; a median."""
    with torch.no_grad():
        latents = bench.inputs[0].to(bench.scale.dtype)
        stream = WanStack(bench.module).embed(latents, *bench.inputs[1:])
    stack = IdleStack(stream, bench.scale.blocks)
    gradient = torch.ones_like(stream.tokens)

    def once(each: StepContext) -> float:
        wall, busy = bench.timed(
            lambda: stack.forward(lambda entered: run_stack(stack, entered, each)).backward(gradient)
        )
        return busy or wall

    once(step)
    idle = StepContext(checkpointing=True)
    return statistics.median(once(step) - once(idle) for _ in range(repeats))


def measure(bench: Bench, rounds: int, console: Console) -> Table:
    """All configurations in turns, as a table."""
    routes = {name: scaled(each, bench.scale.blocks) for name, each in CONFIGURATIONS.items()}
    steps = {name: context(each) for name, each in ({"none": None} | routes).items()}
    for step in steps.values():
        bench.step(step)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for done in range(rounds):
        for name, step in steps.items():
            times[name].append(bench.timed(partial(bench.step, step)))
        console.log(f"round {done + 1}: " + ", ".join(f"{name} {each[-1]}" for name, each in times.items()))
    columns = ("routes", "s/step", "ratio", "of CPU s", "FLOP model", "of it", "speed-up", "router")
    table = Table(*columns)
    plain = step_flops(workload(bench.scale, None)).hardware
    for name in steps:
        seconds = statistics.median(wall for wall, _ in times[name])
        work = statistics.median(busy or wall for wall, busy in times[name])
        pairs = list(zip(times[name], times["none"], strict=True))
        ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
        busy = statistics.median(ours[1] / theirs[1] if theirs[1] else float("nan") for ours, theirs in pairs)
        model = step_flops(workload(bench.scale, routes.get(name))).hardware / plain
        own = router_seconds(bench, steps[name], 9) / work if name in routes else 0.0
        measured = (f"{seconds:.3f}", f"{ratio:.3f}", f"{busy:.3f}", f"{model:.3f}")
        of_model = f"{ratio / model:.3f}, {busy / model:.3f}"
        table.add_row(name, *measured, of_model, f"{1 / ratio:.2f}x", f"{100 * own:.2f} %")
    return table


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="Wan 2.1 1.3B's dimensions at 832x480x81, bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, help="another number of blocks")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    scale = FULL if options.full else SMALL
    if options.blocks:
        scale = replace(scale, blocks=options.blocks)
    bench = Bench(scale, torch.device(options.device))
    tokens = workload(scale, None).tokens
    console = Console(width=130)
    console.print(
        f"D {scale.dim}, {scale.blocks} blocks, {tokens} tokens, {scale.dtype}, LoRA r{RANK}, checkpointing, "
        f"{options.rounds} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    console.print(measure(bench, options.rounds, console))


if __name__ == "__main__":
    main()
