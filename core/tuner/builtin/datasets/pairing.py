"""Files that belong to the files of a dataset by name: masks, first and last frames."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from tuner.builtin.datasets.entries import ConditioningDataset, Trained
from tuner.builtin.datasets.judge import Kept
from tuner.builtin.datasets.probe import Probed, probe
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.reading import Datasets
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, local_listing
from tuner.builtin.datasets.views import Window
from tuner.data.samples import Companion
from tuner.errors import DataError
from tuner.spec import ModelSpec

MASKS = ("mask", "segmentation")
"""Roles of files that lie over the whole clip."""
INDEXES = "conditioning"
"""Folder inside a dataset's cache that holds the indexes of its probed companions."""
TOLERANCE = 0.01
"""How much aspects and frame rates may differ."""
NAMED = 10
"""Files named in one error before it only counts."""


def conditioning_of(dataset: Trained, datasets: Datasets, spec: ModelSpec) -> list[ConditioningDataset]:
    """The conditioning entries that ``dataset`` names and the model has a use for; masks always are of use."""
    named = [entry for entry in datasets.conditioning if entry.id in dataset.conditioning_ids]
    return [entry for entry in named if entry.conditioning_type in (*MASKS, *spec.frames_taken)]


def companions(
    dataset: Trained,
    entries: Iterable[ConditioningDataset],
    files: Sequence[tuple[Kept, Sequence[Window]]],
    *,
    processes: int = 0,
    show_progress: bool = True,
) -> Mapping[str, tuple[Companion, ...]]:
    """The companions of the dataset's ``files`` in ``entries``, by name: one for each file and entry.

    A companion has its file's path inside its own folder, with any suffix of a picture or a clip.

    Arguments
        processes: how many probe new files; 0 is one per core.
    Raises DataError naming the files of an entry that have no companion, two of them, or one that cannot be
    decoded, has another aspect, or ends before what is taken of the file.
    """
    found: dict[str, tuple[Companion, ...]] = {kept.name: () for kept, _ in files}
    for entry in entries:
        root = Path(entry.instance_data_dir or "")
        listing = local_listing(root, VIDEO_SUFFIXES | PICTURE_SUFFIXES)
        index = dataset.cache_dir_vae / INDEXES / entry.id
        candidates = _by_stem(probe(listing, index, processes=processes, show_progress=show_progress))
        faults: list[str] = []
        for kept, windows in files:
            match = candidates.get(_stem(kept.name), [])
            if fault := _fault(entry, kept, windows, match):
                faults.append(f"{kept.name}: {fault}")
            elif facts := match[0].facts:
                companion = Companion(entry.conditioning_type, listing.root / match[0].name, facts.sha256)
                found[kept.name] += (companion,)
        if faults:
            raise _refusal(dataset, entry, faults, len(files))
    return found


def _stem(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix()


def _by_stem(probed: Iterable[Probed]) -> Mapping[str, list[Probed]]:
    grouped: dict[str, list[Probed]] = defaultdict(list)
    for each in probed:
        grouped[_stem(each.name)].append(each)
    return grouped


def _fault(
    entry: ConditioningDataset, kept: Kept, windows: Sequence[Window], candidates: Sequence[Probed]
) -> str | None:
    """Why a file has no usable companion among those of its name; None when it has one."""
    if not candidates:
        return f"there is no {_stem(kept.name)} of any suffix"
    if len(candidates) > 1:
        return f"there are {' and '.join(each.name for each in candidates)}"
    companion = candidates[0]
    if companion.facts is None:
        return f"{companion.name} cannot be decoded ({companion.reason})"
    if entry.conditioning_type in MASKS:
        fault = _mismatch(kept.facts, companion.facts, windows)
    elif not companion.facts.still:
        fault = "is a clip, and one frame is a picture"
    else:
        fault = _other_aspect(kept.facts, companion.facts)
    return f"{companion.name} {fault}" if fault else None


def _other_aspect(source: VideoFacts, companion: VideoFacts) -> str | None:
    """Why a picture cannot be framed as its source is."""
    if abs(companion.width * source.height / (companion.height * source.width) - 1) > TOLERANCE:
        return f"is {companion.width}x{companion.height}, and the file itself is {source.width}x{source.height}"
    return None


def _mismatch(source: VideoFacts, mask: VideoFacts, windows: Sequence[Window]) -> str | None:
    """Why a mask does not lie over its source."""
    if fault := _other_aspect(source, mask):
        return fault
    if mask.frames == 1:
        return None  # one picture for all frames
    needed = max(frames_needed(window, source) for window in windows)
    if mask.frames < needed:
        return f"has {mask.frames} frames, and {needed} are needed"
    by_time = any(view.fps is not None for window in windows for view in window.views)
    if by_time and abs(mask.fps / source.fps - 1) > TOLERANCE:
        return f"has {mask.fps:g} frames per second, and the file itself {source.fps:g}"
    return None


def frames_needed(window: Window, source: VideoFacts) -> int:
    """Frames that something over ``source`` must have, so that all views of the window lie within."""
    needed = 1
    for view in window.views:
        stride = 1.0 if view.fps is None else source.fps / view.fps
        needed = max(needed, view.start + 1 + math.floor((window.bucket.frames - 1) * stride))
    # Timestamps may be uneven: what has as many frames as the file itself is never too short.
    return min(needed, source.frames)


def _refusal(dataset: Trained, entry: ConditioningDataset, faults: Sequence[str], of: int) -> DataError:
    role = entry.conditioning_type.replace("_", " ")
    named = "; ".join(faults[:NAMED]) + (f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else "")
    return DataError(
        f"{len(faults)} of {of} files of dataset {dataset.id!r} have no {role} to use: {named}",
        where=f"{entry.instance_data_dir} (id {entry.id!r})",
        remedy=f"give each file one {role} of the same name (any suffix) and aspect, "
        "or take conditioning_data out of the dataset",
    )
