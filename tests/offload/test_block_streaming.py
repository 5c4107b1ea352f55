"""A streamed base trains exactly as a resident one does, in the ring's memory and with the least traffic."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.errors import TrainingError
from tuner_offload import placement

POISON = 0xFF
"""Every byte so: NaN in float32 and in bfloat16."""


class LateCopier:
    """A copy stream at its worst: the buffer is spoilt when a copy starts and filled only when it is waited for."""

    def start(self, target, source):
        target.fill_(POISON)
        return target, source

    def wait(self, ticket):
        with torch.no_grad():
            ticket[0].copy_(ticket[1])

    def finish(self):
        pass


class Traffic(TorchDispatchMode):
    """Counts what is copied out of the masters, and refuses any copy into one."""

    def __init__(self, masters):
        super().__init__()
        self.masters = {master.buffer.untyped_storage().data_ptr() for master in masters}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            assert target.untyped_storage().data_ptr() not in self.masters, "something was copied back"
            if source.untyped_storage().data_ptr() in self.masters:
                self.bytes += source.nbytes
        return func(*args, **(kwargs or {}))


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(placement, "copier_for", lambda device, use_stream: LateCopier())


def train(trained, steps=3):
    """Gradients of each step, with rendering in between, as plain lists to compare."""
    optimizer = torch.optim.AdamW(trained.lora.values(), lr=1e-2)
    seen = []
    for step in range(steps):
        loss = trained.loss(step)
        loss.backward()
        optimizer.step()
        seen.append({"loss": loss.detach(), **trained.gradients()})
        seen.append({"rendered": trained.render(step)})
        if step == 1:
            seen.append({"rendered twice": trained.render(9)})
    return seen


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.isfinite(theirs[name]).all()
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("while_reading", [True, False])
@pytest.mark.parametrize(("blocks", "blocks_per_group"), [(6, 1), (7, 2), (5, 2)])
def test_training_is_bit_equal_to_a_resident_base(toy, late, blocks, blocks_per_group, while_reading):
    streamed = toy(offload=True, blocks=blocks, blocks_per_group=blocks_per_group, while_reading=while_reading)
    assert_equal(train(streamed), train(toy(offload=False, blocks=blocks)))


def test_training_in_bfloat16_is_bit_equal_too(toy, late):
    streamed, resident = (toy(offload=each, dtype=torch.bfloat16) for each in (True, False))
    assert {parameter.dtype for _, _, parameter in streamed.frozen()} == {torch.bfloat16, torch.float32}
    assert_equal(train(streamed), train(resident))


@pytest.mark.parametrize("layers", [[3, 4], [5], [0, 2]])
def test_lora_on_some_blocks_only(toy, late, layers):
    # Most blocks' end of backward is never announced then.
    streamed = toy(offload=True, layers=layers)
    assert_equal(train(streamed), train(toy(offload=False, layers=layers)))


@pytest.mark.parametrize("blocks_per_group", [1, 2])
def test_two_forwards_before_one_backward(toy, late, blocks_per_group):
    def both(trained):
        first = trained.loss(1)
        trained.render(2)
        (first + 2 * trained.loss(3)).backward()
        return [trained.gradients()]

    streamed = toy(offload=True, blocks_per_group=blocks_per_group)
    assert_equal([*both(streamed), *both(streamed)], both(toy(offload=False)) * 2)


def test_a_forward_that_broke_off_harms_nothing(toy, late):
    streamed = toy(offload=True)
    hook = streamed.network.stack.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        streamed.loss(0)
    hook.remove()
    assert_equal(train(streamed), train(toy(offload=False)))


def test_rendering_in_inference_mode_leaves_training_possible(toy):
    streamed = toy(offload=True)
    with torch.inference_mode():
        streamed.render(0)
    assert_equal(train(streamed), train(toy(offload=False)))


@contextmanager
def watch(trained, check):
    """Call ``check(block)`` at the start and at the end of every block's computation, recomputation included."""
    hooks = [
        register(lambda *_, index=index: check(index))
        for index, block in enumerate(trained.network.stack.blocks)
        for register in (block.register_forward_pre_hook, block.register_forward_hook)
    ]
    yield
    for hook in hooks:
        hook.remove()


def test_every_block_computes_with_its_own_weights_in_the_ring(toy, late):
    streamed = toy(offload=True, blocks_per_group=2, blocks=7)
    ring = {buffer.untyped_storage().data_ptr() for buffer in streamed.residency.ring.buffers}
    computed = []

    def check(index):
        computed.append(index)
        for block, name, parameter in streamed.frozen():
            if block == index:
                assert parameter.untyped_storage().data_ptr() in ring
                assert torch.equal(parameter, streamed.originals[f"blocks.{block}.{name}"]), (block, name)

    with watch(streamed, check):
        train(streamed, steps=2)
    assert set(computed) == set(range(7))


def test_the_ring_is_all_that_is_resident(toy):
    streamed, resident = toy(offload=True, blocks=8), toy(offload=False, blocks=8)
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    seen = {}

    def check(index):
        for _, _, parameter in streamed.frozen():
            storage = parameter.untyped_storage()
            if storage.data_ptr() not in masters:
                seen[storage.data_ptr()] = storage.nbytes()

    with watch(streamed, check):
        train(streamed, steps=2)
    base = sum(parameter.nbytes for _, _, parameter in resident.frozen())
    assert sum(seen.values()) == streamed.residency.ring.nbytes
    assert base * 2 / 8 <= streamed.residency.ring.nbytes < 1.1 * base * 2 / 8
    assert not {each.untyped_storage().data_ptr() for each in streamed.lora.values()} & (masters | seen.keys())


@pytest.mark.parametrize(("blocks", "blocks_per_group"), [(6, 1), (8, 2)])
def test_traffic_of_a_step(toy, blocks, blocks_per_group):
    """Each group is copied once for forward and once for backward, but for the two that a turn finds in the ring."""
    streamed = toy(offload=True, blocks=blocks, blocks_per_group=blocks_per_group)
    masters = streamed.residency.masters
    group, groups = masters[0].nbytes, len(masters)
    counts = []
    for step in range(3):
        with Traffic(masters) as traffic:
            streamed.loss(step).backward()
        counts.append(traffic.bytes)
    assert counts == [(2 * groups - 2) * group, (2 * groups - 4) * group, (2 * groups - 4) * group]
    assert streamed.residency.ring.bytes_copied == sum(counts)


def test_traffic_of_rendering(toy):
    """Every forward finds its first groups in the ring, where the one before it put them."""
    streamed = toy(offload=True)
    masters = streamed.residency.masters
    streamed.render(0)
    with Traffic(masters) as traffic:
        streamed.render(1)
    assert traffic.bytes == len(masters) * masters[0].nbytes


@pytest.mark.parametrize("layers", [None, [4]])
def test_between_steps_the_network_holds_its_weights(toy, late, layers):
    """... in the masters, and the ring holds the groups that the next forward begins with."""
    streamed = toy(offload=True, layers=layers)
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    streamed.loss(0).backward()
    for block, name, parameter in streamed.frozen():
        assert parameter.untyped_storage().data_ptr() in masters
        assert torch.equal(parameter, streamed.originals[f"blocks.{block}.{name}"])
    assert [streamed.residency.ring.holds(group) for group in range(6)] == [True] * 2 + [False] * 4


def test_weights_are_read_straight_into_the_masters(toy):
    streamed = toy(offload=True)
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    assert {each.untyped_storage().data_ptr() for _, _, each in streamed.frozen()} == masters
    for master in streamed.residency.masters:
        assert all(piece.offset % 256 == 0 for entry in master.entries for piece in entry.pieces)
    # On the CPU another alignment than the allocator's would change bits.
    assert all(each.data_ptr() % 64 == 0 for _, _, each in streamed.frozen())


def test_training_without_checkpointing_is_an_error_not_a_wrong_gradient(toy):
    streamed = toy(offload=True)
    with pytest.raises(TrainingError, match="gradient_checkpointing"):
        streamed.loss(0, checkpointing=False)


def test_a_weight_overwritten_before_its_backward_is_an_error(toy):
    """Should a buffer ever be filled too early, autograd sees it: the views count their buffer's writes."""
    streamed = toy(offload=True)
    ring = streamed.residency.ring
    ring.load(0, keep=())
    weight = next(each for each in ring.values(0) if each.ndim == 2)
    x = torch.randn(1, weight.shape[1], requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    ring.load(1, keep=())
    ring.load(2, keep=())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_stream", [False, True])
def test_streaming_on_cuda(toy, use_stream):
    resident = toy(offload=False, blocks=12, device="cuda")
    streamed = toy(offload=True, blocks=12, device="cuda", use_stream=use_stream)
    assert all(each.is_cpu and each.is_pinned() for _, _, each in streamed.frozen())
    assert all(each.is_cuda for each in streamed.lora.values())
    for ours, theirs in zip(train(streamed), train(resident), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])
