"""What makes clips worse than they need to be, said before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tuner.builtin.sampling.clips import Clip
from tuner.builtin.sampling.keys import SamplingConfig
from tuner.errors import ConfigError, ConfigErrors
from tuner.spec import ModelSpec

WORDS = 6
"""Fewer are few: the models were trained on captions of some sentences."""
_WORD = re.compile(r"[\u2e80-\uffef]|[^\W\u2e80-\uffef]+")
"""A word, or a character of a script that writes none."""
SHOWN = 5


def advice(clips: Sequence[Clip], spec: ModelSpec, config: SamplingConfig, explicit: frozenset[str]) -> Iterator[str]:
    """Lines about prompts of a few words, and settings without effect."""
    short = [clip.prompt.nickname for clip in clips if len(_WORD.findall(clip.prompt.text)) < WORDS]
    if short:
        more = f" and {len(short) - SHOWN} more" if len(short) > SHOWN else ""
        yield (
            f"prompts of fewer than {WORDS} words are rendered badly: "
            f"describe subject, motion, place and light in {', '.join(short[:SHOWN])}{more}"
        )
    if spec.boundary is None and "validation_guidance_2" in explicit:
        yield f"validation_guidance_2 does nothing: {spec.flavour} has one denoiser, and validation_guidance is for it"
    if config.validation_guidance_skip_layers and config.validation_guidance_skip_scale == 0:
        yield "validation_guidance_skip_layers does nothing: validation_guidance_skip_scale is 0"
    if not config.validation_guidance_skip_layers:
        idle = sorted(key for key in explicit if key.startswith("validation_guidance_skip_"))
        idle = [key for key in idle if key != "validation_guidance_skip_layers"]
        if idle:
            yield f"{', '.join(idle)} does nothing without validation_guidance_skip_layers"
        return
    for steps in dict.fromkeys(clip.settings.steps for clip in clips):
        first = int(config.validation_guidance_skip_layers_start * steps) + 1
        if first >= int(config.validation_guidance_skip_layers_stop * steps):
            yield (
                f"validation_guidance_skip_layers does nothing in {steps} steps: none lies between the fractions "
                f"{config.validation_guidance_skip_layers_start:g} and {config.validation_guidance_skip_layers_stop:g}"
            )


def refuse(config: SamplingConfig, spec: ModelSpec) -> None:
    """Raise ConfigError for blocks that the network does not have, all that are left out, or a window that is none."""
    start, stop = config.validation_guidance_skip_layers_start, config.validation_guidance_skip_layers_stop
    layers = config.validation_guidance_skip_layers
    errors = []
    if layers and start > stop:
        errors.append(
            ConfigError(
                f"validation_guidance_skip_layers_start is {start:g}, after validation_guidance_skip_layers_stop, "
                f"{stop:g}",
                remedy="set the start before the stop",
            )
        )
    blocks = min(network.blocks for network in spec.networks)
    if unknown := [each for each in layers or () if each >= blocks]:
        errors.append(
            ConfigError(
                f"validation_guidance_skip_layers names {', '.join(map(str, unknown))}, and {spec.flavour} has "
                f"{blocks} blocks",
                where="validation_guidance_skip_layers",
                allowed=f"0 to {blocks - 1}",
            )
        )
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
