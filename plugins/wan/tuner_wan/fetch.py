"""Bringing the parts that lie in hub repositories onto this machine: only the files that are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tuner.errors import ModelError
from tuner_wan.sources import CONFIGS, Part, check_whole


def fetch(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The same parts, each in a local folder. Nothing is downloaded that the local cache already has.

    One download per repository, with the hub's own progress bars; ``HF_HUB_OFFLINE`` is honoured. Raises
    ModelError when a repository cannot be had or lacks a file.
    """
    wanted: dict[tuple[str, str | None], list[str]] = {}
    for part in parts.values():
        source, patterns = _source(part)
        if source is not None:
            wanted.setdefault((source.base, source.revision), []).extend(patterns)
    snapshots = {place: _download(*place, patterns) for place, patterns in wanted.items()}
    fetched = {name: _placed(part, snapshots) for name, part in parts.items()}
    check_whole(fetched.values())
    return fetched


def _source(part: Part) -> tuple[Part | None, list[str]]:
    """What of a part lies on the hub, and the files of it that are read. A single file brings no config.json."""
    if part.on_hub:
        return part, part.patterns()
    if part.file is not None and part.beside is not None and part.beside.on_hub:
        return part.beside, [f"{part.beside.subfolder}/{CONFIGS[part.name]}"]
    return None, []


def _placed(part: Part, snapshots: Mapping[tuple[str, str | None], Path]) -> Part:
    """The part, and what goes with it, in its local folder."""
    if part.on_hub:
        return replace(part, folder=snapshots[part.base, part.revision] / part.subfolder)
    if part.beside is not None and (part.beside.base, part.beside.revision) in snapshots:
        return replace(part, beside=_placed(part.beside, snapshots))
    return part


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=sorted(set(patterns))))
    except Exception as error:  # whatever the hub client and its transports raise
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"cannot fetch {repository!r} from the hub: {reason[0] if reason else type(error).__name__}",
            where=f"revision {revision}" if revision else None,
            remedy="check the name and the network (a private repository needs `hf auth login`), "
            "or set pretrained_model_name_or_path to a local folder",
        ) from error
