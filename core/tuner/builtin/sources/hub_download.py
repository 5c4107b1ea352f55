"""Downloading a dataset repository: one folder, or one clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tuner.builtin.sources.credentials import shown
from tuner.builtin.sources.keys import HubKeys
from tuner.errors import ConfigError, DataError

T = TypeVar("T")


def download(keys: HubKeys, suffixes: Sequence[str], *, show_progress: bool) -> tuple[Path, tuple[str, ...]]:
    """The folder of a repository's files in the hub's cache, and a note where the hub could not be asked.

    What is there already is not downloaded again, and half a file is gone on with. ``HF_ENDPOINT``,
    ``HF_HUB_OFFLINE``, ``HF_HOME`` and the login of ``hf auth login`` count.
    Raises ConfigError when there is no such repository or revision, DataError when it cannot be read.
    """
    from huggingface_hub import HfApi, snapshot_download

    def snapshot(*, local_files_only: bool) -> Path:
        with _bars(show_progress):
            folder = snapshot_download(
                keys.dataset_name,
                repo_type="dataset",
                revision=keys.revision,
                allow_patterns=list(keys.allow_patterns) or patterns(suffixes),
                local_files_only=local_files_only,
            )
        return Path(folder)

    away = _told(keys, lambda: HfApi().repo_info(keys.dataset_name, repo_type="dataset", revision=keys.revision))
    if not isinstance(away, Exception):
        folder = _told(keys, lambda: snapshot(local_files_only=False))
        if isinstance(folder, Exception):
            raise DataError(
                f"the repository {keys.dataset_name} could not be downloaded: {_reason(folder)}",
                remedy="start again: what is downloaded already stays",
            ) from folder
        return folder, ()
    folder = _told(keys, lambda: snapshot(local_files_only=True))
    if isinstance(folder, Exception):
        raise DataError(
            f"the hub cannot be reached ({_reason(away)}), and {keys.dataset_name} is not wholly in its cache here",
            where=_reason(folder),
            remedy="download it where there is a network, `hf download --repo-type dataset …`, or go online",
        ) from away
    return folder, (f"the hub cannot be reached ({_reason(away)}); {keys.dataset_name} is used as downloaded before",)


def patterns(suffixes: Sequence[str]) -> list[str]:
    """Patterns of the files with one of ``suffixes``, in either case."""
    return [f"*{each}" for suffix in dict.fromkeys(suffixes) for each in (suffix, suffix.upper())]


def _told(keys: HubKeys, action: Callable[[], T]) -> T | Exception:
    """What ``action`` returns, or why the hub cannot be reached. What no later start can mend is raised."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"dataset repository {keys.dataset_name}"
    try:
        return action()
    except GatedRepoError as error:
        raise DataError(
            "the repository is gated, and this machine's login may not read it",
            where=where,
            remedy="accept its terms on its page, then log in with `hf auth login`, or set HF_TOKEN",
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            "the repository does not exist, or it is private and this machine is not logged in",
            where=where,
            remedy="correct dataset_name; or log in with `hf auth login`, or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"there is no revision {keys.revision!r}", where=where, remedy="correct revision") from error
    except HFValidationError as error:
        raise ConfigError(
            f"dataset_name cannot be {keys.dataset_name!r}", allowed="owner/name", remedy=_reason(error)
        ) from error
    except Exception as error:  # which ones depends on the HTTP library that the hub's package uses
        if isinstance(error, TypeError | AssertionError | AttributeError):
            raise
        return error


def _reason(error: Exception) -> str:
    return shown(str(error).strip().partition("\n")[0]) or type(error).__name__


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    """The hub's own progress bars, or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
