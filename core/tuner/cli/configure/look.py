"""What is in the folder of someone's clips: how many, how large, how long, how fast, and which have captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.builtin.datasets.captions import caption_file, read_alternatives
from tuner.builtin.datasets.probe import Probed, probe
from tuner.builtin.datasets.probe_file import VideoFacts
from tuner.builtin.datasets.scanning import PICTURE_SUFFIXES, VIDEO_SUFFIXES, local_listing
from tuner.errors import DataError

NAMED = 3
"""Files that a remark names."""


@dataclass(frozen=True)
class Look:
    """What was found."""

    folder: Path
    clips: tuple[VideoFacts, ...]
    pictures: tuple[VideoFacts, ...]
    broken: tuple[Probed, ...]
    captions: tuple[tuple[str, ...], ...]
    """of the files that have some"""
    uncaptioned: tuple[str, ...]
    """names of the files that have none"""

    @property
    def files(self) -> tuple[VideoFacts, ...]:
        """Everything that can be trained on."""
        return self.clips + self.pictures

    def mentions(self, word: str) -> float:
        """Share of the captioned files of which some caption has ``word`` in it."""
        found = [any(word.casefold() in caption.casefold() for caption in each) for each in self.captions]
        return sum(found) / len(found) if found else 0.0


def look(folder: Path, index: Path, *, show_progress: bool = True) -> Look:
    """Probe the files of ``folder``; the index of what was found is kept in the folder ``index``.

    Raises DataError for a folder that cannot be read, one without usable files, and captions that cannot be read.
    """
    listing = local_listing(folder, VIDEO_SUFFIXES | PICTURE_SUFFIXES)
    if not listing.files:
        raise DataError(
            "there are no clips in this folder",
            where=folder,
            allowed=sorted(VIDEO_SUFFIXES | PICTURE_SUFFIXES),
            remedy="name the folder that holds them",
        )
    probed = probe(listing, index, show_progress=show_progress)
    whole = [(each.name, each.facts) for each in probed if each.facts is not None]
    broken = tuple(each for each in probed if each.facts is None)
    if not whole:
        raise DataError(f"none of {len(broken)} files can be read ({_first(broken)})", where=folder)
    captions, uncaptioned = _captions(listing.root, [name for name, _ in whole])
    return Look(
        folder,
        tuple(facts for _, facts in whole if not facts.still),
        tuple(facts for _, facts in whole if facts.still),
        broken,
        captions,
        uncaptioned,
    )


def lines(found: Look) -> Iterator[str]:
    """What was found, for a person."""
    if found.clips:
        rates = Counter(round(each.fps, 2) for each in found.clips)
        seconds = sorted(each.duration for each in found.clips)
        yield (
            f"{len(found.clips)} clips: {_sizes(found.clips)}; "
            f"{_span([each.frames for each in found.clips])} frames, {seconds[0]:.1f} to {seconds[-1]:.1f} s, "
            f"{', '.join(f'{rate:g}' for rate, _ in rates.most_common(NAMED))} frames per second"
        )
    if found.pictures:
        yield f"{len(found.pictures)} pictures: {_sizes(found.pictures)}"
    if found.broken:
        yield f"{len(found.broken)} files cannot be read and are left out ({_first(found.broken)})"
    captioned = len(found.files) - len(found.uncaptioned)
    named = ", ".join(found.uncaptioned[:NAMED]) + " …" * (len(found.uncaptioned) > NAMED)
    yield f"{captioned} of {len(found.files)} have captions" + (f"; none: {named}" if found.uncaptioned else "")


def edges(found: Sequence[VideoFacts]) -> list[float]:
    """Edges in pixels of the squares of the same areas, the smallest first."""
    return sorted(math.sqrt(each.width * each.height) for each in found)


def _captions(root: Path, names: Sequence[str]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    captions, without = [], []
    for name in names:
        try:
            captions.append(read_alternatives(caption_file(root / name)))
        except FileNotFoundError:
            without.append(name)
    return tuple(captions), tuple(without)


def _sizes(files: Sequence[VideoFacts]) -> str:
    ordered = sorted(files, key=lambda each: each.width * each.height)
    ends = dict.fromkeys(f"{each.width}x{each.height}" for each in (ordered[0], ordered[-1]))
    return " to ".join(ends)


def _span(numbers: Sequence[int]) -> str:
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return " to ".join(map(str, ends))


def _first(broken: Sequence[Probed]) -> str:
    return "; ".join(f"{each.name}: {each.reason}" for each in broken[:NAMED]) + " …" * (len(broken) > NAMED)
