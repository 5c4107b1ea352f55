"""When the driver tells a residency what: whoever moves weights builds on this order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from tuner.blocks import RouteRequest, StepContext, TokenRoute, run_stack

KEEP = torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]])


class Recorder:
    """A residency that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | bool]] = []

    def begin(self, differentiated: bool) -> None:
        self.events.append(("begin", differentiated))

    def enter(self, index: int) -> None:
        self.events.append(("enter", index))

    def leave(self, index: int) -> None:
        self.events.append(("leave", index))

    def backward_done(self, index: int) -> None:
        self.events.append(("backward_done", index))

    def end(self, differentiated: bool) -> None:
        self.events.append(("end", differentiated))

    def take(self) -> list[tuple[str, int | bool]]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def drive(toy: Any, recorder: Recorder, **context: Any) -> Tensor:
    stack = toy.stack
    return stack.unembed(run_stack(stack, stack.embed(*toy.inputs), StepContext(residency=recorder, **context)))


def visits(*blocks: int) -> list[tuple[str, int | bool]]:
    return [event for index in blocks for event in (("enter", index), ("leave", index))]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_gradients_each_block_leaves_before_the_next_enters(
    toy: Any, recorder: Recorder, checkpointing: bool
) -> None:
    with torch.no_grad():
        drive(toy, recorder, checkpointing=checkpointing)
    assert recorder.events == [("begin", False), *visits(0, 1, 2, 3, 4), ("end", False)]


def test_with_checkpointing_recomputation_enters_again(toy: Any, recorder: Recorder) -> None:
    output = drive(toy, recorder, checkpointing=True)
    assert recorder.take() == [("begin", True), *visits(0, 1, 2, 3, 4)]
    output.sum().backward()
    backward = [event for index in (4, 3, 2, 1, 0) for event in (("enter", index), ("backward_done", index))]
    assert recorder.take() == [*backward, ("end", True)]


def test_recomputation_never_leaves(toy: Any, recorder: Recorder) -> None:
    """Also where the recomputation runs to the block's end, as with torch's early stop switched off."""
    with set_checkpoint_early_stop(False):
        output = drive(toy, recorder, checkpointing=True)
        recorder.take()
        output.sum().backward()
    assert "leave" not in {name for name, _ in recorder.events}


def test_without_checkpointing_blocks_stay_until_their_backward_is_done(toy: Any, recorder: Recorder) -> None:
    output = drive(toy, recorder)
    assert recorder.take() == [("begin", True), *(("enter", index) for index in range(5))]
    output.sum().backward()
    assert recorder.take() == [*(("backward_done", index) for index in (4, 3, 2, 1, 0)), ("end", True)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_whose_input_needs_no_gradient_are_released_by_the_end(
    toy: Any, recorder: Recorder, checkpointing: bool
) -> None:
    """As with LoRA on blocks 0 and 2: nothing says that block 0 is done but the end of backward."""
    toy.freeze_all_but(0, 2)
    drive(toy, recorder, checkpointing=checkpointing).sum().backward()
    done = [index for name, index in recorder.events if name == "backward_done"]
    assert done == [4, 3, 2, 1]
    assert recorder.events[-1] == ("end", True)
    recomputed = [
        index for name, index in recorder.events[recorder.events.index(("enter", 4)) + 1 :] if name == "enter"
    ]
    assert recomputed == ([4, 3, 2, 1, 0] if checkpointing else [])


def test_blocks_before_the_first_trained_one_are_not_recomputed(toy: Any, recorder: Recorder) -> None:
    toy.freeze_all_but(3)
    output = drive(toy, recorder, checkpointing=True)
    assert recorder.take() == [("begin", True), *visits(0, 1, 2, 3, 4)]
    output.sum().backward()
    assert recorder.take() == [("enter", 4), ("backward_done", 4), ("enter", 3), ("end", True)]


def test_a_forward_with_nothing_to_train_ends_at_once(toy: Any, recorder: Recorder) -> None:
    toy.net.requires_grad_(False)
    drive(toy, recorder, checkpointing=True)
    assert recorder.events == [("begin", True), *visits(0, 1, 2, 3, 4), ("end", False)]


def test_two_forwards_before_one_backward(toy: Any, recorder: Recorder) -> None:
    total = drive(toy, recorder, checkpointing=True).sum() + drive(toy, recorder, checkpointing=True).sum()
    assert recorder.take() == 2 * [("begin", True), *visits(0, 1, 2, 3, 4)]
    total.backward()
    events = recorder.take()
    assert events[-2:] == [("end", True)] * 2
    assert sorted(events[:-2]) == sorted(2 * [(name, i) for i in range(5) for name in ("enter", "backward_done")])


def test_skipped_blocks_are_never_brought_in(toy: Any, recorder: Recorder) -> None:
    drive(toy, recorder, checkpointing=True, skip=frozenset({1, 4})).sum().backward()
    assert {index for name, index in recorder.events if name in ("enter", "leave", "backward_done")} == {0, 2, 3}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_there_until_backward_done(toy: Any, checkpointing: bool) -> None:
    """Weights overwritten with NaN at *backward done* change no gradient: nothing of the block is computed after it."""
    toy.freeze_all_but(1, 3)
    drive(toy, Recorder(), checkpointing=checkpointing).square().sum().backward()
    expected = toy.gradients()

    class Ruiner(Recorder):
        def backward_done(self, index: int) -> None:
            for parameter in toy.net.blocks[index].parameters():
                parameter.data.fill_(torch.nan)

    drive(toy, Ruiner(), checkpointing=checkpointing).square().sum().backward()
    for name, gradient in toy.gradients().items():
        assert gradient is expected[name] or torch.equal(gradient, expected[name]), name


def test_a_residency_changes_no_bit_of_a_routed_step(toy: Any, recorder: Recorder) -> None:
    def router(request: RouteRequest) -> Sequence[TokenRoute]:
        return [TokenRoute(0, 2, KEEP), TokenRoute(2, 5, KEEP.flip(0))]

    found = []
    for residency in (None, recorder):
        output = drive(toy, residency, checkpointing=True, router=router)  # type: ignore[arg-type]
        output.square().sum().backward()
        found.append((output, toy.gradients()))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())
    assert [index for name, index in recorder.events if name == "backward_done"] == [4, 3, 2, 1, 0]
