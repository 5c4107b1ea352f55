"""Runs in processes that can be killed: a fork server that has only imported, so that a run starts in no time.

Used to prove that a run killed at any instant and started again ends as if nothing had happened.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = (
    "torch",
    "accelerate",
    "peft",
    "av",
    "tuner.pipeline",
    "tuner.assembly",
    "tuner.train.loop",
    "tuner.builtin.encoding.fill",
)


def start(
    config: Mapping[str, Any],
    paths: Sequence[str],
    *,
    preload: Sequence[str] = PRELOAD,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start ``tuner run`` on ``config`` in a process of its own; ``paths`` go first on its ``sys.path``.

    What it ends with is its exit code: a TunerError's own, its text on standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=_run, args=(dict(config), list(paths), dict(environment or {})))
    process.start()
    return process


def start_several(config: Mapping[str, Any], paths: Sequence[str], count: int = 2) -> list[BaseProcess]:
    """Start the ``count`` processes of one run, as a launcher does on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        start(config, paths, environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def _run(config: dict[str, Any], paths: list[str], environment: dict[str, str]) -> None:
    sys.path[:0] = paths
    os.environ.update(environment)
    import torch

    from tuner import pipeline
    from tuner.assembly import assemble
    from tuner.errors import TunerError

    torch.set_num_threads(1)
    try:
        pipeline.run(assemble(config))
    except TunerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
