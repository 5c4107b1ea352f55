"""Runs in processes that can be killed: a fork server that has only imported, so that a run starts in no time.

Used to prove that a run killed at any instant and started again ends as if nothing had happened.
"""

from __future__ import annotations

import multiprocessing
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


def start(config: Mapping[str, Any], paths: Sequence[str], *, preload: Sequence[str] = PRELOAD) -> BaseProcess:
    """Start ``tuner run`` on ``config`` in a process of its own; ``paths`` go first on its ``sys.path``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    process = context.Process(target=_run, args=(dict(config), list(paths)))
    process.start()
    return process


def _run(config: dict[str, Any], paths: list[str]) -> None:
    sys.path[:0] = paths
    import torch

    from tuner import pipeline
    from tuner.assembly import assemble

    torch.set_num_threads(1)
    pipeline.run(assemble(config))
