"""Out of memory: said once, in the user's terms, with every step that was done saved."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tuner.blocks import StepContext
from tuner.errors import TrainingError

if TYPE_CHECKING:
    from tuner.model import Network
    from tuner.train.session import Session

GIB = 2**30
LEVERS = 3
"""How many ways to save memory the error lists."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device, or the host, has no memory left."""
    # The CPU's allocator raises a plain RuntimeError.
    host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return host or isinstance(error, torch.OutOfMemoryError | MemoryError)


def release(session: Session, error: BaseException) -> None:
    """Let go of all that the interrupted step held: its frames, gradients, streamed blocks, and the cached memory."""
    traceback.clear_frames(error.__traceback__)
    for network in session.model.networks.values():
        network.trampoline.context = StepContext()
        if network.residency is not None:
            network.residency.end(False)
    for optimizer in session.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if session.engine.device.type == "cuda":
        torch.cuda.empty_cache()


def explained(session: Session, error: BaseException, held: Iterable[tuple[str, int]], kept: str) -> TrainingError:
    """What to tell the user: what was ``held`` then, what of the run is ``kept``, and what would save memory."""
    run = session.run
    shares = ", ".join(f"{name} {size / GIB:.2f}" for name, size in held)
    advice = [line for answer in session.manager.hook.memory_advice(run=run, model=session.model) for line in answer]
    return TrainingError(
        f"out of memory in step {run.step + 1}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        where=f"{session.engine.device}; held, in GiB: {shares}",
        allowed="; or ".join(advice[:LEVERS]) or None,
        remedy=f"change the config as above and go on with resume_from_checkpoint: latest ({kept})",
    )


def held(session: Session) -> list[tuple[str, int]]:
    """(what, bytes) on the device: weights, gradients, optimizer state, and what is left: activations and workspace."""
    device = session.engine.device
    found: list[tuple[str, int]] = []
    for network in session.model.networks.values():
        trained = [
            each for optimizer in _of(session, network) for group in optimizer.param_groups for each in group["params"]
        ]
        own = {id(each) for each in trained}
        frozen = [each for each in network.module.parameters() if id(each) not in own]
        state = [
            each
            for optimizer in _of(session, network)
            for values in optimizer.state.values()
            for each in values.values()
        ]
        found += [
            (f"frozen weights of {network.name}", _bytes(frozen, device)),
            ("trained weights", _bytes(trained, device)),
            ("gradients", _bytes((each.grad for each in trained), device)),
            ("optimizer state", _bytes(state, device)),
        ]
    peak = session.engine.peak_memory()
    if peak is not None:
        found.append(("activations and workspace at the peak", max(0, peak - sum(size for _, size in found))))
    return [(name, size) for name, size in found if size]


def _of(session: Session, network: Network) -> Iterator[torch.optim.Optimizer]:
    if network.name in session.optimizers:
        yield session.optimizers[network.name]


def _bytes(tensors: Iterable[object], device: torch.device) -> int:
    return sum(each.nbytes for each in tensors if isinstance(each, Tensor) and each.device.type == device.type)
