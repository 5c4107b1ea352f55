"""Bringing the parts that lie in hub repositories onto this machine: only the files that are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tuner.errors import ModelError
from tuner_wan.sources import Part, check_whole


def fetch(parts: Mapping[str, Part]) -> dict[str, Part]:
    """The same parts, each in a local folder. Nothing is downloaded that the local cache already has.

    One download per repository, with the hub's own progress bars; ``HF_HUB_OFFLINE`` is honoured. Raises
    ModelError when a repository cannot be had or lacks a file.
    """
    wanted: dict[tuple[str, str | None], list[str]] = {}
    for part in parts.values():
        if part.on_hub:
            wanted.setdefault((part.base, part.revision), []).extend(part.patterns())
    denoiser, scheduler = parts["transformer"], parts["scheduler"]
    if denoiser.file is not None and scheduler.on_hub:
        # A single file brings no config.json: the base's own goes with it.
        wanted[scheduler.base, scheduler.revision].append("transformer/config.json")
    snapshots = {place: _download(*place, patterns) for place, patterns in wanted.items()}
    fetched = {
        name: replace(part, folder=snapshots[part.base, part.revision] / part.subfolder) if part.on_hub else part
        for name, part in parts.items()
    }
    check_whole(fetched.values())
    return fetched


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
