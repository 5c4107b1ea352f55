"""The output folder and what the run says about itself: lock, manifest, and the lines printed at start and end."""

from __future__ import annotations

import fcntl
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import __version__
from tuner.errors import CheckpointError
from tuner.train import schedules
from tuner.train.checkpoint import without_secrets
from tuner.train.log import NAME as LOG_NAME

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.pipeline import Survey
    from tuner.run import Run

LOCK = ".tuner-lock"
WEIGHTS = ("*lora*.safetensors", "*/diffusion_pytorch_model*.safetensors")
"""Files of a checkpoint that other programs load."""
RECORDED = ("accelerate", "diffusers", "peft", "safetensors", "torch", "transformers")


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Keep a second run out of the folder while this one is alive; the system frees it when the process dies.

    Raises CheckpointError when another run holds it or the folder cannot be written.
    """
    path = output_dir / LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise CheckpointError(
            f"the output folder cannot be written: {error.strerror}",
            where=output_dir,
            remedy="choose another output_dir",
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(
                "another run is at work in this output folder",
                where=output_dir,
                remedy="wait for it, or choose another output_dir",
            ) from None
        yield


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
        "model": {"family": found.spec.family, "flavour": found.spec.flavour, "base": found.spec.base},
        "total_steps": found.total,
        "samples": len(found.prepared.samples),
        "threads": torch.get_num_threads(),
        "config": without_secrets(json.loads(json.dumps(config, default=str))),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show_survey(found: Survey) -> None:
    """The model, and the length of the run."""
    config = found.run.config
    per_step = " to ".join(map(str, sorted({*found.plan.samples_per_step})))
    print(
        f"model: {found.spec.family} {found.spec.flavour} from {found.spec.base}\n"
        f"run: {found.total} steps of {per_step} samples, {found.plan.steps_per_epoch} steps per epoch, "
        f"{found.plan.epochs_in(found.total):.1f} epochs"
    )
    for note in [*found.plan.notes, *found.plan.never_shown(found.total)]:
        print(note)
    if config.lr_warmup_steps and not schedules.warmup_steps(config, found.total):
        print(
            f"lr_warmup_steps is {config.lr_warmup_steps} and the run has {found.total} steps: there is no warm-up, "
            f"the whole run follows lr_scheduler {config.lr_scheduler}"
        )


def show_resume(run: Run, path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], passed: list[str]) -> None:
    """Where the run goes on from, and what is not as it was."""
    for line in passed:
        run.log.warning("%s", line)
    print(f"going on from {path}, step {run.step}")
    if saved.get("threads") != now["threads"]:
        run.log.warning(
            "the checkpoint was made with %s threads and this run has %s: results may differ in the last bits",
            saved.get("threads"),
            now["threads"],
        )
    before = dict(saved.get("config") or {})
    changed = sorted(
        key
        for key in {*before, *now["config"]}
        if before.get(key) != now["config"].get(key) and key != "resume_from_checkpoint"
    )
    if changed:
        run.log.warning("changed since that checkpoint: %s", ", ".join(changed))


def show_finished(found: Survey, path: Path) -> None:
    """There is nothing left to train."""
    print(f"nothing to train: {path} is at step {found.total} of {found.total}; raise max_train_steps to go on")
    show_result(found, path)


def show_result(found: Survey, saved: Path) -> None:
    """Where people find what the run made."""
    output_dir = found.run.output_dir
    lines = [("checkpoint", saved)]
    lines += [("weights", path) for pattern in WEIGHTS for path in sorted(saved.glob(pattern))]
    lines += [("videos", path) for path in [output_dir / "validation"] if path.is_dir()]
    lines += [("log", output_dir / LOG_NAME)]
    for label, path in lines:
        print(f"{label + ':':<12}{path}")
