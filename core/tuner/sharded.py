"""Tensors that are spread over the processes (torch's DTensor): put together, and cut again. Others pass through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from tuner import processes
from tuner.errors import CheckpointError, FailedElsewhere

FOLDER = "shards"
"""Of a checkpoint: every process's parts of tensors, in safetensors files of its own."""
FILE_BYTES = 2**31
"""One file is put together in memory before it is written: more than this goes to several."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of ``tensor``."""
    return hasattr(tensor, "full_tensor")


def whole_of(tensor: Any) -> Tensor:
    """``tensor`` whole, in every process. Every process must call it."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """``tensor`` whole, on the host of the main process; empty in the others. Every process must call it."""
    if not is_sharded(tensor):
        return tensor
    from torch import distributed

    whole = whole_of(tensor.detach())
    # A copy: where parts are of unequal size it is a view into more memory.
    return whole.to("cpu", copy=True) if distributed.get_rank() == 0 else whole.new_empty(0, device="cpu")


def cut_like(tensor: Tensor, other: Any) -> Tensor:
    """This process's part of ``tensor``, which every process has whole, as ``other`` is spread. Nothing is sent."""
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def for_file(file: str, tensors: Mapping[str, Tensor], parts: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """What ``file`` of a checkpoint gets of ``tensors``, all whole; with ``parts`` given, that gets what is spread.

    Every process must call it.
    """
    own = {name for name, each in tensors.items() if parts is not None and _in_plain_parts(each)}
    if parts is not None:
        parts |= {f"{file}/{name}": tensors[name].detach() for name in own}
    return {name: gathered(each) for name, each in tensors.items() if name not in own}


def _in_plain_parts(tensor: Any) -> bool:
    """Whether the parts are plain tensors; those of an 8-bit optimizer are made of several."""
    return is_sharded(tensor) and type(tensor.to_local()) is Tensor


def write(directory: Path, parts: Mapping[str, Tensor]) -> None:
    """Write each process's parts into ``directory / FOLDER``, durable. Every process must call it.

    By torch.distributed.checkpoint. Raises OSError in the process that could not write, FailedElsewhere in the
    others, and CheckpointError where the main process does not see what another has written.
    """
    if not parts:
        return
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = processes.launched()[0]
    bytes_so_far = accumulate(each.to_local().nbytes for each in parts.values())  # type: ignore[attr-defined]
    files = dict(zip(parts, (1 + so_far // FILE_BYTES for so_far in bytes_so_far), strict=True))
    writer = HuggingFaceStorageWriter(str(directory / FOLDER), files, save_distributed=True)
    try:
        save(dict(parts), storage_writer=writer)
    except CheckpointException as error:
        if rank in error.failures:
            raise error.failures[rank][0] from None
        raise FailedElsewhere("another process could not write its part of the checkpoint") from None
    written = processes.gather([each.name for each in (directory / FOLDER).glob(f"shard-{rank + 1:05d}-*")])
    with processes.together():
        if lost := [name for names in written for name in names if not (directory / FOLDER / name).exists()]:
            raise CheckpointError(
                f"the checkpoint's file {lost[0]!r} was written by another machine, and is not seen here",
                where=directory,
                remedy="give all machines one output_dir on shared storage, or set fsdp_state_dict_type: "
                "FULL_STATE_DICT",
            )


def read(directory: Path, file: str, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """What :func:`write` got for ``file``: each tensor spread as the one that ``like`` names for it, or else whole.

    Written by however many processes, and read by each for itself: nothing is sent.
    """
    if not (directory / FOLDER).is_dir():
        return {}
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = HuggingFaceStorageReader(str(directory / FOLDER)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, entry in saved.items():
        held, _, leaf = name.partition("/")
        if held == file:
            other, facts = like(leaf), vars(entry)
            there = other is not None and is_sharded(other) and other.shape == facts["size"]
            dtype = facts["properties"].dtype
            tensors[leaf] = (
                torch.empty_like(other.detach(), dtype=dtype)  # type: ignore[union-attr]
                if there
                else torch.empty(facts["size"], dtype=dtype)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as was asked for
        wanted = {f"{file}/{leaf}": each for leaf, each in tensors.items()}
        load(wanted, storage_reader=HuggingFaceStorageReader(str(directory / FOLDER)), no_dist=True)
    return tensors
