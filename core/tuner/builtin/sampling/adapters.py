"""Which adapter files ``tuner sample`` is given, and which denoiser each is for: known before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.builtin.adapter_file import AdapterFile, AdapterFormat, Shapes, load, recognise, refuse_unread
from tuner.errors import CheckpointError, ConfigError
from tuner.files import sha256_of
from tuner.spec import ModelSpec, NetworkSpec

OPTION = "--lora"
IN_FOLDER = "pytorch_lora_weights*.safetensors"
"""The names under which runs write adapters into checkpoints, the result, and ``ema/`` in them."""
WHOLE_NETWORK = "diffusion_pytorch_model*.safetensors"
_SHARE = re.compile(r"(.+)=([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?)")


@dataclass(frozen=True)
class Chosen:
    """One adapter file, for one denoiser."""

    path: Path
    network: str
    share: float
    """How much of it is added at strength 1."""
    sha256: str
    file: AdapterFile

    def record(self) -> dict[str, object]:
        """What is needed to find it again: nothing of the machine's folders."""
        return {"file": self.path.name, "sha256": self.sha256, "network": self.network, "share": self.share}


def choose(
    words: Sequence[str], spec: ModelSpec, shapes: Mapping[str, Shapes], formats: Mapping[str, AdapterFormat]
) -> list[Chosen]:
    """The adapters that ``words`` name: ``[NETWORK:]PATH[=SHARE]`` each, a file or a folder that holds some.

    Arguments
        shapes: of weights by module name, for each network.
        formats: of adapter files by name.
    Raises ConfigError for what is no adapter, or does not say which of two denoisers it is for; CheckpointError with
    the first keys that differ for another model's.
    """
    found = []
    for word in words:
        said, place, share = _parsed(word, spec)
        for path in _files(place):
            found.append(_read(path, said, share, spec, shapes, formats))
    return found


def _parsed(word: str, spec: ModelSpec) -> tuple[NetworkSpec | None, Path, float]:
    """The denoiser that is named, the path, and the share."""
    names = {name: network for network in spec.networks for name in (network.name, network.label) if name}
    prefix, colon, rest = word.partition(":")
    said = names.get(prefix) if colon else None
    path, share = rest if said is not None else word, 1.0
    match = _SHARE.fullmatch(path)
    if match and not Path(path).exists():
        path, share = match[1], float(match[2])
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(
            "there is no such file or folder",
            where=f"{OPTION} {word}",
            allowed="[NETWORK:]PATH or [NETWORK:]PATH=SHARE, such as my.safetensors=0.8"
            + (f"; networks: {', '.join(names)}" if len(spec.networks) > 1 else ""),
        )
    return said, place, share


def _files(place: Path) -> list[Path]:
    """The adapter files of a folder that a run wrote; a file is itself."""
    if place.is_file():
        return [place]
    held = sorted(place.glob("*.safetensors"))
    found = sorted(place.glob(IN_FOLDER)) or (held if len(held) == 1 else [])
    if found and not (len(found) == 1 and found[0].match(WHOLE_NETWORK)):
        return found
    whole = found or sorted(place.glob(f"*/{WHOLE_NETWORK}"))
    raise ConfigError(
        f"the folder holds {'a whole network' if whole else 'no adapter'}",
        where=f"{OPTION} {place}",
        allowed=f"a folder with {IN_FOLDER}, such as a checkpoint or ema/ in it",
        remedy="render it with --pretrained_transformer_model_name_or_path" if whole else "name the file itself",
    )


def _read(
    path: Path,
    said: NetworkSpec | None,
    share: float,
    spec: ModelSpec,
    shapes: Mapping[str, Shapes],
    formats: Mapping[str, AdapterFormat],
) -> Chosen:
    tensors, metadata = load(path)
    network = said or _meant(path, metadata, spec)
    form = formats[recognise(tensors, formats, path)]
    file = form.read(tensors, metadata, spec, shapes[network.name])
    try:
        refuse_unread(file, len(tensors), path)
    except CheckpointError as error:
        error.add_note(f"the model is {spec.flavour}, its network {network.label or network.name}")
        raise
    return Chosen(path, network.name, share, sha256_of(path), file)


def _meant(path: Path, metadata: Mapping[str, str], spec: ModelSpec) -> NetworkSpec:
    """The denoiser that a file is for by what it says of itself, or by its name. Raises ConfigError."""
    labels = {network.label: network for network in spec.networks if network.label}
    expert = metadata.get("tuner.expert")
    if expert is not None and labels:
        if expert not in labels:
            other = f"{next(iter(labels))}:{path.name}"
            raise ConfigError(
                f"the adapter was trained on the expert {expert!r}, which this model does not have",
                where=path,
                allowed=labels,
                remedy=f"choose the flavour with both experts; to add it all the same, {OPTION} {other}",
            )
        return labels[expert]
    if len(spec.networks) == 1:
        return spec.networks[0]
    by_name = {end: network for network in spec.networks for end in _ends(network)}
    named = next((network for end, network in by_name.items() if path.stem.endswith(f".{end}")), None)
    if named is None:
        choices = [network.label or network.name for network in spec.networks]
        raise ConfigError(
            f"the model has {len(choices)} experts, and the file does not say which one it is for",
            where=path,
            remedy="say it: " + " or ".join(f"{OPTION} {choice}:{path.name}" for choice in choices),
        )
    return named


def _ends(network: NetworkSpec) -> Iterator[str]:
    yield network.name
    if network.label:
        yield network.label
