"""Routes over two processes (gloo): replicated and sharded networks learn what one process learns of the whole batch.

Two ways of several devices, without any launcher: torch's DistributedDataParallel, and ``fully_shard`` (FSDP2) of
each block and of the rest. The tokens that a sample keeps are drawn from its position in the global batch, so it
does not matter which process has it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tuner.blocks import RouteRequest, StepContext, TokenRoute, install
from tuner.config.keys import CoreConfig
from tuner.run import Run
from tuner_tread import RouteSettings, TreadConfig, TreadPlugin, TreadSettings

WORLD = 2
BATCH = 4
"""Of all processes together."""
TOKENS = 36
FORCED = 6
CONTEXT = multiprocessing.get_context("fork")
WRAPPINGS = ("replicated", "sharded")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    """A tiny TI2V, float64: per-token times, so that modulation goes with the tokens too."""
    from tuner_wan.stack import WanStack
    from tuner_wan.tiny import tiny_pipeline

    transformer: nn.Module = tiny_pipeline("ti2v-5b-2.2", layers=4).transformer.double().train()
    install(transformer, WanStack(transformer))
    return transformer


def global_batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    times = torch.rand(BATCH, TOKENS, generator=draw) * 1000
    return {
        "hidden_states": torch.randn(BATCH, 48, 3, 8, 6, generator=draw, dtype=torch.float64),
        "timestep": times,
        "encoder_hidden_states": torch.randn(BATCH, 512, 16, generator=draw, dtype=torch.float64),
        "target": torch.randn(BATCH, 48, 3, 8, 6, generator=draw, dtype=torch.float64),
    }


def context(positions: Sequence[int], kept: list[TokenRoute], *, checkpointing: bool) -> StepContext:
    """Two routes of the plugin itself; ``kept`` is told what they keep. Some samples force tokens, others none."""
    routes = [
        RouteSettings(selection_ratio=0.5, start_layer_idx=0, end_layer_idx=1),
        RouteSettings(selection_ratio=0.9, start_layer_idx=2, end_layer_idx=-2),
    ]
    plugin = TreadPlugin("tread", TreadConfig(tread_config=TreadSettings(routes=tuple(routes))))
    run = Run(CoreConfig(seed=5), {"tread": plugin}, step=3)
    run.token_selectors = plugin.token_selectors(run=run)
    forced = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    forced[1, :FORCED] = True

    def router(request: RouteRequest) -> Sequence[TokenRoute]:
        routes = plugin.route_tokens(run=run, request=request) or ()
        kept.extend(routes)
        return routes

    return StepContext(
        router=router,
        checkpointing=checkpointing,
        positions=tuple(positions),
        forced=forced[list(positions)],
        keep_at_least=FORCED,  # of the global batch, as the loader has it
    )


def learn(called: nn.Module, inner: nn.Module, positions: Sequence[int], *, checkpointing: bool) -> dict[str, Tensor]:
    """Prediction, kept tokens and gradients of the samples at ``positions``, through ``called``."""
    kept: list[TokenRoute] = []
    inner._tuner_trampoline.context = context(positions, kept, checkpointing=checkpointing)  # type: ignore[union-attr]
    inputs = {name: each[list(positions)] for name, each in global_batch().items()}
    target = inputs.pop("target")
    (output,) = called(**inputs, return_dict=False)
    (output - target).square().mean().backward()
    gradients = {name: each.grad for name, each in inner.named_parameters()}
    assert not [name for name, each in gradients.items() if each is None]
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in gradients.items()}
    routes = {f"keep {index}": route.keep for index, route in enumerate(kept)}
    return {"output": output.detach(), **routes, **whole}


def wrap(module: nn.Module, wrapping: str) -> nn.Module:
    """``module`` for two processes; fully_shard edits it in place."""
    if wrapping == "replicated":
        return nn.parallel.DistributedDataParallel(module)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for block in module.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def one_of_two(rank: int, folder: Path, wrapping: str, checkpointing: bool) -> None:
    """What each process does: the samples of its share, in order; what it found goes to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    module = network()
    called = wrap(module, wrapping)
    assert any(isinstance(each, DTensor) for each in module.parameters()) == (wrapping == "sharded")
    share = BATCH // WORLD
    positions = range(rank * share, (rank + 1) * share)
    save_file(learn(called, module, positions, checkpointing=checkpointing), folder / f"{rank}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_two_processes(folder: Path, *arguments: Any) -> list[dict[str, Tensor]]:
    ranks = [CONTEXT.Process(target=one_of_two, args=(rank, folder, *arguments)) for rank in range(WORLD)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The global batch in one process."""
    torch.set_num_threads(1)
    module = network()
    return learn(module, module, range(BATCH), checkpointing=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_two_processes_learn_what_one_learns(
    tmp_path: Path, alone: dict[str, Tensor], wrapping: str, checkpointing: bool
) -> None:
    first, second = in_two_processes(tmp_path, wrapping, checkpointing)
    assert first.keys() == second.keys() == alone.keys()
    split = [name for name in alone if name == "output" or name.startswith("keep")]
    assert len(split) == 3
    for name, expected in alone.items():
        if name in split:
            torch.testing.assert_close(torch.cat([first[name], second[name]]), expected, rtol=0, atol=1e-12)
            continue
        assert torch.equal(first[name], second[name]), "both hold the same mean"
        difference = (first[name] - expected).norm() / expected.norm()
        assert difference < (1e-6 if ".norm2." in name else 1e-12), name  # Wan's layer norms are float32
