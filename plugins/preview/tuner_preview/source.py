"""Where the tiny autoencoder's file lies: on this machine, or on the hub. Light: no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tuner.errors import ConfigError, ModelError

KEY = "validation_preview_model"
SUFFIX = ".safetensors"
ALLOWED = f"a {SUFFIX} file, or owner/name/file{SUFFIX} on the hub"
_ON_HUB = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(/(?P<file>.+))?")

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A file on this machine, or one in a repository of the hub."""

    file: Path | None
    repository: str = ""
    name: str | None = None
    """Of the file in the repository; None is its only one."""

    def fetch(self) -> Path:
        """The file on this machine; from the hub only what its cache here lacks, with the hub's own progress bar.

        Raises ConfigError where the repository has no such file, ModelError where it cannot be had.
        """
        if self.file is not None:
            return self.file
        from huggingface_hub import hf_hub_download

        name = self.name or self._only_file()
        return Path(self._asked(lambda: hf_hub_download(self.repository, name)))

    def _only_file(self) -> str:
        from huggingface_hub import HfApi

        listed = self._asked(lambda: HfApi().list_repo_files(self.repository))
        files = [each for each in listed if each.endswith(SUFFIX)]
        if len(files) == 1:
            return str(files[0])
        raise ConfigError(
            f"{self.repository} has {len(files)} {SUFFIX} files"
            if files
            else f"{self.repository} has no {SUFFIX} file",
            where=KEY,
            allowed=[f"{self.repository}/{each}" for each in files[:8]] or ALLOWED,
            remedy="name the file behind the repository" if files else None,
        )

    def _asked(self, action: Callable[[], T]) -> T:
        """What the hub answers."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        try:
            return action()
        except RepositoryNotFoundError as error:
            raise ConfigError(
                f"there is no repository {self.repository}, or it is private and this machine is not logged in",
                where=KEY,
                allowed=ALLOWED,
                remedy="correct the name, or log in with `hf auth login`",
            ) from error
        except EntryNotFoundError as error:
            # What is not in the local cache either, while the hub is away, is an entry not found too.
            raise ConfigError(
                f"{self.repository} has no file {self.name!r}, or it is not here and the hub cannot be asked",
                where=KEY,
                allowed=ALLOWED,
                remedy="correct the name, or go online once",
            ) from error
        except Exception as error:  # whatever the hub client and its transports raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"{self.repository} cannot be had from the hub: {reason}",
                where=KEY,
                remedy="check the network, name a file on this machine, or leave the key out",
            ) from error


def locate(wish: str) -> Place:
    """Where the file that ``wish`` names lies. Raises ConfigError for one that cannot be a tiny autoencoder's."""
    path = Path(wish).expanduser()
    if path.is_dir():
        raise ConfigError(f"{wish} is a folder", where=KEY, allowed=ALLOWED, remedy="name the file in it")
    if path.is_file() and path.suffix == SUFFIX:
        return Place(path)
    if path.is_file() or path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        raise ConfigError(
            f"{wish} is no {SUFFIX} file, and others are not read: they can hold code",
            where=KEY,
            allowed=ALLOWED,
            remedy=f"take the {SUFFIX} file of the same weights",
        )
    on_hub = _ON_HUB.fullmatch(wish)
    only_folders = on_hub is not None and on_hub["file"] is None and wish.endswith(SUFFIX)
    if on_hub is None or only_folders or (on_hub["file"] or SUFFIX)[-len(SUFFIX) :] != SUFFIX:
        raise ConfigError(f"there is no file {wish}", where=KEY, allowed=ALLOWED, remedy="correct the path")
    return Place(None, on_hub["repository"], on_hub["file"])
