"""The encoders of a Wan model: what each is made of, and loading it for its phase.

Weights are safetensors in a folder of the diffusers layout, or a single file with diffusers' names or those of
Wan's own code. Whatever a file lacks is an error: the libraries would go on with random tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.errors import ModelError, nearest
from tuner.model import Component
from tuner_wan import encode, sources, text_encoder
from tuner_wan.flavours import TEXT_TOKENS
from tuner_wan.sources import STEMS, Part, broken, folder_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import BaseImageProcessor, CLIPVisionModel

    from tuner.config.keys import CoreConfig
    from tuner.run import Run
    from tuner.spec import ModelSpec

TILE, TILE_STRIDE = 256, 192
"""Pixels: the sides of a tile of the VAE, and how far apart tiles begin; what overlaps is blended."""
SHOWN = 5
"""How many tensors an error names."""


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP and its preprocessing, which are only used together."""

    processor: BaseImageProcessor
    model: CLIPVisionModel


def components(parts: Mapping[str, Part], spec: ModelSpec, run: Run) -> dict[str, Component]:
    """Text encoder, VAE and, where the flavour has one, image encoder; none of them loaded."""
    found = {
        "text_encoder": _text_encoder(parts["text_encoder"], folder_of(parts["tokenizer"]), run),
        "vae": Component(
            load=lambda: in_parts(load_vae(parts["vae"], run.device), run.config),
            files=_files(parts["vae"]),
            settings={"dtype": str(torch.float32)} | tiling_settings(run.config),
            version=encode.VIDEO_VERSION,
        ),
    }
    if "conditioning" in spec.encoders:
        processor = folder_of(parts["image_processor"])
        found["image_encoder"] = Component(
            load=partial(load_image_encoder, parts["image_encoder"], processor, run.device),
            files=(*_files(parts["image_encoder"]), *_files_in(processor)),
            settings={"dtype": str(torch.float32)},
            version=encode.IMAGE_VERSION,
        )
    return found


def _text_encoder(part: Part, tokenizer: Path, run: Run) -> Component:
    """UMT5 as ``text_encoder_1_precision`` wants it."""
    reading = text_encoder.reading(part, tokenizer, run)
    precision = {} if reading.quantiser is None else {"precision": run.config.text_encoder_1_precision}
    return Component(
        load=reading.on_device,
        on_host=reading.on_host,
        files=(*_files(part), *_files_in(tokenizer)),
        settings={"dtype": str(reading.dtype), "tokens": str(TEXT_TOKENS)} | precision,
        version=encode.TEXT_VERSION,
    )


def load_vae(part: Part, device: torch.device) -> AutoencoderKLWan:
    """The VAE in float32, in evaluation mode on ``device``."""
    from diffusers import AutoencoderKLWan

    if part.file is not None:
        config = sources.read_config(part) or {}
        vae = _filled(partial(AutoencoderKLWan.from_config, config), part.file, _vae_names, torch.float32)
    else:
        vae = _from_folder(AutoencoderKLWan, part, torch.float32)
    return _frozen(vae, device)  # type: ignore[no-any-return]


def in_parts(vae: AutoencoderKLWan, core: CoreConfig) -> AutoencoderKLWan:
    """``vae``, working tile by tile (``vae_enable_tiling``) and clip by clip (``vae_enable_slicing``) where it should.

    Tiles change its output where a side is longer than one tile. Slicing changes nothing: clips are encoded and
    decoded one at a time in any case.
    """
    if core.vae_enable_tiling:
        vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
    if core.vae_enable_slicing:
        vae.enable_slicing()
    return vae


def tiling_settings(core: CoreConfig) -> dict[str, str]:
    """What tiling adds to the settings that the cache knows the VAE by."""
    return {"tiles": f"{TILE} every {TILE_STRIDE} pixels"} if core.vae_enable_tiling else {}


def load_image_encoder(part: Part, processor: Path, device: torch.device) -> ImageEncoder:
    """CLIP's vision tower in float32, in evaluation mode on ``device``, and its image processor."""
    from transformers import CLIPVisionModel

    try:  # by Pillow, whatever else is installed: other ways of resizing give other numbers
        from transformers import CLIPImageProcessorPil as CLIPImageProcessor
    except ImportError:  # before transformers 5, the only one
        from transformers import CLIPImageProcessor

    try:
        preparation = CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
    except Exception as error:
        raise broken("image processor", error, processor) from error
    model = _from_folder(CLIPVisionModel, part, torch.float32)
    return ImageEncoder(preparation, _frozen(model, device))


def _from_folder(kind: Any, part: Part, dtype: torch.dtype) -> Any:
    """The model in a folder of the diffusers layout. Raises ModelError where tensors are missing."""
    folder = folder_of(part)
    named = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    try:
        model, found = kind.from_pretrained(
            folder, **{named: dtype}, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise broken(part.name.replace("_", " "), error, folder) from error
    missing = found["missing_keys"]
    if missing:
        raise ModelError(
            f"the weights lack {len(missing)} tensors, such as {min(missing)!r}", where=folder, remedy="fetch it again"
        )
    return model


def _filled(
    build: Callable[[], nn.Module],
    file: Path,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
) -> Any:
    """A model with the weights of a single file. Raises ModelError naming the first tensors that do not fit."""
    from accelerate import init_empty_weights
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = rename(load_file(file))
    except (OSError, SafetensorError) as error:
        raise broken(file.name, error, file) from error
    with init_empty_weights(include_buffers=False):
        model = build()
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [
        f"{name}: {_shape(tensors.get(name))}, needed {shape}"
        for name, shape in expected.items()
        if _shape(tensors.get(name)) != shape
    ]
    strange = [name for name in tensors if name not in expected]
    if wrong or strange:
        raise ModelError(
            f"the file does not fit: {len(wrong)} tensors are missing or of another shape, {len(strange)} are strange",
            where=f"{file}: {'; '.join([*wrong, *strange][:SHOWN])}",
            nearest=nearest(strange[0], expected) if strange else None,
            remedy="use the file of this flavour, or the folder of its diffusers repository",
        )
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False, assign=True)
    return model


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "missing" if tensor is None else tuple(tensor.shape)


def _vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names; its own converter knows those of Wan's code."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    original = any(name.startswith(("encoder.middle.", "decoder.middle.")) for name in tensors)
    converted: dict[str, Tensor] = convert_wan_vae_to_diffusers(dict(tensors)) if original else tensors
    return converted


def _frozen(model: Any, device: torch.device) -> Any:
    return model.requires_grad_(False).eval().to(device)


def _files(part: Part) -> tuple[Path, ...]:
    """What decides an encoder's output: its config and its weights."""
    if part.file is not None:
        beside = () if part.beside is None else (folder_of(part.beside) / sources.CONFIGS[part.name],)
        return (*beside, part.file)
    folder = folder_of(part)
    return (folder / sources.CONFIGS[part.name], *sources.weight_files(folder, STEMS[part.name]))


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
