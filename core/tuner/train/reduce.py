"""Gradients of replicated parameters, summed over the processes.

Once a step, after its last backward: whatever the micro-batches of a process were, and however many, all processes
exchange the same few messages. Frozen weights are never communicated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tuner import processes

BUCKET = 2**26
"""Elements of one message at most, unless one tensor is larger."""


def sum_over_processes(parameters: Sequence[nn.Parameter], total: Tensor) -> None:
    """Sum the gradients of ``parameters``, and ``total``, over the processes, in place.

    A parameter without a gradient counts as zero: another process's micro-batches may have reached it.
    """
    from torch import distributed

    if not processes.are_several():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets([*gradients, total]):
        flat = torch._utils._flatten_dense_tensors(bucket)
        distributed.all_reduce(flat)
        torch._foreach_copy_(bucket, list(torch._utils._unflatten_dense_tensors(flat, bucket)))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors that go in one message: of one dtype, on one device."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        bucket = alike[tensor.dtype, tensor.device]
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket[:]
            bucket.clear()
        bucket.append(tensor)
    yield from alike.values()
