"""What each checkpointing policy keeps, computes again and copies; that none changes a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tuner.blocks import RouteRequest, StepContext, TokenRoute, run_stack
from tuner.builtin.checkpointing.offload import HostPool, Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.checkpointing import Checkpointing
from tuner.testing.live_bytes import LiveBytes

CPU = torch.device("cpu")
BLOCKS, BATCH, TOKENS, DIM, HEADS = 5, 2, 12, 8, 2
INPUT_BYTES = BATCH * TOKENS * DIM * 8
POLICIES: dict[str, Callable[[], Checkpointing]] = {
    "full": Checkpointing,
    "selective": Selective,
    "offload": lambda: Offload(CPU),
    "every second": lambda: Checkpointing(2),
    "every second selective": lambda: Selective(2),
    "every third offloaded": lambda: Offload(CPU, 3),
}
ROUTES = [
    TokenRoute(1, 3, torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]])),
    TokenRoute(3, 5, torch.tensor([[1, 4, 5, 7, 9, 11], [0, 2, 3, 7, 10, 11]])),
]


def forward(toy: Any, policy: Checkpointing | None, **context: Any) -> Tensor:
    stack = toy.stack
    stream = run_stack(stack, stack.embed(*toy.inputs), StepContext(checkpointing=policy, **context))
    return stack.unembed(stream).square().mean()


def routed(request: RouteRequest) -> list[TokenRoute]:
    return ROUTES


def one(toy: Any, policy: Checkpointing | None) -> Tensor:
    return forward(toy, policy)


def with_routes(toy: Any, policy: Checkpointing | None) -> Tensor:
    return forward(toy, policy, router=routed)


def two_forwards(toy: Any, policy: Checkpointing | None) -> Tensor:
    """The second has other tokens, and fewer of them in some blocks."""
    first = forward(toy, policy)
    latents, times, text = toy.inputs
    toy.inputs = (latents.flip(1), times, text)
    second = forward(toy, policy, router=routed)
    toy.inputs = (latents, times, text)
    return first + second


def trained_late(toy: Any, policy: Checkpointing | None) -> Tensor:
    """As LoRA on two blocks: block inputs before the first of them need no gradient."""
    toy.freeze_all_but(1, 3)
    return forward(toy, policy)


def with_dropout(toy: Any, policy: Checkpointing | None) -> Tensor:
    for block in toy.net.blocks:
        block.feed_forward.register_forward_hook(lambda *arguments: F.dropout(arguments[2], 0.3))
    torch.manual_seed(3)
    return forward(toy, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", [one, with_routes, two_forwards, trained_late, with_dropout])
def test_no_bit_changes(
    make_toy: Callable[[], Any], case: Callable[[Any, Checkpointing | None], Tensor], policy: str
) -> None:
    found = []
    for each in (None, POLICIES[policy]()):
        toy = make_toy()
        loss = case(toy, each)
        loss.backward()
        found.append({"loss": loss.detach(), **{k: v for k, v in toy.gradients().items() if v is not None}})
    plain, kept = found
    assert plain.keys() == kept.keys()
    assert not [name for name, tensor in plain.items() if not torch.equal(tensor, kept[name])]
    assert any(tensor.abs().sum() > 0 for tensor in plain.values())


@contextmanager
def device_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Bytes of all storages but the pool's, which stand for host memory."""
    host: list[Any] = []
    cut = HostPool._cut

    def noting(self: HostPool, nbytes: int) -> list[Tensor]:
        pieces = cut(self, nbytes)
        host.extend(each.untyped_storage() for each in pieces)
        return pieces

    def counts(tensor: Tensor) -> bool:
        return tensor.dtype != torch.uint8 and tensor.untyped_storage()._cdata not in {each._cdata for each in host}

    with monkeypatch.context() as patch, LiveBytes(counts) as live:
        patch.setattr(HostPool, "_cut", noting)
        yield live


def held_after_forward(toy: Any, policy: Checkpointing | None, monkeypatch: pytest.MonkeyPatch, forwards: int) -> int:
    with device_bytes(monkeypatch) as live:
        total = [forward(toy, policy) for _ in range(forwards)]
        held = live.live
    del total
    return held


def test_what_is_held_between_forward_and_backward(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full = held_after_forward(toy, Checkpointing(), monkeypatch, 1)
    log_sum_exp = BATCH * HEADS * TOKENS * 8
    assert held_after_forward(toy, Selective(), monkeypatch, 1) == full + BLOCKS * (INPUT_BYTES + log_sum_exp)
    assert held_after_forward(toy, Offload(CPU), monkeypatch, 1) == full - (BLOCKS - 1) * INPUT_BYTES
    twice = held_after_forward(toy, Checkpointing(), monkeypatch, 2)
    assert held_after_forward(toy, Offload(CPU), monkeypatch, 2) == twice - (2 * BLOCKS - 1) * INPUT_BYTES
    assert held_after_forward(toy, Checkpointing(2), monkeypatch, 1) > full
    assert held_after_forward(toy, None, monkeypatch, 1) > held_after_forward(toy, Checkpointing(2), monkeypatch, 1)


class Recorded(Offload):
    """Writes down copies, as the index of the block whose input it is in its forward."""

    def __init__(self, toy: Any) -> None:
        super().__init__(CPU)
        self.events: list[str] = []
        self.places: dict[int, int] = {}
        for index, block in enumerate(toy.net.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.events.append(f"compute {index}"))

    def copy(self, target: Tensor, source: Tensor) -> Any:
        if self.copied_back == 0 and source.data_ptr() not in self.places:
            self.events.append(f"out {len(self.places)}")
            self.places[target.data_ptr()] = len(self.places)
        else:
            self.events.append(f"back {self.places[source.data_ptr()]}")
        return super().copy(target, source)


def test_inputs_come_back_one_block_ahead(toy: Any) -> None:
    policy = Recorded(toy)
    loss = forward(toy, policy)
    assert policy.events == [event for index in range(BLOCKS) for event in (f"out {index}", f"compute {index}")]
    policy.events.clear()
    loss.backward()
    assert policy.events == [
        *("back 3", "compute 4", "back 2", "compute 3", "back 1", "compute 2", "back 0", "compute 1", "compute 0")
    ], "the last input never left, and each of the others is on its way before the block behind it computes"
    assert (policy.copied_out, policy.copied_back) == (BLOCKS, BLOCKS - 1)


def test_host_memory_is_used_again_in_every_step(toy: Any) -> None:
    policy = Offload(CPU)
    seen = []
    for _ in range(3):
        forward(toy, policy, router=routed).backward()
        seen.append({each.data_ptr() for each in policy.pool.free})
    assert len(seen[0]) == BLOCKS
    assert seen[0] == seen[1] == seen[2]
    forward(toy, policy).backward()
    assert len(policy.pool.free) == BLOCKS, "larger inputs replace the buffers that are too small for them"
    assert min(each.nbytes for each in policy.pool.free) >= INPUT_BYTES
    larger = {each.data_ptr() for each in policy.pool.free}
    forward(toy, policy, router=routed).backward()
    assert {each.data_ptr() for each in policy.pool.free} == larger
    (forward(toy, policy) + forward(toy, policy)).backward()
    assert len(policy.pool.free) == 2 * BLOCKS


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupted_step_gives_its_buffers_back(toy: Any, where: str) -> None:
    policy = Offload(CPU)
    forward(toy, policy).backward()
    expected = toy.gradients()
    buffers = {each.data_ptr() for each in policy.pool.free}
    armed = where == "forward"

    def fail(*_: Any) -> None:
        if armed:
            raise RuntimeError("out of memory")

    handle = toy.net.blocks[2].register_forward_pre_hook(fail)
    if where == "forward":
        with pytest.raises(RuntimeError, match="out of memory"):
            forward(toy, policy)
    else:
        loss = forward(toy, policy)
        armed = True
        with pytest.raises(RuntimeError, match="out of memory"):
            loss.backward()
        del loss
    handle.remove()
    toy.net.zero_grad()
    assert {each.data_ptr() for each in policy.pool.free} == buffers
    forward(toy, policy).backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in toy.gradients().items())


def test_inputs_of_blocks_that_are_not_trained_do_not_stay_on_the_host(toy: Any) -> None:
    toy.freeze_all_but(3)
    policy = Offload(CPU)
    loss = forward(toy, policy)
    loss.backward()
    assert len(policy.pool.free) == 2, "one buffer went from block to block until block 3 kept it; block 4 has its own"
    assert policy.copied_back == 1


def test_a_graph_may_be_kept_for_another_backward(toy: Any) -> None:
    forward(toy, None).backward()
    expected = toy.gradients()
    loss = forward(toy, Offload(CPU))
    for retained in (True, False):
        loss.backward(retain_graph=retained)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in toy.gradients().items())


class Late(Offload):
    """Copies that land only when they are waited for: a stand-in for a stream, one queue in order.

    Until it lands, a copy's target holds NaN, and neither end of it on the device may be freed.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.queue: list[tuple[Any, Any]] = []
        self.landed = 0
        self.freed_early = 0

    def copy(self, target: Tensor, source: Tensor) -> int:
        ticket = len(self.queue)

        def freed(_: Any) -> None:
            self.freed_early += ticket >= self.landed

        self.queue.append((ref(target, freed), ref(source, freed)))
        with torch.no_grad():
            if target.is_floating_point():
                target.fill_(torch.nan)
        return ticket

    def wait(self, event: int) -> None:
        while self.landed <= event:
            target, source = (each() for each in self.queue[self.landed])
            self.landed += 1
            if target is not None and source is not None:
                target.copy_(source)


@pytest.mark.parametrize("case", [one, with_routes, two_forwards, trained_late])
def test_nothing_is_read_or_freed_before_its_copy_has_landed(
    make_toy: Callable[[], Any], case: Callable[[Any, Checkpointing | None], Tensor]
) -> None:
    toy = make_toy()
    case(toy, None).backward()
    expected, policy = toy.gradients(), Late()
    for _ in range(2):
        case(toy, policy).backward()
        for name, gradient in toy.gradients().items():
            assert gradient is expected[name] or torch.equal(gradient, expected[name]), name
    assert len(policy.queue) > 2 * BLOCKS
    assert policy.freed_early == 0


def test_an_interval_leaves_the_other_blocks_as_they_are(toy: Any) -> None:
    """A residency is told that a block may leave only where it is recomputed."""
    events: list[tuple[str, int]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda index: events.append((name, index))

    loss = forward(toy, Checkpointing(2), residency=Recorder())
    assert [index for name, index in events if name == "enter"] == [0, 1, 2, 3, 4]
    assert [index for name, index in events if name == "leave"] == [0, 2, 4]
    events.clear()
    loss.backward()
    assert [index for name, index in events if name == "enter"] == [4, 2, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["selective", "offload"])
@pytest.mark.parametrize("compiled", [False, True])
def test_policies_on_a_gpu(toy: Any, policy: str, compiled: bool) -> None:
    """Gradients over several steps, and the inputs that the device no longer holds."""
    device = torch.device("cuda")
    toy.net.to(device, torch.bfloat16)
    toy.inputs = tuple(each.to(device, torch.bfloat16) for each in toy.inputs)
    if compiled:
        for block in toy.net.blocks:
            block.compile()
    ours = Selective() if policy == "selective" else Offload(device)
    for _ in range(3):
        found, held = [], []
        for each in (Checkpointing(), ours):
            before = torch.cuda.memory_allocated()
            loss = forward(toy, each)
            held.append(torch.cuda.memory_allocated() - before)
            loss.backward()
            found.append(toy.gradients())
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, msg=name)
    assert held[1] < held[0] if policy == "offload" else held[1] > held[0]
