"""The processes of one launch (``torchrun``, ``accelerate launch``): who they are, and how they fail together.

A process that fails leaves the others waiting for it, and one error shown by each of eight processes helps
nobody. So errors are exchanged: the one at fault raises its own, the others end without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def refuse_several() -> None:
    """Raise ConfigError where more than one process was launched."""
    _, count = launched()
    if count > 1:
        raise ConfigError(
            f"{count} processes were launched, and several devices are not supported yet",
            remedy="start one process; only `tuner cache` may be spread over several",
        )


@contextmanager
def joined() -> Iterator[None]:
    """Connected with the other processes of the launch, where there are any, until the outermost block ends."""
    if launched()[1] == 1 or _are_several():
        yield
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes enter, and that fails on all of them when it fails on one.

    The process at fault raises its own error (of several, the first process), the others FailedElsewhere. The
    block must not exchange anything itself.
    """
    if not _are_several():
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
    if _are_several() and _store().check([FAILED]):
        raise FailedElsewhere("another process of this run failed")


def gather(value: T) -> list[T]:
    """What each process has for ``value``, in their order. Every process must call it."""
    if not _are_several():
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def _index() -> int:
    """This process's number in the group."""
    from torch import distributed

    return distributed.get_rank()


def _are_several() -> bool:
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _store() -> Any:
    """What the processes found each other by: small values, set and looked up without waiting for anyone."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
