"""Layer by layer: the same numbers as a resident base, with two layers on the device instead of two blocks."""

from __future__ import annotations

import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from torch import nn

from tuner.blocks import TokenRoute
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.model import Stage, Transform
from tuner.run import Run
from tuner.spec import Linear, NetworkSpec
from tuner_offload import OffloadConfig, OffloadPlugin
from tuner_offload.leaf import leaves
from tuner_offload.schedule import leaf_ring_blocks


def train(trained, steps=3, **keys):
    """Losses and LoRA gradients of some steps."""
    seen = []
    for step in range(steps):
        loss = trained.loss(step, **keys)
        loss.backward()
        seen.append({"loss": loss.detach(), **trained.gradients()})
    return seen


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, [4]], ids=["lora on all blocks", "lora on one"])
@pytest.mark.parametrize("resident", [0, 2])
def test_gradients_are_equal_bit_for_bit(toy, dtype, layers, resident):
    """Also with bf16 autocast over float32 norms, and where layers before the first trained one need no gradient."""
    streamed = toy(offload=True, by_leaf=True, resident=resident, dtype=dtype, layers=layers)
    assert_equal(train(streamed), train(toy(offload=False, dtype=dtype, layers=layers)))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_needs_no_checkpointing(toy, checkpointing):
    streamed, resident = toy(offload=True, by_leaf=True), toy(offload=False)
    found, expected = (train(each, checkpointing=checkpointing) for each in (streamed, resident))
    assert_equal(found, expected)


def test_float32_weights_under_autocast(toy):
    streamed, resident = toy(offload=True, by_leaf=True), toy(offload=False)
    streamed.autocast = resident.autocast = True
    assert_equal(train(streamed), train(resident))


def test_two_forwards_before_one_backward_and_rendering_in_between(toy):
    def gradients(trained):
        first = trained.loss(0)
        with torch.inference_mode():
            trained.render(5)
        (first + trained.loss(1)).backward()
        return [trained.gradients()]

    assert_equal(gradients(toy(offload=True, by_leaf=True)), gradients(toy(offload=False)))
    streamed, resident = toy(offload=True, by_leaf=True), toy(offload=False)
    assert torch.equal(streamed.render(3), resident.render(3))


def test_with_token_routes(toy):
    def routed(trained):
        trained.context["router"] = lambda request: [
            TokenRoute(1, 4, torch.arange(0, request.tokens.shape[1], 2).expand(request.tokens.shape[0], -1))
        ]
        return train(trained)

    assert_equal(routed(toy(offload=True, by_leaf=True)), routed(toy(offload=False)))


@pytest.mark.parametrize("seed", range(3))
def test_late_copies_never_reach_a_computation(toy, new_simulator, seed):
    """Copies that land late, into memory full of NaN: every layer waits for its own."""
    simulator = new_simulator(seed)
    streamed = toy(offload=True, by_leaf=True, simulator=simulator)
    entries = [entry for master in streamed.residency.masters for entry in master.entries]
    simulator.bound = lambda: [entry.bound for entry in entries]
    assert_equal(train(streamed), train(toy(offload=False)))
    assert simulator.late > 0


def test_an_exception_in_the_middle_harms_nothing(toy):
    streamed = toy(offload=True, by_leaf=True)
    hook = streamed.network.stack.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed.loss(0)
    hook.remove()
    assert_equal(train(streamed), train(toy(offload=False)))


def linears(trained):
    return [
        each
        for block in trained.network.stack.blocks
        for each in block.modules()
        if isinstance(each, nn.Linear) and not each.weight.requires_grad
    ]


def test_two_of_the_largest_layers_are_all_that_is_on_the_device(toy):
    """What streams computes in the ring, in forward and backward, and lies on the host at all other times."""
    streamed = toy(offload=True, by_leaf=True)
    ring = streamed.residency.ring
    buffers = {each.untyped_storage().data_ptr() for each in ring.buffers}
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    layers = linears(streamed)
    assert len(layers) == len(streamed.residency.masters) > 30
    largest = max(layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes) for layer in layers)
    assert 2 * largest <= ring.nbytes < 2 * largest + 4 * 256
    seen = []
    plain = nn.Linear.forward

    def watched(layer, rows):
        seen.append(layer)
        place = layer.weight.untyped_storage().data_ptr()
        assert (place in buffers) == (not layer.weight.requires_grad and layer in layers)
        return plain(layer, rows)

    nn.Linear.forward = watched
    try:
        train(streamed, steps=1)
    finally:
        nn.Linear.forward = plain
    assert set(layers) <= set(seen)
    assert {each.weight.untyped_storage().data_ptr() for each in layers} <= masters


def test_traffic_is_three_copies_a_layer_at_most(toy):
    """Forward, recomputation, backward; what a turn finds in the ring is not copied again."""
    streamed = toy(offload=True, by_leaf=True)
    ring, size = streamed.residency.ring, sum(master.nbytes for master in streamed.residency.masters)
    train(streamed, steps=1)
    before = ring.bytes_copied
    train(streamed, steps=1)
    assert 2.5 * size < ring.bytes_copied - before <= 3 * size
    before = ring.bytes_copied
    streamed.render(0)
    assert ring.bytes_copied - before <= size + ring.nbytes


def test_quantised_layers_stream(toy):
    """Their backward is their own: their inputs are kept, and they compute once more."""

    def quantised(network):
        for block in network.stack.blocks:
            quantize(block, weights=qint8)
            freeze(block)

    edit = Transform(Stage.QUANTIZE, "quantised", frozenset(), quantised)
    streamed = toy(offload=True, by_leaf=True, while_reading=False, extra=(edit,))
    resident = toy(offload=False, extra=(edit,))
    assert {type(each).__name__ for each in linears(streamed)} == {"QLinear"}
    assert_equal(train(streamed), train(resident))


def test_a_network_without_linear_layers_is_refused(toy):
    network = toy(offload=False).network
    for block in network.stack.blocks:
        block.requires_grad_(True)
    with pytest.raises(ConfigError, match="no Linear layers that could stream"):
        leaves(network, range(6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_stream_on_cuda(toy, use_stream, checkpointing):
    keys = {"blocks": 12, "device": "cuda"}
    streamed = toy(offload=True, by_leaf=True, use_stream=use_stream, **keys)
    assert all(each.weight.is_cpu and each.weight.is_pinned() for each in linears(streamed))
    found = train(streamed, checkpointing=checkpointing)
    for ours, theirs in zip(found, train(toy(offload=False, **keys), checkpointing=checkpointing), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])


# The keys


def plugin(**keys) -> OffloadPlugin:
    return OffloadPlugin("offload", OffloadConfig(enable_group_offload=True, group_offload_type="leaf_level", **keys))


def test_keys_that_go_with_it_and_those_that_do_not(caplog):
    plugin().configure(Run(CoreConfig(gradient_checkpointing=False), {}))
    plugin().configure(Run(CoreConfig(gradient_checkpointing_interval=2), {}))
    with pytest.raises(ConfigError, match=r"frozen base, and `model_type: full`(.|\n)*leaf_level"):
        plugin().configure(Run(CoreConfig(model_type="full"), {}))


def test_the_planner_is_told_of_the_ring():
    network = NetworkSpec("transformer", 40, 5120, 40, 13824, 4096, 512, 16)
    sizes = [each.inputs * each.outputs for each in network.matrices]
    assert leaf_ring_blocks(sizes) == 1
    assert leaf_ring_blocks([1, 1]) == 1
    assert leaf_ring_blocks([10, 1]) == 2
    assert isinstance(network.matrices[0], Linear)
