"""Building a WanModel: the denoiser without storage and a lazy source of its weights; encoders by phase."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.blocks import install
from tuner.errors import ModelError
from tuner.model import Component, Network
from tuner.spec import ModelSpec, NetworkSpec
from tuner_wan import encode, sources
from tuner_wan.describe import choose, denoiser_config, describe, locate, sampler_shift
from tuner_wan.fetch import fetch
from tuner_wan.flavours import TEXT_TOKENS
from tuner_wan.model import WanModel
from tuner_wan.names import diffusers_name, is_original
from tuner_wan.sources import STEMS, Part

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from tuner.config.keys import CoreConfig
    from tuner.run import Run
    from tuner_wan import WanConfig

TILE, TILE_STRIDE = 256, 192
"""Pixels: the sides of a tile of the VAE, and how far apart tiles begin; what overlaps is blended."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load(run: Run, own: WanConfig | None = None) -> WanModel:
    """The configured model: networks on the meta device, components not loaded.

    Fetches what lies in hub repositories first. Raises ModelError for files that cannot be had, are
    incomplete, or turn out to differ from what ``describe_model`` said without them.
    """
    core = run.config
    flavour = choose(core)
    parts = fetch(locate(core, own, flavour))
    spec = describe(core, own)
    _check_described(run.spec, spec)
    dtype = DTYPES[core.base_model_default_dtype] if core.base_model_default_dtype else run.dtype
    networks = [
        build_network(each, denoiser_config(parts[each.name], flavour), parts[each.name], dtype)
        for each in spec.networks
    ]
    scheduler = sources.read_config(parts["scheduler"]) or {}
    return WanModel(spec, networks, _components(parts, run), scheduler, sampler_shift(parts, core, flavour))


def _check_described(before: ModelSpec | None, now: ModelSpec) -> None:
    """Refuse to go on with dimensions that the data was prepared for and the fetched files contradict."""
    if before is not None and (before.networks, before.latents) != (now.networks, now.latents):
        raise ModelError(
            f"the files of {now.base!r} do not have the dimensions of flavour {before.flavour!r}",
            allowed=str(before.networks[0]),
            remedy="start again: the fetched config.json will be read instead of the flavour's table",
        )


def build_network(spec: NetworkSpec, config: Mapping[str, Any], part: Part, dtype: torch.dtype) -> Network:
    """The denoiser of ``config`` on the meta device (rotary tables excepted), driven by the block stack.

    ``dtype`` is that of its matrices; modulation, norms and time embedder stay float32, as diffusers
    keeps them.
    """
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    from tuner_wan.stack import WanStack

    with init_empty_weights(include_buffers=False):
        module: nn.Module = WanTransformer3DModel.from_config(dict(config))
    stack = WanStack(module)
    return Network(
        spec=spec,
        module=module,
        stack=stack,
        weights=partial(read_weights, weight_paths(part), tuple(module._keys_to_ignore_on_load_unexpected or ())),  # type: ignore[arg-type]
        dtype_of=partial(parameter_dtype, dtype=dtype, kept=frozenset(module._keep_in_fp32_modules)),  # type: ignore[arg-type]
        trampoline=install(module, stack),
        feed_forwards={f"blocks.{index}.ffn": block.ffn for index, block in enumerate(stack.blocks)},  # type: ignore[misc]
        attention_processors=partial(_processors, module),
    )


def weight_paths(part: Part) -> list[Path]:
    """The safetensors files of a part that lies in a folder or a single file."""
    if part.folder is None:
        return [] if part.file is None else [part.file]
    return sources.weight_files(part.folder, STEMS[part.name])


def read_weights(files: Sequence[Path], ignored: Sequence[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(parameter name in diffusers, tensor on the CPU) of every tensor in ``files``, one in memory at a time.

    Names of Wan's own code are translated; names that match a pattern in ``ignored`` are left out.
    Raises ModelError for a file that is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
                translate = diffusers_name if any(map(is_original, names)) else str
                for name in names:
                    if not any(re.search(pattern, name) for pattern in ignored):
                        yield translate(name), file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _broken(path.name, error, path) from error


def parameter_dtype(name: str, *, dtype: torch.dtype, kept: frozenset[str]) -> torch.dtype:
    """float32 for parameters of the modules named in ``kept``, else ``dtype``: diffusers' own rule when it loads."""
    return torch.float32 if kept.intersection(name.split(".")) else dtype


def _processors(module: nn.Module) -> list[Any]:
    return list(module.attn_processors.values())  # type: ignore[operator, union-attr]


def _components(parts: Mapping[str, Part], run: Run) -> dict[str, Component]:
    text, tokenizer, vae = (_folder(parts[name]) for name in ("text_encoder", "tokenizer", "vae"))
    text_dtype = text_encoder_dtype(run.device, run.dtype)
    return {
        "text_encoder": Component(
            load=partial(load_text_encoder, text, tokenizer, run.device, text_dtype),
            files=(*_files(text, "text_encoder"), *sorted(path for path in tokenizer.iterdir() if path.is_file())),
            settings={"dtype": str(text_dtype), "tokens": str(TEXT_TOKENS)},
            version=encode.TEXT_VERSION,
        ),
        "vae": Component(
            load=lambda: in_parts(load_vae(vae, run.device), run.config),
            files=_files(vae, "vae"),
            settings={"dtype": str(torch.float32)} | tiling_settings(run.config),
            version=encode.VIDEO_VERSION,
        ),
    }


def text_encoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16, UMT5's own, on an accelerator in mixed precision (float16 overflows in it); else float32."""
    return torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.bfloat16


def load_text_encoder(folder: Path, tokenizer: Path, device: torch.device, dtype: torch.dtype) -> encode.TextEncoder:
    """UMT5 from ``folder`` and its tokenizer, in evaluation mode on ``device``."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    try:
        model, found = UMT5EncoderModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except Exception as error:
        raise _cannot_load("text encoder", error, folder) from error
    # Some releases of transformers 5 leave the encoder's own embedding untied, that is, random.
    model.set_input_embeddings(model.get_input_embeddings())
    _check_found(set(found["missing_keys"]) - {"encoder.embed_tokens.weight"}, folder)
    return encode.TextEncoder(words, _frozen(model, device), TEXT_TOKENS)


def load_vae(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The VAE from ``folder`` in float32, in evaluation mode on ``device``."""
    from diffusers import AutoencoderKLWan

    try:
        vae, found = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise _cannot_load("VAE", error, folder) from error
    _check_found(set(found["missing_keys"]), folder)
    return _frozen(vae, device)


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


def _frozen(model: Any, device: torch.device) -> Any:
    return model.requires_grad_(False).eval().to(device)


def _check_found(missing: set[str], folder: Path) -> None:
    """Refuse weights that lack tensors: the libraries would go on with random ones."""
    if missing:
        raise ModelError(
            f"the weights lack {len(missing)} tensors, such as {min(missing)!r}", where=folder, remedy="fetch it again"
        )


def _folder(part: Part) -> Path:
    assert part.folder is not None, f"{part.name} was not fetched"
    return part.folder


def _files(folder: Path, name: str) -> tuple[Path, ...]:
    return (folder / "config.json", *sources.weight_files(folder, STEMS[name]))


def _cannot_load(what: str, error: Exception, folder: Path) -> Exception:
    """The error to raise for a component that does not load; a device that is full stays what it is."""
    return error if isinstance(error, torch.OutOfMemoryError) else _broken(what, error, folder)


def _broken(what: str, error: Exception, where: Path) -> ModelError:
    reason = str(error).strip().splitlines()
    return ModelError(
        f"cannot read the {what}: {reason[0] if reason else type(error).__name__}", where=where, remedy="fetch it again"
    )
