"""Whatever happens on a device whose copies land late, every block computes with its own weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.blocks import TokenRoute

BLOCKS = 6


class Broken(Exception):
    """Something went wrong inside a block."""


def weights(trained, index):
    return {
        name.removeprefix(f"blocks.{index}."): tensor
        for name, tensor in trained.originals.items()
        if name.startswith(f"blocks.{index}.")
    }


def watch(trained):
    """Before and after each computation of a block, its weights must be those of the file."""
    for index, block in enumerate(trained.network.stack.blocks):
        own = weights(trained, index)

        def check(*_, block=block, own=own):
            for name, parameter in block.named_parameters():
                if not parameter.requires_grad:
                    assert torch.equal(parameter, own[name.replace(".base_layer", "")]), name

        block.register_forward_pre_hook(check)
        block.register_forward_hook(check)


def routed(request):
    """A route over some blocks that keeps every other token."""
    batch, size, _ = request.tokens.shape
    return [TokenRoute(1, 4, torch.arange(0, size, 2).expand(batch, -1))]


def act(trained, action, seed):
    """Do what a run may do; gives all numbers that came of it."""
    kind, block = action
    if kind == "render":
        return [trained.render(seed)]
    if kind == "render in inference mode":
        with torch.inference_mode():
            return [trained.render(seed).clone()]
    if kind == "forward breaks off":
        hook = trained.network.stack.blocks[block].register_forward_pre_hook(broken)
        with pytest.raises(Broken):
            trained.loss(seed)
        hook.remove()
        return []
    if kind == "render between forward and backward":
        loss = trained.loss(seed)
        return [trained.render(seed + 1), *learn(trained, loss)]
    if kind == "two forwards":
        return learn(trained, trained.loss(seed) + 2 * trained.loss(seed + 1))
    if kind == "backward breaks off":
        loss, hook = trained.loss(seed), trained.network.stack.blocks[block].register_forward_pre_hook(broken)
        with pytest.raises(Broken):
            loss.backward()
        hook.remove()
        trained.network.module.zero_grad()
        return []
    if kind == "no backward":
        return [trained.loss(seed).detach()]
    trained.context = {"router": routed} if kind == "routed" else {}
    found = learn(trained, trained.loss(seed))
    trained.context = {}
    return found


def broken(*_):
    raise Broken


def learn(trained, loss):
    loss.backward()
    return [loss.detach(), *trained.gradients().values()]


KINDS = (
    "train",
    "routed",
    "two forwards",
    "render",
    "render in inference mode",
    "render between forward and backward",
    "forward breaks off",
    "backward breaks off",
    "no backward",
)
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, BLOCKS - 1)), min_size=1, max_size=4)


@pytest.fixture
def pair(toy, new_simulator):
    """A network without offload, and streamed ones on simulators, made once for each way to stream."""
    plain = toy(offload=False, blocks=BLOCKS)

    @cache
    def streamed(blocks_per_group, resident):
        simulator = new_simulator()
        network = toy(
            offload=True,
            blocks=BLOCKS,
            blocks_per_group=blocks_per_group,
            resident=resident,
            simulator=simulator,
        )
        watch(network)
        return network, simulator

    return plain, streamed


def test_no_block_ever_computes_with_anothers_weights(pair):
    plain, streamed = pair
    late = 0

    @settings(max_examples=16)
    @given(st.sampled_from([(1, 0), (1, 1), (1, 3), (2, 0), (2, 1)]), ACTIONS, st.integers(0, 2**32))
    def run(way, actions, seed):
        nonlocal late
        network, simulator = streamed(*way)
        simulator.chance.seed(seed)
        for step, action in enumerate(actions):
            found, expected = act(network, action, 10 * step), act(plain, action, 10 * step)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs), action
        late += simulator.late

    run()
    assert late > 0, "no copy was ever late"


def test_the_simulator_sees_a_block_that_does_not_wait(toy, new_simulator):
    simulator = new_simulator()
    network = toy(offload=True, simulator=simulator)
    simulator.wait = lambda ticket: None
    simulator.pass_time = lambda: None
    assert network.render(0).isnan().any()


def test_the_simulator_sees_a_block_overwritten_in_use(toy, new_simulator):
    simulator = new_simulator()
    network = toy(offload=True, simulator=simulator)
    load = network.residency.ring.load
    network.residency.ring.load = lambda group, keep: load(group, keep=())
    with pytest.raises(AssertionError, match="in use is overwritten"):
        network.loss(0).backward()


def test_the_simulator_sees_weights_changed_under_a_copy(toy, new_simulator):
    simulator = new_simulator()
    network = toy(offload=True, full=True, simulator=simulator)
    network.loss(0).backward()
    network.residency.begin(True)  # copies are on their way now
    with torch.no_grad():
        network.residency.masters[0].values[0].add_(1)
    with pytest.raises(AssertionError, match="changed while it was copied"):
        simulator.finish()
