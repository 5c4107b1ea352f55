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
from tuner_wan import encode, sources
from tuner_wan.flavours import TEXT_TOKENS
from tuner_wan.names import text_encoder_name
from tuner_wan.sources import STEMS, Part

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import BaseImageProcessor, CLIPVisionModel

    from tuner.config.keys import CoreConfig
    from tuner.run import Run
    from tuner.spec import ModelSpec

TILE, TILE_STRIDE = 256, 192
"""Pixels: the sides of a tile of the VAE, and how far apart tiles begin; what overlaps is blended."""
TIED = frozenset({"encoder.embed_tokens.weight"})
"""Twins of other tensors, which files leave out."""
SHOWN = 5
"""How many tensors an error names."""


@dataclass(frozen=True)
class ImageEncoder:
    """CLIP and its preprocessing, which are only used together."""

    processor: BaseImageProcessor
    model: CLIPVisionModel


def components(parts: Mapping[str, Part], spec: ModelSpec, run: Run) -> dict[str, Component]:
    """Text encoder, VAE and, where the flavour has one, image encoder; none of them loaded."""
    text_dtype = text_encoder_dtype(run.device, run.dtype)
    tokenizer = _folder(parts["tokenizer"])
    found = {
        "text_encoder": Component(
            load=partial(load_text_encoder, parts["text_encoder"], tokenizer, run.device, text_dtype),
            files=(*_files(parts["text_encoder"]), *_files_in(tokenizer)),
            settings={"dtype": str(text_dtype), "tokens": str(TEXT_TOKENS)},
            version=encode.TEXT_VERSION,
        ),
        "vae": Component(
            load=lambda: in_parts(load_vae(parts["vae"], run.device), run.config),
            files=_files(parts["vae"]),
            settings={"dtype": str(torch.float32)} | tiling_settings(run.config),
            version=encode.VIDEO_VERSION,
        ),
    }
    if "conditioning" in spec.encoders:
        processor = _folder(parts["image_processor"])
        found["image_encoder"] = Component(
            load=partial(load_image_encoder, parts["image_encoder"], processor, run.device),
            files=(*_files(parts["image_encoder"]), *_files_in(processor)),
            settings={"dtype": str(torch.float32)},
            version=encode.IMAGE_VERSION,
        )
    return found


def text_encoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16, UMT5's own, on an accelerator in mixed precision (float16 overflows in it); else float32."""
    return torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.bfloat16


def load_text_encoder(part: Part, tokenizer: Path, device: torch.device, dtype: torch.dtype) -> encode.TextEncoder:
    """UMT5 and its tokenizer, in evaluation mode on ``device``."""
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    try:
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:
        raise broken("tokenizer", error, tokenizer) from error
    if part.file is not None:
        config = UMT5Config.from_dict(sources.read_config(part) or {})
        model = _filled(partial(UMT5EncoderModel, config), part.file, _text_names, dtype)
    else:
        model = _from_folder(UMT5EncoderModel, part, dtype, ignored=TIED)
    # Some releases of transformers 5 leave the encoder's own embedding untied, that is, random.
    model.set_input_embeddings(model.get_input_embeddings())
    return encode.TextEncoder(words, _frozen(model, device), TEXT_TOKENS)


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


def _from_folder(kind: Any, part: Part, dtype: torch.dtype, ignored: frozenset[str] = frozenset()) -> Any:
    """The model in a folder of the diffusers layout. Raises ModelError where tensors are missing."""
    folder = _folder(part)
    named = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    try:
        model, found = kind.from_pretrained(
            folder, **{named: dtype}, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise broken(part.name.replace("_", " "), error, folder) from error
    missing = set(found["missing_keys"]) - ignored
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
        if name not in _tied(model) and _shape(tensors.get(name)) != shape
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


def _tied(model: nn.Module) -> frozenset[str]:
    """Names of tensors that are another one's twin, which files leave out."""
    return TIED if hasattr(model, "shared") else frozenset()


def _text_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {text_encoder_name(name): tensor for name, tensor in tensors.items()}


def _vae_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names; its own converter knows those of Wan's code."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    original = any(name.startswith(("encoder.middle.", "decoder.middle.")) for name in tensors)
    converted: dict[str, Tensor] = convert_wan_vae_to_diffusers(dict(tensors)) if original else tensors
    return converted


def _frozen(model: Any, device: torch.device) -> Any:
    return model.requires_grad_(False).eval().to(device)


def _folder(part: Part) -> Path:
    assert part.folder is not None, f"{part.name} was not fetched"
    return part.folder


def _files(part: Part) -> tuple[Path, ...]:
    """What decides an encoder's output: its config and its weights."""
    if part.file is not None:
        beside = () if part.beside is None else (_folder(part.beside) / sources.CONFIGS[part.name],)
        return (*beside, part.file)
    folder = _folder(part)
    return (folder / sources.CONFIGS[part.name], *sources.weight_files(folder, STEMS[part.name]))


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def broken(what: str, error: Exception, where: Path) -> ModelError:
    """The error for something on disk that cannot be read."""
    reason = str(error).strip().splitlines()
    return ModelError(
        f"cannot read the {what}: {reason[0] if reason else type(error).__name__}", where=where, remedy="fetch it again"
    )
