"""``tuner launch``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tuner.errors import ConfigError

PORT = 29400
PATIENCE = 1800
"""Seconds that processes may take to end after a signal: a step and a checkpoint."""

Processes = Annotated[
    int | None, typer.Option("--processes", help="Processes on this machine; one for each GPU when absent.", min=1)
]
Nodes = Annotated[int | None, typer.Option("--nodes", help="Machines; SLURM_NNODES or 1 when absent.", min=1)]
Address = Annotated[str | None, typer.Option("--address", help="HOST or HOST:PORT of the first machine, with several.")]


def launch(
    context: typer.Context,
    processes: Processes = None,
    nodes: Nodes = None,
    address: Address = None,
    cache: Annotated[bool, typer.Option("--cache", help="Run `tuner cache` instead of `tuner run`.")] = False,
) -> None:
    """Run on several GPUs, of one machine or of many; everything else is given to `tuner run`."""
    nodes = nodes or int(os.environ.get("SLURM_NNODES", "1"))
    count = processes or _gpus()
    if nodes > 1 and address is None:
        raise ConfigError(
            f"{nodes} machines must know where the first one is",
            where="command line",
            remedy="give --address HOST:PORT, the same on every machine",
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = ["-m", "tuner", "cache" if cache else "run", *context.args]
    sys.exit(_launch([*_where(nodes, count, address), f"--shutdown-timeout={PATIENCE}", *command]))


def _gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            "no GPU is visible, so it is not clear how many processes there should be",
            where="command line",
            remedy="give --processes, or look at CUDA_VISIBLE_DEVICES",
        )
    return count


def _where(nodes: int, count: int, address: str | None) -> list[str]:
    """The launcher's options: how many processes, and how machines find each other."""
    endpoint = address or "localhost:0"
    endpoint = endpoint if ":" in endpoint else f"{endpoint}:{PORT}"
    name = os.environ.get("SLURM_JOB_ID", "tuner")
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}"]
    return [f"--nnodes={nodes}", f"--nproc-per-node={count}", *meeting]


def _launch(arguments: list[str]) -> int:
    """Start the processes and wait for them; the exit code. What went wrong they have said themselves."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, command, rest = config_from_args(parse_args(arguments))
    try:
        elastic_launch(config=config, entrypoint=command)(*rest)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
