"""Alternatives of a caption made by shuffling its parts (``caption_shuffle``)."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence

from tuner import rng
from tuner.builtin.datasets.entries import CaptionShuffle

_SEPARATORS = {
    "comma": re.compile(r"\s*[,，]\s*"),
    "space": re.compile(r"\s+"),
    "period": re.compile(r"\s*(?:\.(?=\s|$)|。)\s*"),  # not the point of a number
    "newline": re.compile(r"\s*\n\s*"),
}
_JOINTS = {"comma": ", ", "space": " ", "period": ". ", "newline": "\n"}
_WIDE_JOINTS = {"comma": "，", "period": "。"}
"""What parts are joined by in a caption that has only the full-width separator."""
TRIES = 20
"""Draws per alternative before a caption has fewer of them."""


def shuffled(captions: Sequence[str], asked: CaptionShuffle, name: str, seed: int) -> tuple[str, ...]:
    """The alternatives of a file with shuffled ones among them, all distinct.

    Arguments
        name: the file's path inside its folder: the order depends on it and on ``seed`` alone.
    A caption without two parts to change places stays as it is.
    """
    found: dict[str, None] = {}
    for index, caption in enumerate(captions):
        if asked.include_original or not movable(caption, asked):
            found[caption] = None
        found.update(dict.fromkeys(_shuffles(caption, asked, random.Random(_seed(asked, name, seed, index)))))
    return tuple(found)


def movable(caption: str, asked: CaptionShuffle) -> bool:
    """Whether a caption has parts that can change places."""
    return len(set(_parts(caption, asked.split_on)[asked.position_start :])) > 1


def _seed(asked: CaptionShuffle, name: str, seed: int, index: int) -> int:
    return rng.derive_seed(seed if asked.seed is None else asked.seed, f"caption_shuffle/{name}", index)


def _parts(caption: str, split_on: str) -> list[str]:
    return [part for part in _SEPARATORS[split_on].split(caption.strip()) if part]


def _shuffles(caption: str, asked: CaptionShuffle, draw: random.Random) -> list[str]:
    """Up to ``asked.count`` other orders of the parts, none twice."""
    parts = _parts(caption, asked.split_on)
    fixed, free = parts[: asked.position_start], parts[asked.position_start :]
    orders = math.factorial(len(free)) // math.prod(map(math.factorial, Counter(free).values()))
    wanted = min(asked.count, orders - 1)
    found: dict[tuple[str, ...], None] = {}
    order = list(free)
    for _ in range(TRIES * wanted):
        draw.shuffle(order)
        if order != free:
            found[tuple(order)] = None
        if len(found) == wanted:
            break
    return [_joined([*fixed, *order], caption, asked.split_on) for order in found]


def _joined(parts: Sequence[str], caption: str, split_on: str) -> str:
    separators = {match.group().strip() for match in _SEPARATORS[split_on].finditer(caption.strip())}
    wide = _WIDE_JOINTS.get(split_on)
    joint = wide if wide and separators == {wide} else _JOINTS[split_on]
    # A sentence ends with its period; a list does not end with a comma.
    ends = split_on == "period" and caption.rstrip().endswith(joint.strip())
    return joint.join(parts) + joint.strip() * ends
