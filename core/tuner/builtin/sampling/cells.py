"""The clips of ``tuner sample``: each of the config's, for each strength and seed; what is there is not made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuner.builtin.sampling.clips import Clip
from tuner.builtin.sampling.prompts import Prompt, slug
from tuner.builtin.sampling.settings import Settings
from tuner.errors import ConfigError
from tuner.files import atomic_write_text, sha256_of

LONGEST = 40
"""Characters of a prompt that its clips' names begin with."""
FREE = ("tuner", "files")
"""Entries of a record that two clips of equal settings may differ in."""


@dataclass(frozen=True)
class Cell:
    """One clip to render."""

    clip: Clip
    strength: float | None
    """Of all adapters together; None where there is none."""
    seed: int

    @property
    def prompt(self) -> Prompt:
        """What it shows."""
        return self.clip.prompt

    @property
    def settings(self) -> Settings:
        """How it is rendered."""
        return replace(self.clip.settings, seed=self.seed)

    @property
    def name(self) -> str:
        """Its files' name without suffix."""
        strength = "" if self.strength is None else f"_strength-{self.strength:g}"
        return f"{self.prompt.slug}{strength}_seed-{self.seed}"

    @property
    def label(self) -> str:
        """What the contact sheet calls it."""
        strength = "" if self.strength is None else f" · strength {self.strength:g}"
        return f"{self.prompt.nickname}{strength} · seed {self.seed}"


def typed_prompts(texts: Sequence[str]) -> tuple[Prompt, ...]:
    """Prompts without a nickname: files are named by how they begin. Raises ConfigError for one given twice."""
    found: dict[str, Prompt] = {}
    for text in texts:
        name = slug(text[:LONGEST])
        if len(text) > LONGEST or not name:
            name = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("_")
        if not text.strip():
            raise ConfigError("a prompt is empty", where="--prompt")
        if (other := found.get(name.casefold())) is not None:
            raise ConfigError(
                f"{other.text!r} and {text!r} would both be written to {name!r}",
                where="--prompt",
                remedy="give them nicknames in a file, and name that with --prompts",
            )
        found[name.casefold()] = Prompt(text if len(text) <= LONGEST else f"{text[:LONGEST]}…", name, text)
    return tuple(found.values())


def cells(clips: Sequence[Clip], strengths: Sequence[float | None], seeds: Sequence[int]) -> list[Cell]:
    """Every combination, in the order in which they are rendered; without ``seeds`` each clip has its own."""
    return [
        Cell(clip, strength, seed)
        for clip in clips
        for seed in seeds or (clip.settings.seed,)
        for strength in strengths
    ]


def is_whole(folder: Path, cell: Cell, record: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds the clip that ``record`` describes. Raises ConfigError for another of its name."""
    path = folder / f"{cell.name}.json"
    if not path.exists():
        strange = [each for each in media_paths(folder, cell) if each.exists()]
        if strange:
            raise _taken(strange[0], "there is no record beside it of how it was rendered")
        return False
    held = _held(path)
    if differing := sorted(_differing(held, record)):
        raise _taken(path, f"it was rendered otherwise ({', '.join(differing)})")
    files: Mapping[str, str] = held.get("files") or {}
    return bool(files) and all((folder / name).is_file() for name in files) and _unchanged(folder, files)


def _differing(held: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """What differs, such as ``steps 30, now 20``."""
    for key in {*held, *record} - set(FREE):
        former, now = held.get(key), record.get(key)
        if former == now:
            continue
        if isinstance(former, Mapping) and isinstance(now, Mapping):
            yield from _differing(former, now)
        elif isinstance(former, str | int | float) and isinstance(now, str | int | float):
            yield f"{key} {former}, now {now}"
        else:
            yield key


def _unchanged(folder: Path, files: Mapping[str, str]) -> bool:
    changed = [name for name, digest in files.items() if sha256_of(folder / name) != digest]
    if changed:
        raise _taken(folder / changed[0], "it is not as it was written")
    return True


def media_paths(folder: Path, cell: Cell) -> Iterator[Path]:
    """The poster, which a picture is by itself, and the clip."""
    yield folder / f"{cell.name}.png"
    yield folder / f"{cell.name}.mp4"


def write_record(folder: Path, cell: Cell, record: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
    """Say how a clip is rendered: before it is, which claims its names, and again with its files' hashes."""
    hashes = {path.name: sha256_of(path) for path in files}
    text = json.dumps({**record, "files": hashes}, indent=2, ensure_ascii=False)
    atomic_write_text(folder / f"{cell.name}.json", text + "\n")


def _held(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _taken(path, f"it cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _taken(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path.name} is there already, and {why}",
        where=path.parent,
        remedy="choose another folder with --output: nothing is overwritten",
    )
