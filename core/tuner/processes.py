"""The processes of one launch (``torchrun``, ``accelerate launch``): who they are, and how they fail together.

A process that fails leaves the others waiting for it, and one error shown by each of eight processes helps
nobody. So errors are exchanged: the one at fault raises its own, the others end without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from tuner.errors import ConfigError, FailedElsewhere

PATIENCE = timedelta(days=30)
"""Processes wait this long for each other: shares of a large cache may differ by hours."""
FAILED = "tuner/failed"

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """This process's number and the number of processes, as the launcher says; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(what: str) -> None:
    """Raise ConfigError where more than one process was launched for ``what``."""
    _, count = launched()
    if count > 1:
        raise ConfigError(f"{count} processes were launched, and {what} is for one", remedy="start one process")


@contextmanager
def joined() -> Iterator[None]:
    """Connected with the other processes of the launch, where there are any, until the outermost block ends."""
    if launched()[1] == 1 or are_several():
        yield
        return
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield
    except BaseException as error:
        # Whoever waits for a process that has ended hears of a lost connection: that one says why.
        if isinstance(error, RuntimeError) and _one_failed():
            raise FailedElsewhere("another process of this run failed") from error
        with suppress(RuntimeError):
            _store().set(FAILED, b"1")
        raise
    finally:
        distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes enter, and that fails on all of them when it fails on one.

    The process at fault raises its own error (of several, the first process), the others FailedElsewhere. The
    block must not exchange anything itself.
    """
    if not are_several():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
        _store().set(FAILED, b"1")
    at_fault = gather(failure is not None and not isinstance(failure, FailedElsewhere))
    if failure is not None and True in at_fault and at_fault.index(True) == _index():
        raise failure
    if failure is not None or True in at_fault:
        raise FailedElsewhere("another process of this run failed") from failure


def stop_if_one_failed() -> None:
    """Raise FailedElsewhere when another process has failed inside the same :func:`together`. Costs next to nothing."""
    if are_several() and _one_failed():
        raise FailedElsewhere("another process of this run failed")


def gather(value: T) -> list[T]:
    """What each process has for ``value``, in their order. Every process must call it."""
    if not are_several():
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Which of ``flags`` are true in at least one process. Every process must call it; it touches no device."""
    if not are_several():
        return flags
    import torch
    from torch import distributed

    tensor = torch.tensor(flags, dtype=torch.uint8)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tuple(map(bool, tensor.tolist()))


def _index() -> int:
    """This process's number in the group."""
    from torch import distributed

    return distributed.get_rank()


def are_several() -> bool:
    """Whether this process is connected with others."""
    if "torch" not in sys.modules:
        return False  # and it stays so: a command that only looks has no need of it
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _one_failed() -> bool:
    """Whether a process has said that it failed, or the one that keeps what they say has ended."""
    try:
        return bool(_store().check([FAILED]))
    except RuntimeError:
        return True


def _store() -> Any:
    """What the processes found each other by: small values, set and looked up without waiting for anyone."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
