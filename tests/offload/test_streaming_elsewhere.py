"""Streamed blocks in compiled code and in several processes."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file, save_file

WORLD = 2
CONTEXT = multiprocessing.get_context("fork")


def learn(trained, parameters, *seeds):
    """The mean loss of micro-batches and its gradients."""
    losses = [trained.loss(seed) for seed in seeds]
    loss = sum(losses) / len(losses)
    loss.backward()
    found = {name: each.grad.clone() for name, each in parameters.items()}
    trained.network.module.zero_grad()
    return {"loss": loss.detach(), **found}


def parameters(trained):
    return {name: each for group in trained.network.adapter.groups for name, each in group.parameters.items()}


@pytest.mark.parametrize("full", [False, True])
def test_compiled_blocks_compute_with_what_is_bound(toy, new_simulator, full):
    """Weights are inputs of the compiled code: another buffer of the ring compiles nothing anew."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    networks = (
        toy(offload=True, full=full, simulator=new_simulator(), blocks=4),
        toy(offload=False, full=full, blocks=4),
    )
    for each in networks:
        for block in each.network.stack.blocks:
            block.compile(backend="aot_eager")

    def compare(seed):
        found, expected = ({**learn(each, parameters(each), seed), "render": each.render(seed)} for each in networks)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    compare(0)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    compare(1)
    compare(2)
    assert counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()


def of_one_rank(rank, folder, streamed, full):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    own = parameters(streamed)
    if full:
        found = learn(streamed, own, rank)
    else:
        # What never has a gradient is none of its business: it lives elsewhere.
        module = streamed.network.module
        hidden = [name for name, each in module.named_parameters() if not each.requires_grad]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, hidden)
        replicated = torch.nn.parallel.DistributedDataParallel(module)
        object.__setattr__(streamed.network, "module", replicated)
        found = learn(streamed, own, rank)
    for each in found.values():
        if full or each.ndim == 0:
            torch.distributed.all_reduce(each)
            each /= WORLD
    save_file(found, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("full", [False, True])
def test_two_processes_learn_what_one_learns(toy, tmp_path, full):
    """Each streams its own copy; gradients are exchanged where they are, on the host for a trained base."""
    plain = toy(offload=False, full=full)
    expected = learn(plain, parameters(plain), *range(WORLD))
    streamed = toy(offload=True, full=full)
    ranks = [CONTEXT.Process(target=of_one_rank, args=(rank, tmp_path, streamed, full)) for rank in range(WORLD)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    assert [each.exitcode for each in ranks] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(WORLD))
    for name, theirs in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], theirs, rtol=1e-5, atol=1e-8)
