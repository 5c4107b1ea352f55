"""Where the parts of a model come from: subfolders of local folders, hub repositories, single files.

No torch here: ``tuner check`` looks at all of this before any weight is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, ModelError
from tuner_wan.flavours import ORIGINAL_LAYOUTS, Flavour

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

DENOISER_STEM = "diffusion_pytorch_model"
ENCODER_STEM = "model"
STEMS = {
    "transformer": DENOISER_STEM,
    "transformer_2": DENOISER_STEM,
    "vae": DENOISER_STEM,
    "text_encoder": ENCODER_STEM,
    "image_encoder": ENCODER_STEM,
}
"""Part to the name of its weight file, without suffix and shard number."""
CONFIGS = {
    "transformer": "config.json",
    "transformer_2": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_encoder": "config.json",
    "image_processor": "preprocessor_config.json",
}
BASE_KEY = "pretrained_model_name_or_path"
SAFETENSORS = ".safetensors"
SINGLE_FILES = ("transformer", "transformer_2", "vae", "text_encoder")
"""Parts whose weights may be a single file."""
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
"""A tokenizer has one of these."""
_WORDS = r"(?:[A-Za-z0-9]+[._-])*[A-Za-z0-9]+"
PLAIN_REPOSITORY = re.compile(rf"(?=.{{1,90}}$){_WORDS}/{_WORDS}(?<!\.git)")
"""Owners' repositories on the hub: some of what its rules allow."""


@dataclass(frozen=True)
class Part:
    """One part of the model and where it lies."""

    name: str
    """Its subfolder in the diffusers layout: ``transformer``, ``vae``, ``tokenizer`` …"""
    key: str
    """The config key that says where."""
    base: str
    """A local folder, a single file or a hub repository, as the config has it."""
    subfolder: str
    revision: str | None
    folder: Path | None
    """The folder of this part; None while it is only on the hub, and for a single file."""
    file: Path | None = None
    """The single ``.safetensors`` file it is read from."""
    beside: Part | None = None
    """The base's own part of this name: its config.json goes with a single file of weights."""

    @property
    def on_hub(self) -> bool:
        """Whether it has to be fetched from a hub repository."""
        return self.folder is None and self.file is None

    def patterns(self) -> list[str]:
        """The files of the repository that this part needs, as glob patterns."""
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        if self.name not in STEMS:
            return [f"{prefix}*"]
        return [f"{prefix}config.json", f"{prefix}{STEMS[self.name]}*.safetensors", f"{prefix}*.safetensors.index.json"]


def locate_parts(core: CoreConfig, flavour: Flavour, second: str | None = None) -> dict[str, Part]:
    """Every part by name, from ``pretrained_model_name_or_path`` and the keys that override it.

    Arguments
        second: where the low-noise expert lies, if not where everything else does.
    Raises ModelError for a path that is neither a folder nor the name of a repository, and for folders
    in the layout of Wan's own code.
    """
    base = core.pretrained_model_name_or_path or flavour.repository
    overrides = {
        "transformer": ("pretrained_transformer_model_name_or_path", core.pretrained_transformer_model_name_or_path),
        "vae": ("pretrained_vae_model_name_or_path", core.pretrained_vae_model_name_or_path),
        "text_encoder": ("pretrained_t5_model_name_or_path", core.pretrained_t5_model_name_or_path),
    }
    overrides["transformer_2"] = (
        ("pretrained_transformer_2_model_name_or_path", second) if second else overrides["transformer"]
    )
    if Path(core.pretrained_t5_model_name_or_path or "").suffix != SAFETENSORS:
        overrides["tokenizer"] = overrides["text_encoder"]
    parts = []
    for name in _part_names(flavour):
        own = _part(name, BASE_KEY, base, name, flavour, core.revision)
        key, override = overrides.get(name, (BASE_KEY, None))
        subfolder = _subfolder(name, core.pretrained_transformer_subfolder, override or base)
        if override is None and subfolder == name:
            parts.append(own)
        else:
            revision = None if override else core.revision
            part = _part(name, key if override else BASE_KEY, override or base, subfolder, flavour, revision)
            parts.append(replace(part, beside=own))
    return {part.name: part for part in parts}


def _part_names(flavour: Flavour) -> list[str]:
    image = ["image_encoder", "image_processor"] if flavour.image_context else []
    return [*(name for name, _ in flavour.networks), "vae", "text_encoder", "tokenizer", "scheduler", *image]


def _subfolder(name: str, wish: str | None, place: str) -> str:
    """Where part ``name`` lies in ``place``; ``pretrained_transformer_subfolder`` is for the denoisers."""
    if name not in ("transformer", "transformer_2"):
        return name
    if wish is None or wish.lower() in ("", "none"):
        return ""
    if wish != "transformer" or name == "transformer":
        return wish
    # A folder with one denoiser, given for the second expert, has it under the usual name.
    folder = Path(place).expanduser()
    return wish if folder.is_dir() and not (folder / name).is_dir() and (folder / wish).is_dir() else name


def _part(name: str, key: str, base: str, subfolder: str, flavour: Flavour, revision: str | None) -> Part:
    path = Path(base).expanduser()
    if path.is_dir():
        _refuse_original_layout(path, key, flavour)
        return Part(name, key, base, subfolder, revision, path / subfolder)
    if path.is_file():
        if name not in SINGLE_FILES or path.suffix != SAFETENSORS:
            raise ModelError(
                f"{key} is the file {base!r}",
                allowed="a folder or a hub repository; a single .safetensors file only for a denoiser, the VAE or "
                "the text encoder",
            )
        return Part(name, key, base, subfolder, revision, None, path)
    _check_repository(base, key, flavour)
    return Part(name, key, base, subfolder, revision, None)


def _check_repository(base: str, key: str, flavour: Flavour) -> None:
    """Refuse what is no repository name either, and repositories in the original layout."""
    if not _is_repository(base) or Path(base).suffix in (".safetensors", ".pth", ".json"):
        raise ModelError(
            f"{key} {base!r} does not exist",
            where=Path(base).expanduser().absolute(),
            allowed="a folder in the diffusers layout, or a hub repository such as " + flavour.repository,
        )
    original = ORIGINAL_LAYOUTS.get(base.partition("/")[2])
    if original is not None:
        raise _original_layout(base, key, original)


def _is_repository(name: str) -> bool:
    """Whether ``name`` is that of an owner's repository, by the hub's rules."""
    if PLAIN_REPOSITORY.fullmatch(name):
        return True
    # The library's own check takes a ninth of `tuner plan` to import: it is asked where the name is unusual.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _refuse_original_layout(folder: Path, key: str, flavour: Flavour) -> None:
    if any(folder.glob("*.pth")) or (folder / "high_noise_model").is_dir():
        raise _original_layout(str(folder), key, ORIGINAL_LAYOUTS.get(folder.name, flavour.repository))


def _original_layout(base: str, key: str, repository: str) -> ModelError:
    return ModelError(
        f"{base!r} is in the layout of Wan's own code (.pth text encoder and VAE)",
        where=key,
        allowed="the diffusers layout, with subfolders transformer, vae, text_encoder and tokenizer",
        remedy=f"use the repository {repository} instead",
    )


def check_whole(parts: Iterable[Part]) -> None:
    """Raise one ModelError that names every file which local parts lack."""
    lacking = [str(path) for part in parts for path in missing(part)]
    if lacking:
        raise ModelError(
            f"the base model lacks {len(lacking)} file{'s' if len(lacking) > 1 else ''}",
            where=", ".join(lacking),
            remedy="fetch it again whole, or check pretrained_model_name_or_path and the keys that override it",
        )


def missing(part: Part) -> list[Path]:
    """The files that a local part lacks."""
    if part.file is not None and part.beside is not None and part.beside.folder is not None:
        config = part.beside.folder / CONFIGS[part.name]
        return [] if config.is_file() else [config]
    if part.folder is None:
        return []
    if not part.folder.is_dir():
        return [part.folder]
    lacking = [] if (part.folder / CONFIGS[part.name]).is_file() else [part.folder / CONFIGS[part.name]]
    if part.name in STEMS:
        lacking += [path for path in weight_files(part.folder, STEMS[part.name]) if not path.is_file()]
    elif part.name == "tokenizer" and not any((part.folder / name).is_file() for name in TOKENIZER_FILES):
        lacking.append(part.folder / "tokenizer.json")
    return lacking


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a folder, in reading order; those of the index whether they exist or not.

    Without an index it is ``<stem>.safetensors``, or the only ``.safetensors`` there is. Raises
    ModelError for weights in pickle formats, which are never read, and for a broken index.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelError("the index of the weights has no weight_map", where=index, remedy="fetch it again")
        return [folder / name for name in sorted(set(shards.values()))]
    whole = folder / f"{stem}.safetensors"
    candidates = sorted(folder.glob("*.safetensors"))
    if not whole.is_file() and len(candidates) == 1:
        return candidates
    if not candidates and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]):
        raise ModelError(
            f"{pickled[0].name!r} is a pickle, which is never read",
            where=folder,
            allowed="weights as .safetensors",
            remedy="convert it, or take the model from its diffusers repository",
        )
    return [whole]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError that names the file when it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path.name!r}: {error}", where=path, remedy="fetch it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path.name!r} holds no JSON object", where=path, remedy="fetch it again")
    return data


def read_config(part: Part) -> dict[str, Any] | None:
    """The part's config: from its folder, or from the hub's local cache; None where it would have to be fetched."""
    name = CONFIGS[part.name]
    if part.folder is not None:
        return read_json(part.folder / name)
    if part.file is not None:
        return None if part.beside is None else read_config(part.beside)
    return _cached(part, f"{part.subfolder}/{name}" if part.subfolder else name)


def read_model_index(base: str, revision: str | None) -> dict[str, Any] | None:
    """The pipeline's ``model_index.json``, where it can be read without a download."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        path = folder / "model_index.json"
        return read_json(path) if path.is_file() else None
    return _cached(Part("index", "pretrained_model_name_or_path", base, "", revision, None), "model_index.json")


def _cached(part: Part, filename: str) -> dict[str, Any] | None:
    from huggingface_hub import constants

    # The hub's own function takes a tenth of a second to import: it is asked only where there is something to find.
    if not Path(constants.HF_HUB_CACHE, f"models--{part.base.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(part.base, filename, revision=part.revision)
    return read_json(Path(path)) if isinstance(path, str) else None


def refuse(problem: str, part: Part, remedy: str) -> ConfigError:
    """The error for a part that is whole and does not fit."""
    return ConfigError(problem, where=f"{part.key} = {part.base}", remedy=remedy)


def folder_of(part: Part) -> Path:
    """The folder of a part that is no single file and on this machine."""
    assert part.folder is not None, f"{part.name} was not fetched"
    return part.folder


def broken(what: str, error: Exception, where: Path) -> ModelError:
    """The error for something on disk that cannot be read."""
    reason = str(error).strip().splitlines()
    return ModelError(
        f"cannot read the {what}: {reason[0] if reason else type(error).__name__}", where=where, remedy="fetch it again"
    )
