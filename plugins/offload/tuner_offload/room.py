"""Whether the host has room for what is offloaded to it: asked before any weight is read, without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

GIB = 2**30
SMALL_BYTES = 4.0
"""Per parameter outside the matrices of a block: norms and modulation stay in float32."""


def check_room(run: Run, spec: ModelSpec, data: Prepared, resident: int) -> None:
    """Raise ConfigError where the weights that wait on the host are more than the memory it can give.

    ``resident``: blocks of each network that never leave the device.
    """
    free = available()
    if free is None or run.estimate is None or not data.samples:
        return
    bucket = data.samples[0].bucket
    needed = sum(hosted_bytes(run.estimate(network, bucket, 1), network.blocks - resident) for network in spec.networks)
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each process streams its own copy
    if needed > free:
        raise ConfigError(
            f"the offloaded weights need {needed / GIB:.1f} GiB of host memory, and {free / GIB:.1f} GiB are available",
            where="enable_group_offload: true",
            remedy="offload to disk (group_offload_to_disk_path), quantise the base (base_model_precision), "
            "or keep more blocks on the device (group_offload_resident_blocks)",
        )


def hosted_bytes(workload: Workload, blocks: int) -> int:
    """Host memory of so many streamed blocks: their weights and, where they are trained, gradients and optimizer."""
    network = workload.network
    matrices = sum(linear.inputs * linear.outputs for linear in network.matrices)
    block = matrices * workload.weight_bytes + network.small * SMALL_BYTES
    if workload.trained == "network":
        block = 2 * block + (matrices + network.small) * workload.optimizer_bytes
    return round(block * blocks)


def available(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be taken without swapping, within the container's limit; None where the system does not say."""
    found = [each for each in (_of_machine(meminfo), _of_container(cgroup)) if each is not None]
    return min(found, default=None)


def _of_machine(meminfo: Path) -> int | None:
    kibibytes = _numbers(meminfo).get("MemAvailable:")
    return None if kibibytes is None else kibibytes * 1024


def _of_container(cgroup: Path) -> int | None:
    """What is left of a control group's limit; files that the kernel keeps in memory give way."""
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    if not limit.isdecimal():
        return None
    kept = _numbers(cgroup / "memory.stat")
    return int(limit) - int(used) + kept.get("inactive_file", 0) + kept.get("active_file", 0)


def _numbers(path: Path) -> Mapping[str, int]:
    """First word of each line -> its second, of a file such as /proc/meminfo; empty where there is none."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
