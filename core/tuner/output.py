"""The output folder: its lock, and what every checkpoint in it says of its run."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuner import __version__, processes
from tuner.errors import CheckpointError
from tuner.train.checkpoint import without_secrets

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.pipeline import Survey
    from tuner.run import Run

LOCK = ".tuner-lock"
RECORDED = ("accelerate", "diffusers", "peft", "safetensors", "torch", "transformers")


@contextmanager
def lock(run: Run) -> Iterator[None]:
    """Keep a second run out of the output folder while this one is alive; the system frees it when the process dies.

    Of several processes the main one holds it.

    Raises CheckpointError when another run holds it or the folder cannot be written.
    """
    with processes.together():
        held = _hold(run.output_dir) if run.is_main else nullcontext()
    with held:
        yield


def _hold(output_dir: Path) -> IO[str]:
    with writable(output_dir):
        file = (output_dir / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            "another run is at work in this output folder",
            where=output_dir,
            remedy="wait for it, or choose another output_dir",
        ) from None
    return file


@contextmanager
def writable(output_dir: Path) -> Iterator[None]:
    """Make the folder, and then run the block. Raises CheckpointError where either cannot write there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(
            f"the output folder cannot be written: {error.strerror}",
            where=output_dir,
            remedy="choose another output_dir",
        ) from None


def manifest(assembly: Assembly, found: Survey) -> dict[str, Any]:
    """What every checkpoint says of the run that made it: versions, plugins, config without secrets, threads."""
    import torch

    config = assembly.core.model_dump(mode="json")
    for plugin in assembly.plugins.values():
        config |= plugin.config.model_dump(mode="json")
    return {
        "tuner": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in RECORDED},
        "plugins": sorted(assembly.plugins),
        "set_aside": list(assembly.notes),
        "proposed": dict(assembly.proposed),
        "model": {"family": found.spec.family, "flavour": found.spec.flavour, "base": found.spec.base},
        "total_steps": found.total,
        "samples": len(found.prepared.samples),
        "samples_per_step": max(found.plan.samples_per_step),
        "threads": torch.get_num_threads(),
        "config": without_secrets(json.loads(json.dumps(config, default=str))),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
