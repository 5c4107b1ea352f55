"""The clips of a validation: each prompt at each size, with the settings that are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from tuner.builtin.sampling.prompts import Prompt
from tuner.builtin.sampling.settings import Settings, all_settings
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.spec import ModelSpec


@dataclass(frozen=True)
class Clip:
    """One clip to render."""

    prompt: Prompt
    """Of several sizes each has a nickname and a slug of its own."""
    settings: Settings

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) in pixels"""
        return self.settings.frames, self.settings.height, self.settings.width


def clips(
    run: Run, spec: ModelSpec, prompts: Sequence[Prompt], strengths: Sequence[float] = (1.0,)
) -> tuple[list[Clip], list[str]]:
    """All clips in the order in which they are rendered, and a line for each wish that the model does not allow.

    ``strengths``: of the trained adapter; several are a clip each. Raises ConfigError for two clips that would be
    written to one file.
    """
    found: list[Clip] = []
    notes: dict[str, None] = {}
    for prompt in prompts:
        settings, said = all_settings(run, spec, prompt.own)
        notes |= dict.fromkeys(said)
        for each in settings:
            sized = _sized(prompt, each) if len(settings) > 1 else prompt
            found += [
                Clip(_at_strength(sized, strength) if len(strengths) > 1 else sized, replace(each, strength=strength))
                for strength in strengths
            ]
    owner: dict[str, str] = {}
    for clip in found:
        other = owner.setdefault(clip.prompt.slug.casefold(), clip.prompt.nickname)
        if other != clip.prompt.nickname:
            raise ConfigError(
                f"the clips of {other!r} and {clip.prompt.nickname!r} would both be written to {clip.prompt.slug!r}",
                remedy="rename one of them",
            )
    return found, list(notes)


def _sized(prompt: Prompt, settings: Settings) -> Prompt:
    size = f"{settings.width}x{settings.height}"
    return replace(prompt, nickname=f"{prompt.nickname} {size}", slug=f"{prompt.slug}_{size}", picture=prompt.slug)


def _at_strength(prompt: Prompt, strength: float) -> Prompt:
    return replace(
        prompt,
        nickname=f"{prompt.nickname} · strength {strength:g}",
        slug=f"{prompt.slug}_strength-{strength:g}",
        picture=prompt.picture or prompt.slug,
        frame=prompt.slug,
    )


def by_shape(found: Sequence[Clip]) -> Iterator[list[Clip]]:
    """The clips in groups of equal shape."""

    def shape(clip: Clip) -> tuple[int, int, int]:
        return clip.shape

    for _, group in groupby(sorted(found, key=shape), key=shape):
        yield list(group)
