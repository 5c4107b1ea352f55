"""Folders elsewhere, as fsspec reads them: what is in one, and fetching a file of it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from tuner.builtin.sources.attempts import attempt
from tuner.builtin.sources.credentials import said, shown
from tuner.errors import ConfigError, DataError, nearest

AT_ONCE = 8
"""Requests under way at a time."""
SILENCE_SECONDS = 60.0
"""A server over HTTP that says nothing for so long is asked again."""
CAPTIONS = ".txt"
_EXTRA = ("aiohttp", "s3fs")
"""Packages of the extra ``remote``."""
_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum", "crc32c")
_TIME = ("LastModified", "last_modified", "Last-Modified", "mtime", "modified", "updated", "created")
"""Names under which file systems say what tells one version of a file from another, the better ones first."""


@dataclass(frozen=True)
class Place:
    """A folder (or file) that an address leads to."""

    address: str
    """without login and query: fit to be shown"""
    file_system: Any
    path: str
    """as the file system has it"""
    options: Mapping[str, Any] = field(repr=False)

    @property
    def speaks_http(self) -> bool:
        """Whether names are percent-encoded, and nothing but a page of links says what there is."""
        return self.path.startswith(("http://", "https://"))


@dataclass(frozen=True)
class RemoteFile:
    """A file of a place."""

    name: str
    """relative, with forward slashes; never leads out of a folder"""
    place: Place
    path: str
    """as the file system has it"""
    size: int | None = None
    """bytes; None where the server does not say"""
    version: str = ""
    """changes with the content, where the server tells"""

    @property
    def identity(self) -> str:
        """What a copy is known by: while it is the same, so is the content."""
        return hashlib.sha256(f"{self.path}\0{self.size}\0{self.version}".encode()).hexdigest()


def connect(address: str, options: Mapping[str, Any]) -> Place:
    """The place behind an address. Nothing is asked of the server yet.

    Raises ConfigError for an unknown protocol, a package that is not installed, or options it does not take.
    """
    import fsspec

    protocol = address.partition("://")[0].partition("::")[0]
    try:
        # A listing kept from before would hide what has changed.
        file_system, path = fsspec.url_to_fs(address, skip_instance_cache=True, **_with_patience(protocol, options))
    except ImportError as error:
        raise _not_installed(protocol, error) from error
    except ValueError as error:
        known = sorted(fsspec.available_protocols())
        if protocol in known:
            raise _bad_options(address, options, error) from error
        raise ConfigError(
            f"there is no way to read {protocol}:// addresses",
            where=shown(address),
            allowed="what fsspec reads, such as s3://, gs://, https://",
            nearest=nearest(protocol, known),
        ) from error
    except TypeError as error:
        raise _bad_options(address, options, error) from error
    return Place(shown(address), file_system, str(path), options)


def _with_patience(protocol: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` without HTTP's five minutes for a whole file, and with the environment's proxies."""
    if protocol not in ("http", "https"):
        return dict(options)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    client = {"timeout": timeout, "trust_env": True, **options.get("client_kwargs", {})}
    return {**options, "client_kwargs": client}


def _not_installed(protocol: str, error: ImportError) -> ConfigError:
    text = str(error)
    return ConfigError(
        f"{protocol}:// addresses cannot be read: {text}",
        remedy="pip install 'difftuner[remote]'"
        if any(name in text for name in _EXTRA)
        else "install the package that it names",
    )


def _bad_options(address: str, options: Mapping[str, Any], error: Exception) -> ConfigError:
    return ConfigError(
        f"the file system cannot be opened: {said(error, options)}", where=shown(address), remedy="see storage_options"
    )


def media_in(place: Place, suffixes: Collection[str]) -> list[RemoteFile]:
    """The files below a place with one of ``suffixes``, and the caption files beside them, sorted by name.

    Hidden files are left out; sizes may be unknown yet (:func:`measured`).
    Raises Missing, Refused or Unreachable; DataError for a name that would lead out of a folder.
    """
    found = {file.name: file for file in _below(place)}
    media = [name for name in found if PurePosixPath(name).suffix.lower() in suffixes]
    captions = (str(PurePosixPath(name).with_suffix(CAPTIONS)) for name in media)
    wanted = dict.fromkeys([*media, *(name for name in captions if name in found)])
    return [found[name] for name in sorted(wanted)]


def inside(name: str, where: object) -> str:
    """``name`` when it stays inside the folder it is put in. Raises DataError otherwise."""
    if ".." in PurePosixPath(name).parts or name.startswith("/") or PureWindowsPath(name).drive or "\0" in name:
        raise DataError(
            f"the name {name!r} leads out of the folder of copies",
            where=where,
            remedy="rename the file, or take it out",
        )
    return name


def _below(place: Place) -> Iterator[RemoteFile]:
    """Every file below a place that is not hidden, level by level.

    Not ``find``: fsspec's own leaves out, without a word, the folders that it could not list.
    """
    place.file_system.invalidate_cache()
    level, seen = [place.path], {place.path.rstrip("/")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while level:
            listings = list(pool.map(partial(_entries, place), level))
            level = []
            for name, info in (entry for listing in listings for entry in listing):
                path = str(info["name"])
                if info["type"] != "directory":
                    yield RemoteFile(inside(name, place.address), place, path, info.get("size"), _version(info))
                elif path.rstrip("/") not in seen:
                    seen.add(path.rstrip("/"))
                    level.append(path)


def _entries(place: Place, folder: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What is in one folder, but hidden things, by name relative to the place."""
    infos = attempt(partial(place.file_system.ls, folder, detail=True), place.options)
    named = [(_name(str(info["name"]), place), info) for info in infos]
    return [
        (name, info)
        for name, info in named
        if not any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    ]


def _name(path: str, place: Place) -> str:
    plain, root = path.rstrip("/"), place.path.rstrip("/")
    if plain == root:
        relative = plain.rpartition("/")[2]
    elif plain.startswith(f"{root}/"):
        relative = plain[len(root) + 1 :]
    else:
        raise DataError(f"{shown(path)} is listed, and is not below the address", where=place.address)
    return unquote(relative) if place.speaks_http else relative


def _version(info: Mapping[str, Any]) -> str:
    return next((str(info[name]) for name in (*_CONTENT, *_TIME) if info.get(name)), "")


def measured(file: RemoteFile) -> RemoteFile:
    """The file with its size and version, asked for. Raises Missing, Refused or Unreachable."""
    if file.size is not None:
        return file
    info = attempt(partial(file.place.file_system.info, file.path), file.place.options)
    return replace(file, size=info.get("size"), version=_version(info))


def download(file: RemoteFile, target: Path) -> None:
    """Fetch a file to ``target``, which need not be atomic. Raises Missing, Refused, Unreachable or OSError."""

    def get() -> None:
        file.place.file_system.get_file(file.path, str(target))
        size = target.stat().st_size
        if file.size is not None and size != file.size:
            raise OSError(f"{size} bytes came, {file.size} were announced")

    attempt(get, file.place.options)
