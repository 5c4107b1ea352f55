"""The network itself is trained while its blocks stream: weights and optimizer on the host, bit-equal to training it
where it computes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.builtin.checkpointing.offload import Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.model import Stage, Transform


def parameters(trained):
    return {name: each for group in trained.network.adapter.groups for name, each in group.parameters.items()}


def train(trained, optimizer, steps, *, micro_batches=2, first=0):
    """Losses, gradient norms, renders and at last the weights of steps with accumulation, as the loop makes them."""
    seen = []
    for step in range(first, first + steps):
        for part in range(micro_batches):
            loss = trained.loss(100 * step + part)
            (loss / micro_batches).backward()
            seen.append(loss.detach())
        gradients = [each.grad for each in parameters(trained).values()]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(parameters(trained).values(), 0.1, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += [norm, trained.render(step)]
    return [*seen, *(each.detach().clone() for each in parameters(trained).values())]


def adamw(trained):
    return torch.optim.AdamW(parameters(trained).values(), lr=1e-2)


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(torch.isfinite(each).all() for each in expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("seed", "way"),
    [(0, {}), (1, {"resident": 2}), (2, {"blocks_per_group": 2}), (3, {"dtype": torch.bfloat16})],
)
def test_training_the_network_is_bit_equal(toy, new_simulator, seed, way):
    streamed = toy(offload=True, full=True, simulator=new_simulator(seed), **way)
    plain = toy(offload=False, full=True, **({"dtype": way["dtype"]} if "dtype" in way else {}))
    assert parameters(streamed).keys() == parameters(plain).keys()
    before = {name: each.detach().clone() for name, each in parameters(streamed).items()}
    assert_same(train(streamed, adamw(streamed), 3), train(plain, adamw(plain), 3))
    assert all(not torch.equal(each, before[name]) for name, each in parameters(streamed).items())


@pytest.mark.parametrize("checkpointing", ["selective", "offload"])
def test_with_the_other_kinds_of_checkpointing(toy, new_simulator, checkpointing):
    kinds = {"selective": Selective, "offload": lambda: Offload(torch.device("cpu"))}
    streamed, plain = toy(offload=True, full=True, simulator=new_simulator()), toy(offload=False, full=True)
    streamed.checkpointing = kinds[checkpointing]()
    assert_same(train(streamed, adamw(streamed), 2), train(plain, adamw(plain), 2))


def test_float32_weights_under_autocast(toy, new_simulator):
    """Mixed precision with careful weights (base_model_default_dtype: fp32)."""
    streamed, plain = toy(offload=True, full=True, simulator=new_simulator()), toy(offload=False, full=True)
    streamed.autocast = plain.autocast = True
    assert_same(train(streamed, adamw(streamed), 2), train(plain, adamw(plain), 2))


def test_two_forwards_before_one_backward(toy, new_simulator):
    def both(trained):
        (trained.loss(1) + 2 * trained.loss(3)).backward()
        return [each.grad.clone() for each in parameters(trained).values()]

    streamed = toy(offload=True, full=True, simulator=new_simulator())
    assert_same(both(streamed), both(toy(offload=False, full=True)))


def test_an_unfrozen_norm_beside_a_lora_trains_too(toy, new_simulator):
    def unfreeze(network):
        for block in network.stack.blocks[::2]:
            block.norm.weight.requires_grad_(True)

    def steps(trained):
        optimizer, seen = torch.optim.AdamW(trained.lora.values(), lr=1e-2), []
        for step in range(3):
            loss = trained.loss(step)
            loss.backward()
            optimizer.step()
            seen += [loss.detach(), *trained.gradients().values(), trained.render(step)]
        return seen

    free = Transform(Stage.REWRITE, "unfreeze", frozenset(), unfreeze)
    streamed = toy(offload=True, simulator=new_simulator(), extra=(free,))
    assert_same(steps(streamed), steps(toy(offload=False, extra=(free,))))


def test_weights_gradients_and_optimizer_are_on_the_host(toy):
    """The ring's memory is all that the device sees of the blocks, and no gradient stays there."""
    streamed = toy(offload=True, full=True)
    residency = streamed.residency
    masters = {master.buffer.untyped_storage().data_ptr() for master in residency.masters}
    ring = {buffer.untyped_storage().data_ptr() for buffer in residency.ring.buffers}
    streamed.loss(0).backward()
    blocks = {name: each for name, each in parameters(streamed).items() if name.startswith("blocks.")}
    assert len(blocks) == sum(len(master.entries) for master in residency.masters)
    for name, each in blocks.items():
        assert each.untyped_storage().data_ptr() in masters, name
        assert each.grad is not None
        assert each.grad.untyped_storage().data_ptr() not in ring
        assert each is dict(streamed.network.module.named_parameters())[name]
    assert all(value.grad is None for slot in residency.ring._values for group in slot for value in group)


def test_traffic_of_a_step(toy):
    """Every forward copies all groups anew, since the optimizer changed them; the turn is still free."""
    streamed = toy(offload=True, full=True)
    ring, group = streamed.residency.ring, streamed.residency.masters[0].nbytes
    streamed.loss(0).backward()
    assert ring.bytes_copied == (2 * 6 - 2) * group


def test_resuming_is_bit_equal(toy):
    """Weights are copied into the masters, and the optimizer's state stays beside them."""
    whole = toy(offload=True, full=True)
    expected = train(whole, adamw(whole), 4)

    first = toy(offload=True, full=True)
    optimizer = adamw(first)
    train(first, optimizer, 2)
    saved = {name: each.clone() for name, each in first.network.adapter.state().items()}

    resumed = toy(offload=True, full=True)
    other = adamw(resumed)
    resumed.network.adapter.load(saved)
    other.load_state_dict(optimizer.state_dict())
    found = train(resumed, other, 2, first=2)
    assert_same(found, expected[-len(found) :])


def test_hooks_on_a_trained_weight_see_its_whole_gradient(toy, new_simulator):
    """An optimizer that steps as soon as a gradient is there, and frees it, is one of them."""

    def released(trained):
        rates = {name: 0.1 * (1 + index) for index, name in enumerate(parameters(trained))}

        def step(parameter, rate):
            with torch.no_grad():
                parameter.sub_(rate * parameter.grad)
            parameter.grad = None

        for name, each in parameters(trained).items():
            each.register_post_accumulate_grad_hook(lambda parameter, rate=rates[name]: step(parameter, rate))
        for index in range(3):
            trained.loss(index).backward()
        assert all(each.grad is None for each in parameters(trained).values())
        return [each.detach().clone() for each in parameters(trained).values()]

    streamed = toy(offload=True, full=True, simulator=new_simulator())
    assert_same(released(streamed), released(toy(offload=False, full=True)))


class Casts(TorchDispatchMode):
    """Remembers the low-precision copies of matrices that are alive."""

    def __init__(self):
        super().__init__()
        self.made = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype is torch.bfloat16 and args[0].requires_grad:
            self.made.append(weakref.ref(found))
            self.most = max(self.most, sum(each() is not None for each in self.made))
        return found


def test_autocast_keeps_no_copies_of_blocks_that_have_left(toy):
    """It remembers the bfloat16 copies of trained weights until the forward ends: a whole network of them."""

    def alive(trained):
        trained.autocast = True
        gc.collect()
        with Casts() as casts:
            trained.loss(0)
        return casts.most

    assert alive(toy(offload=True, full=True, blocks=8)) < alive(toy(offload=False, full=True, blocks=8)) / 2


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("resident", [0, 3])
def test_on_cuda(toy, use_stream, resident):
    """Gradients come back beside the computation; the optimizer of torch steps over host and device at once."""
    ways = {"full": True, "blocks": 12, "device": "cuda"}
    streamed, plain = toy(offload=True, use_stream=use_stream, resident=resident, **ways), toy(offload=False, **ways)
    hosted = [each for master in streamed.residency.masters for each in master.values]
    assert all(each.is_cpu and each.is_pinned() for each in hosted)
    found, expected = train(streamed, adamw(streamed), 4), train(plain, adamw(plain), 4)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        optimizer = torch.optim.AdamW(parameters(streamed).values(), lr=1e-3, fused=True)
    streamed.loss(0).backward()
    optimizer.step()
