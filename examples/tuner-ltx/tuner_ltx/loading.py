"""Building an LtxModel: the transformer without storage and a lazy source of its weights; encoders by phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner.blocks import install
from tuner.errors import ModelError
from tuner.model import Component, Network
from tuner_ltx import encode
from tuner_ltx.describe import TEXT_TOKENS, base_of, describe, local_folder, read_config
from tuner_ltx.model import LtxModel

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.spec import NetworkSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TIED = {"encoder.embed_tokens.weight"}
"""A twin of another tensor, which files leave out."""


def load(run: Run, frame_rate: float) -> LtxModel:
    """The configured model: transformer on the meta device, components not loaded.

    Raises ModelError for a repository that cannot be had and for files that are missing.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    core = run.config
    folder, spec = _fetch(run), run.spec or describe(core, frame_rate)
    dtype = DTYPES[core.base_model_default_dtype] if core.base_model_default_dtype else run.dtype
    network = build_network(spec.networks[0], read_config(core, "transformer"), folder / "transformer", dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True)
    return LtxModel(spec, [network], _components(folder, run), scheduler)


def _fetch(run: Run) -> Path:
    """The model's folder, downloaded first where it lies on the hub."""
    from huggingface_hub import snapshot_download

    folder, core = local_folder(run.config), run.config
    if folder is not None:
        return folder
    patterns = [f"{part}/{ending}" for part in PARTS for ending in ("*.json", "*.safetensors", "*.model")]
    try:
        return Path(snapshot_download(base_of(core), revision=core.revision, allow_patterns=patterns))
    except Exception as error:  # whatever the hub's client and its transports raise
        raise ModelError(f"cannot fetch it from the hub: {error}", where=base_of(core)) from error


def build_network(spec: NetworkSpec, config: dict[str, Any], folder: Path, dtype: torch.dtype) -> Network:
    """The transformer of ``config`` on the meta device, driven by the block stack; every parameter in ``dtype``."""
    from accelerate import init_empty_weights
    from diffusers import LTXVideoTransformer3DModel

    from tuner_ltx.stack import LtxStack

    with init_empty_weights(include_buffers=False):
        module: nn.Module = LTXVideoTransformer3DModel.from_config(config)
    stack = LtxStack(module)
    return Network(
        spec=spec,
        module=module,
        stack=stack,
        weights=partial(read_weights, weight_files(folder)),
        dtype_of=lambda name: dtype,
        trampoline=install(module, stack),
        feed_forwards={f"transformer_blocks.{index}.ff": block.ff for index, block in enumerate(stack.blocks)},  # type: ignore[misc]
        attention_processors=lambda: list(module.attn_processors.values()),  # type: ignore[operator, union-attr]
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part. Raises ModelError where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("there are no .safetensors files", where=folder, remedy="fetch the model again")
    return files


def read_weights(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of every tensor in ``files``, one in memory at a time. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read the weights: {error}", where=path, remedy="fetch the model again") from error


def _components(folder: Path, run: Run) -> dict[str, Component]:
    """Text encoder and VAE, neither of them loaded."""
    if run.config.text_encoder_1_precision != "no_change":
        run.log.warning("text_encoder_1_precision has no effect: T5 of LTX-Video is loaded as its files have it")
    text_dtype = torch.float32 if run.device.type == "cpu" or run.dtype == torch.float32 else torch.bfloat16
    tiled, sliced = run.config.vae_enable_tiling, run.config.vae_enable_slicing
    return {
        "text_encoder": Component(
            load=partial(load_text_encoder, folder, run.device, text_dtype),
            files=(*_files(folder / "text_encoder"), *sorted((folder / "tokenizer").iterdir())),
            settings={"dtype": str(text_dtype), "tokens": str(TEXT_TOKENS)},
            version=encode.TEXT_VERSION,
        ),
        "vae": Component(
            load=partial(load_vae, folder, run.device, tiled=tiled, sliced=sliced),
            files=_files(folder / "vae"),
            settings={"dtype": str(torch.float32), "tiled": str(tiled)},
            version=encode.VIDEO_VERSION,
        ),
    }


def load_text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> encode.TextEncoder:
    """T5 and its tokenizer, in evaluation mode on ``device``."""
    from transformers import AutoTokenizer, T5EncoderModel

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer: {error}", where=folder / "tokenizer") from error
    model = _filled(T5EncoderModel, folder / "text_encoder", dtype=dtype)
    return encode.TextEncoder(tokenizer, model.to(device), TEXT_TOKENS)


def load_vae(folder: Path, device: torch.device, *, tiled: bool = False, sliced: bool = False) -> Any:
    """The VAE in float32, in evaluation mode on ``device``."""
    from diffusers import AutoencoderKLLTXVideo

    vae = _filled(AutoencoderKLLTXVideo, folder / "vae", torch_dtype=torch.float32)
    if tiled:
        vae.enable_tiling()
    if sliced:
        vae.enable_slicing()
    return vae.to(device)


def _filled(kind: Any, folder: Path, **dtype: torch.dtype) -> Any:
    """The model in ``folder``, frozen. Raises ModelError where it cannot be read or tensors are missing."""
    try:
        model, found = kind.from_pretrained(
            folder, **dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"cannot read it: {error}", where=folder, remedy="fetch the model again") from error
    missing = set(found["missing_keys"]) - TIED
    if missing:
        raise ModelError(f"the weights lack {len(missing)} tensors, such as {min(missing)!r}", where=folder)
    return model.requires_grad_(False).eval()


def _files(folder: Path) -> tuple[Path, ...]:
    return (folder / "config.json", *weight_files(folder))
