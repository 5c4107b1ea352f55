"""Taking a checkpoint from the hub into the output folder, whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from tuner.builtin.hub.upload import reason
from tuner.errors import CheckpointError, ConfigError
from tuner.files import sync_file, sync_folder
from tuner.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tuner.run import Run

T = TypeVar("T")

PREFIX = "hub:"
FORM = "hub:owner/name, hub:owner/name/checkpoint-100, hub:owner/name@revision/checkpoint-100"
_REFERENCE = re.compile(r"hub:(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<folder>checkpoint-\d+))?/?")


@dataclass(frozen=True)
class Reference:
    """A checkpoint on the hub; without a folder the newest, without a revision that of the main branch."""

    repository: str
    revision: str | None
    folder: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ConfigError for what is no reference."""
        found = _REFERENCE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"resume_from_checkpoint is {text!r}, which names no checkpoint on the hub",
                where="resume_from_checkpoint",
                allowed=FORM,
            )
        return cls(found["repository"], found["revision"], found["folder"])


def fetch(run: Run, text: str) -> None:
    """Bring the checkpoint that ``text`` names into the output folder, unless that has gone as far already.

    Raises ConfigError or CheckpointError where there is none, it cannot be had, or it is damaged.
    """
    reference = Reference.parse(text)
    local = checkpoints.existing(run.output_dir)
    if reference.folder is not None and local and local[-1][0] >= _step(reference.folder):
        _say_kept(run, local[-1][1], reference.folder)
        return
    names = _asked(reference, lambda api: api.list_repo_files(reference.repository, revision=reference.revision))
    folder = _chosen(reference, names)
    if local and local[-1][0] >= _step(folder):
        _say_kept(run, local[-1][1], folder)
        return
    _take(run, reference, folder)


def _say_kept(run: Run, path: Path, folder: str) -> None:
    run.log.info("%s has gone as far as the hub's %s: it is gone on with", path, folder)


def _chosen(reference: Reference, names: list[str]) -> str:
    """The folder asked for, or the newest that has a manifest. Raises CheckpointError where there is none."""
    ends = [PurePosixPath(name) for name in names if PurePosixPath(name).name == checkpoints.MANIFEST]
    found = {path.parts[0] for path in ends if len(path.parts) == 2 and re.fullmatch(r"checkpoint-\d+", path.parts[0])}
    if reference.folder in found:
        return str(reference.folder)
    if not found or reference.folder is not None:
        raise CheckpointError(
            f"{reference.repository} has no {reference.folder or 'checkpoint'} on the hub",
            where="resume_from_checkpoint",
            allowed=sorted(found) or "a repository that push_checkpoints_to_hub has written to",
        )
    return max(found, key=_step)


def _take(run: Run, reference: Reference, folder: str) -> None:
    """Download ``folder`` aside, verify it by its manifest, and put it in its place."""
    target = run.output_dir / folder
    away = checkpoints.aside(target)
    run.log.info("taking %s of %s from the hub", folder, reference.repository)

    def download(api: HfApi) -> str:
        return str(
            api.snapshot_download(
                reference.repository, revision=reference.revision, allow_patterns=[f"{folder}/*"], local_dir=away
            )
        )

    _asked(reference, download)
    try:
        checkpoints.read_manifest(away / folder)
    except CheckpointError as error:
        shutil.rmtree(away, ignore_errors=True)  # another start must not go on with what is damaged
        raise CheckpointError(
            f"what the hub gave is no whole checkpoint: {error.what}",
            where=f"{reference.repository}/{folder}",
            remedy="start again, or name another checkpoint",
        ) from None
    for path in sorted((away / folder).rglob("*")):
        sync_file(path) if path.is_file() else sync_folder(path)
    (away / folder).rename(target)
    sync_folder(run.output_dir)
    shutil.rmtree(away, ignore_errors=True)


def _step(folder: str) -> int:
    return int(folder.rpartition("-")[2])


def _asked(reference: Reference, question: Callable[[HfApi], T]) -> T:
    """What the hub answers. Raises ConfigError where it has no such thing, CheckpointError where it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return question(HfApi())
    except GatedRepoError as error:
        raise ConfigError(
            f"{reference.repository} is gated, and this machine's login may not read it",
            where="resume_from_checkpoint",
            remedy="accept its terms on its page, then log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no repository {reference.repository} on the hub, or it is private and nobody is logged in here",
            where="resume_from_checkpoint",
            remedy="correct it, or log in with `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{reference.repository} has no revision {reference.revision!r}", where="resume_from_checkpoint"
        ) from error
    except Exception as error:  # which ones depends on the HTTP library that the hub's package uses
        if isinstance(error, TypeError | AssertionError | AttributeError):
            raise
        raise CheckpointError(
            f"the hub cannot be reached, or did not send everything: {reason(error)}",
            where=reference.repository,
            remedy="start again: what was downloaded stays; or go on from a local checkpoint",
        ) from error
