"""Optimizers over weights that are spread over two processes step as they do over whole ones, and resume."""

from __future__ import annotations

import multiprocessing
import os
import socket
from types import SimpleNamespace

import torch
from torch import nn

from tuner.testing.killing import PRELOAD

NAMES = ("adamw_schedulefree", "ao-adamw8bit", "muon", "optimi-ranger")
"""One of each kind of state."""
SHAPES = {"matrix": (40, 130), "few rows": (7, 3), "bias": (33,), "one row": (1, 2, 24)}


def network(choices, name, mesh):
    """Parameters, on a mesh or whole, as an adapter that trains the network itself; and their optimizer."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from tuner.builtin.adapter_state import copy_into
    from tuner.config.keys import CoreConfig
    from tuner.model import Adapter, ParameterGroup
    from tuner.run import Run
    from tuner.train import optimizers

    run = Run(CoreConfig(optimizer=name, learning_rate=1e-3), {}, optimizers=choices)
    generator = torch.Generator().manual_seed(0)
    values = {each: torch.randn(shape, generator=generator) for each, shape in SHAPES.items()}
    held = {
        each: nn.Parameter(value if mesh is None else distribute_tensor(value, mesh, [Shard(0)]))
        for each, value in values.items()
    }
    adapter = Adapter(
        "full",
        (ParameterGroup("all", held),),
        state=lambda: {each: parameter.detach() for each, parameter in held.items()},
        load=lambda state: copy_into(held, state, what="weights"),
    )
    made = optimizers.make(run, adapter.groups, torch.device("cpu"))
    return SimpleNamespace(name="network", adapter=adapter, held=held, optimizer=made)


def steps(net, numbers):
    from tuner.sharded import cut_like

    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in net.held.values():
            parameter.grad = cut_like(torch.randn(parameter.shape, generator=generator), parameter)
        torch.manual_seed(number)
        net.optimizer.step()
        net.optimizer.zero_grad()


def values(net):
    from tuner.sharded import whole_of

    return [whole_of(each.detach()) for each in net.held.values()]


def check(choices, name, mesh, folder, *, in_parts):
    """Three steps as of whole weights; saved, taken back by others, and one more."""
    from tuner import processes, sharded
    from tuner.train import state

    plain, spread, other = network(choices, name, None), network(choices, name, mesh), network(choices, name, mesh)
    steps(plain, range(3))
    steps(spread, range(3))
    for one, each in zip(values(plain), values(spread), strict=True):
        torch.testing.assert_close(each, one, rtol=0, atol=5e-5)  # Muon rounds to bfloat16 in between
    parts = {} if in_parts else None
    contents = state.of_network(spread, spread.optimizer, parts)
    if processes.launched()[0] == 0:
        folder.mkdir()
        state.write_all(folder, contents)
    processes.gather(None)
    sharded.write(folder, parts or {})
    state.load_network(other, other.optimizer, folder)
    steps(spread, [3])
    steps(other, [3])
    for one, each in zip(values(spread), values(other), strict=True):
        assert torch.equal(each, one)


def process(rank, port, folder, failed):
    from torch.distributed.device_mesh import init_device_mesh

    from tuner import processes
    from tuner.builtin.optimizers import OptimizersPlugin

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    choices = OptimizersPlugin("optimizers", OptimizersPlugin.Config()).optimizers(run=None)
    torch.compiler.set_stance("force_eager")  # torchao compiles for every shape, which takes a minute here
    with processes.joined():
        mesh = init_device_mesh("cpu", (2,))
        for number, name in enumerate(NAMES):
            try:
                assert choices[name].steps_shards
                check(choices, name, mesh, folder / name, in_parts=number % 3 > 0)
            except Exception as error:
                failed.put(f"{name}: {error}")
                raise


def test_optimizers_step_parts_of_weights_as_whole_ones_and_resume(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    failed = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=process, args=(rank, port, tmp_path, failed)) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    assert failed.empty(), failed.get()
    assert [each.exitcode for each in ranks] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)
