"""Checkpoints: whole or absent.

``output_dir/checkpoint-<step>/`` is written aside, every file flushed, the manifest with each file's
hash last, and then renamed. The newest whole one is resumed; a broken one is passed over, said, and
never removed. Older ones are pruned only after the new one is durable.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.errors import CheckpointError
from tuner.files import TEMPORARY, sha256_of, sync_file, sync_folder

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_SECRET = re.compile(r"token(?!s|iz)|secret|password|api_key|access_key|credential|storage_options", re.IGNORECASE)
_LOGIN = re.compile(r"(\w+://)(?:[^/\s@?]+@)?([^\s?]*)(?:\?\S*)?")
"""An address: what is before ``@`` is a login, what is after ``?`` may be a signature."""


def folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return output_dir / f"checkpoint-{step}"


def existing(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, whole or not, oldest first."""
    if not output_dir.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def aside(target: Path) -> Path:
    """Where the checkpoint ``target`` lies until it is whole."""
    return target.with_name(f"{TEMPORARY}{target.name}")


@contextmanager
def writing(target: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to fill; on success it becomes the checkpoint ``target`` with a manifest, on failure nothing remains.

    Raises CheckpointError when the disk is full or the folder cannot be written.
    """
    directory = aside(target)
    try:
        # What an earlier, killed process left under our own temporary name.
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        yield directory
        _seal(directory, manifest)
        if target.exists():
            target.rename(_free_name(target))
        directory.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise write_error(target, error) from error
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _seal(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Flush every file and write the manifest that makes the folder a checkpoint."""
    files = {}
    for path in sorted(each for each in directory.rglob("*") if each.is_file()):
        sync_file(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    path = directory / MANIFEST
    path.write_text(json.dumps({"format": FORMAT, **manifest, "files": files}, indent=2, default=str), encoding="utf-8")
    sync_file(path)
    for inner in [each for each in directory.rglob("*") if each.is_dir()]:
        sync_folder(inner)
    sync_folder(directory)


def _free_name(target: Path) -> Path:
    """A name for an older folder that stands where a new checkpoint must go: it is set aside, not removed."""
    numbers = (target.with_name(f"{target.name}.old-{number}") for number in range(1, 10_000))
    return next(name for name in numbers if not name.exists())


def write_error(target: Path, error: OSError) -> CheckpointError:
    """What to say where the checkpoint ``target`` could not be written."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return CheckpointError(
        f"the checkpoint could not be written: {reason}",
        where=target,
        remedy="free space or choose another output_dir, then start again with resume_from_checkpoint: latest; "
        "earlier checkpoints are whole",
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint, every file's size and hash verified. Raises CheckpointError otherwise."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, step = dict(manifest["files"]), manifest["step"]
        if type(step) is not int or step < 0 or not files:
            raise ValueError("it has no step or no files")
        recorded = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint has no readable manifest ({error})", where=path) from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint has format {manifest.get('format')!r}", where=path, allowed=str(FORMAT))
    for name, (size, digest) in recorded.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256_of(file) != digest:
            raise CheckpointError(f"the checkpoint's file {name!r} is missing or damaged", where=path)
    return {**manifest, "step": step}


def find(output_dir: Path, wanted: str | None) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The checkpoint to resume: its folder, its manifest, and a line for each broken one passed over.

    ``wanted`` is ``latest`` or a path; None when there is nothing to resume. Raises CheckpointError when
    the named one is broken or absent, when every one is broken, or when the output folder holds a run that
    was not asked to be resumed.
    """
    found = existing(output_dir)
    if wanted is None:
        if found:
            raise CheckpointError(
                f"the output folder already holds a run, up to step {found[-1][0]}",
                where=output_dir,
                remedy="go on with it by resume_from_checkpoint: latest, or choose another output_dir",
            )
        return None
    if wanted != "latest":
        path = Path(wanted)
        if not path.is_dir():
            raise CheckpointError(
                "resume_from_checkpoint names a folder that does not exist",
                where=path,
                allowed=["latest", *(str(each) for _, each in found), "hub:owner/name"],
            )
        return path, read_manifest(path), []
    passed: list[str] = []
    for _, path in reversed(found):
        try:
            return path, read_manifest(path), passed
        except CheckpointError as error:
            passed.append(f"passed over {path}: {error.what}")
    if passed:
        raise CheckpointError(
            "every checkpoint in the output folder is damaged",
            where="; ".join(passed),
            remedy="choose another output_dir to start afresh; the damaged folders are left as they are",
        )
    return None


def prune(output_dir: Path, limit: int) -> list[Path]:
    """Remove the oldest checkpoints beyond ``limit`` (0 keeps all); returns what was removed.

    Each is renamed first, so that a kill in the middle leaves no half checkpoint under a whole one's name.
    """
    clear_leftovers(output_dir)
    removed = []
    for _, path in existing(output_dir)[:-limit] if limit else []:
        doomed = aside(path)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path)
    return removed


def clear_leftovers(output_dir: Path) -> None:
    """Remove checkpoint folders under our own temporary name that a killed process left."""
    for path in output_dir.glob(f"{TEMPORARY}checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without values whose key names a secret, at any depth, and without logins and queries in addresses."""
    return {key: _bare(value) for key, value in config.items() if not _SECRET.search(key)}


def _bare(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list):
        return [_bare(each) for each in value]
    return _LOGIN.sub(r"\1\2", value) if isinstance(value, str) else value
