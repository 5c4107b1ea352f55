"""``tuner convert``: the same updates in another format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tuner.builtin.adapter_file import AdapterFile, load, recognise, save
from tuner.builtin.adapter_formats import models
from tuner.builtin.adapter_formats.compress import Errors, limited
from tuner.errors import CheckpointError, ConfigError, nearest


@dataclass(frozen=True)
class Done:
    """What a command did."""

    path: Path
    keys: int
    notes: tuple[str, ...] = ()
    errors: Errors | None = None
    """what a decomposition lost, by module"""
    fits: tuple[str, ...] = ()
    """what the model is called"""


def convert(
    source: Path,
    to: str,
    out: Path | None = None,
    *,
    rank: int | None = None,
    model: Path | None = None,
    force: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Done:
    """Write the adapter ``source`` in format ``to``.

    Arguments
        out: the new file; beside the old one, with the format in its name, when None.
        rank: make every matrix a LoRA of at most this rank.
        model: the base that the file is for, where it is none that is known.
        progress: called for every module that is decomposed.

    Raises CheckpointError for a file that is another model's, or that ``to`` cannot hold; ConfigError for a wrong
    choice. Nothing is overwritten unless ``force``.
    """
    check_format(to)
    tensors, metadata = load(source)
    out = out or source.with_name(f"{source.name.removesuffix('.safetensors')}.{to}.safetensors")
    check_out(out, force, source)
    target, file = models.fitting(tensors, metadata, models.targets(model), source)
    errors: Errors | None = None
    if rank is not None:
        file, errors = limited(file, target.shapes, rank, progress)
    form = recognise(tensors, models.formats(), source)
    return replace(
        write(file, target, to, out), errors=errors, notes=(f"{source.name} is of format {form}", *file.notes)
    )


def write(file: AdapterFile, target: models.Target, to: str, out: Path) -> Done:
    """Write what a file says; the keys are read back before anything is on disk."""
    form = models.formats()[to]
    held, metadata = form.write(file, target.spec)
    again = form.read(held, metadata, target.spec, target.shapes)
    if again.unread or again.updates.keys() != file.updates.keys():
        first = ", ".join([*again.unread, *(file.updates.keys() - again.updates.keys())][:3])
        raise CheckpointError(f"the new file would not read back: {first}", where=to)
    save(held, metadata, out)
    return Done(out, len(held), fits=target.labels)


def check_format(to: str) -> None:
    """Raise ConfigError for a format that cannot be written."""
    known = [name for name in models.formats() if name != "peft"]
    if to not in known:
        raise ConfigError(f"there is no format {to!r}", where="--to", allowed=known, nearest=nearest(to, known))


def check_out(out: Path, force: bool, *sources: Path) -> None:
    """Raise ConfigError rather than overwrite anything that was not meant."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"{str(out)!r} does not end in .safetensors", where="-o")
    if any(out.resolve() == each.resolve() for each in sources):
        raise ConfigError(f"{str(out)!r} is what is read", where="-o", remedy="choose another name")
    if out.exists() and not force:
        raise ConfigError(f"{str(out)!r} exists", where="-o", remedy="choose another name, or add --force")
