"""What is uploaded together: a checkpoint, or the result of a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.hub import card
from tuner.files import TEMPORARY, atomic_write_text
from tuner.train import checkpoint as checkpoints
from tuner.train.state import exports

if TYPE_CHECKING:
    from tuner.run import Run

WAITING = f"{TEMPORARY}uploads"
"""Folder in the output folder with what waits for its upload."""
CARD = "README.md"
RESULT = "the result"


@dataclass(frozen=True)
class Job:
    """One commit to the repository."""

    name: str
    message: str
    files: tuple[tuple[str, Path], ...]
    """Path in the repository, and the file here."""
    held: Path | None = None
    """A folder of ours that is removed afterwards."""
    replaceable: bool = False
    """Whether a newer one may come in its place while it waits."""

    @property
    def bytes(self) -> int:
        """Size of its files; those that are gone count nothing."""
        return sum(path.stat().st_size for _, path in self.files if path.is_file())

    def release(self) -> None:
        """Remove what was held for it."""
        if self.held is not None:
            shutil.rmtree(self.held, ignore_errors=True)


def of_checkpoint(run: Run, checkpoint: Path) -> Job:
    """The whole folder ``checkpoint``, below its own name, and the model card with the latest clips.

    The files are held by hard links: the run may prune the checkpoint before it is uploaded. Where the file system has
    no links they are read where they are.
    """
    held = run.output_dir / WAITING / checkpoint.name
    shutil.rmtree(held, ignore_errors=True)
    files = [(f"{checkpoint.name}/{name}", path) for name, path in _linked(checkpoint, held / "files")]
    job = Job(checkpoint.name, f"{checkpoint.name} of {_total(run)}", tuple(files), held, replaceable=True)
    return _with_card(run, checkpoint, job)


def of_result(run: Run, checkpoint: Path) -> Job:
    """What people use elsewhere, of the last checkpoint, in the repository's root, with the model card."""
    held = run.output_dir / WAITING / "result"
    files = [(name, path) for name, path in _inside(checkpoint) if path in set(exports(checkpoint))]
    step = checkpoints.read_manifest(checkpoint)["step"]
    return _with_card(run, checkpoint, Job(RESULT, f"result after {step} steps", tuple(files), held))


def clear(output_dir: Path) -> None:
    """Remove what a killed run left waiting; its checkpoints are where they were."""
    shutil.rmtree(output_dir / WAITING, ignore_errors=True)


def _with_card(run: Run, checkpoint: Path, job: Job) -> Job:
    assert job.held is not None
    clips = card.clips(run.output_dir / "validation")
    manifest: dict[str, Any] = json.loads((checkpoint / checkpoints.MANIFEST).read_text(encoding="utf-8"))
    useful = {path.name for path in exports(checkpoint)}
    weights = [name for name, _ in job.files if name.rpartition("/")[2] in useful]
    atomic_write_text(job.held / CARD, card.text(run, manifest, clips, weights))
    shown = [(f"{card.SAMPLES}/{clip.path.name}", clip.path) for clip in clips]
    return replace(job, files=((CARD, job.held / CARD), *shown, *job.files))


def _total(run: Run) -> str:
    return f"{run.total_steps} steps"


def _inside(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file in ``folder``; what is ours alone, such as half-written files, is left out."""
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        if not path.name.startswith("."):
            yield path.relative_to(folder).as_posix(), path


def _linked(folder: Path, target: Path) -> list[tuple[str, Path]]:
    """The files of ``folder``, each a second name in ``target`` for the same content."""
    found = list(_inside(folder))
    try:
        for name, path in found:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target / name)
    except OSError:
        return found
    return [(name, target / name) for name, _ in found]
