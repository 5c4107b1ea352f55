"""The questions: what each asks, which flag answers it, and what an answer may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.configure import memory
from tuner.cli.configure.propose import TEACH
from tuner.config.coerce import coerce
from tuner.config.describe import allowed
from tuner.config.owners import KeyIndex, unknown_key
from tuner.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from tuner.selection import Catalog
    from tuner.spec import ModelSpec

BETWEEN = " | "
"""Between prompts in one line."""


@dataclass(frozen=True)
class Question:
    """One thing that a person knows."""

    name: str
    text: str
    allowed: str
    parse: Callable[[str], Any] = str.strip


def _teach(text: str) -> str:
    word = text.strip().casefold()
    found = [each for each in TEACH if word and each.startswith(word)]
    if len(found) != 1:
        raise ConfigError(f"{text!r} is none of them", where="--teach", allowed=TEACH, nearest=nearest(word, TEACH))
    return found[0]


def _clips(text: str) -> Path:
    folder = Path(text.strip()).expanduser()
    if not text.strip() or not folder.is_dir():
        raise DataError(f"there is no folder {text.strip()!r}", where="--clips", remedy="name the folder of the clips")
    return folder


def _card(text: str) -> str:
    memory.machine(text)
    return text.strip()


def _frames(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{text!r} is no number of frames", where="--frames", allowed="whole number, at least 1")
    return int(text)


def prompts_of(text: str) -> tuple[str, ...]:
    """Prompts written in one line."""
    return tuple(each.strip() for each in text.split(BETWEEN.strip()) if each.strip())


QUESTIONS = {
    each.name: each
    for each in (
        Question("teach", "What do you want to teach it?", ", ".join(TEACH), _teach),
        Question("trigger", "A word that stands for it in prompts, if you want one", "text, or -"),
        Question("clips", "Where are your clips?", "a folder of clips or pictures", _clips),
        Question("caption", "One caption for all files", "text; - takes the .txt files beside the clips"),
        Question("model", "Which model?", "the name of a flavour"),
        Question("base", "Where are its weights?", "a folder or hub repository; - is the model's own"),
        Question("card", "Which card?", "such as RTX 4090, a size such as 24G, or none", _card),
        Question("frames", "How many frames may a training clip have?", "whole number", _frames),
        Question(
            "prompts", "Which prompts should validation render?", f"text{BETWEEN}text, or - for proposals", prompts_of
        ),
    )
}


def parsed(name: str, text: str) -> Any:
    """The answer that ``text`` is; ``-`` is none. Raises TunerError."""
    return QUESTIONS[name].parse("" if text.strip() == "-" else text)


def models(catalog: Catalog) -> Mapping[str, ModelSpec]:
    """Every model that installed families know by name."""
    from tuner.builtin.adapter_formats.models import known

    return {spec.flavour: spec for spec in known()}


def family_of(model: str, known: Mapping[str, ModelSpec]) -> str:
    """The family that brings the flavour ``model``. Raises ConfigError with the nearest name for another."""
    if model not in known:
        raise ConfigError(
            f"no installed family has a model {model!r}", where="--model", allowed=known, nearest=nearest(model, known)
        )
    return known[model].family


def value_of(key: str, text: Any, index: KeyIndex) -> Any:
    """What ``text`` is as a value of a config key, in the type that the key has. Raises ConfigError."""
    from pydantic import TypeAdapter, ValidationError

    place = index.find(key)
    if place is None:
        raise unknown_key(key, index, "command line")
    value = coerce(text, place.field.annotation)
    if isinstance(value, dict | list) or value is None:
        return value
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(place.field.annotation or Any)
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        raise ConfigError(f"{key} cannot be {text!r}", where="command line", allowed=allowed(place.field)) from None
