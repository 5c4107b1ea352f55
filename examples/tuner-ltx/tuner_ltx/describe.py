"""What an LTX-Video model is, from its config files: no torch, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError, ModelError, nearest
from tuner.spec import LatentGeometry, Linear, ModelSpec, NetworkSpec

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

REPOSITORY = "Lightricks/LTX-Video"
TRANSFORMER = "LTXVideoTransformer3DModel"
TEXT_TOKENS = 128
"""As ``LTXPipeline`` pads its prompts."""
FEED_FORWARD = 4
"""The feed-forward is this many times as wide as the network: diffusers' own, not in config.json."""
FREQUENCIES = 256
"""Of the embedding of a time: diffusers' own, not in config.json."""
LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
EMBEDDER = "emb.timestep_embedder"
RENAME = (
    ("proj_in", "patchify_proj"),
    ("time_embed.linear", "adaln_single.linear"),
    *((f"time_embed.{EMBEDDER}.{each}", f"adaln_single.{EMBEDDER}.{each}") for each in ("linear_1", "linear_2")),
)
"""Modules that LTX's own code, and so files for others, call otherwise."""
SAMPLERS = ("euler", "euler-beta")
"""``LTXPipeline`` sets its own noise levels, which only these take."""


def describe(core: CoreConfig, frame_rate: float) -> ModelSpec:
    """The ModelSpec of the configured model. Raises ModelError where its config files are missing or another's."""
    _check_pipeline(core)
    transformer, vae = read_config(core, "transformer"), read_config(core, "vae")
    if transformer.get("in_channels") != vae["latent_channels"]:
        raise ModelError(
            f"the transformer takes {transformer.get('in_channels')} channels, the VAE makes {vae['latent_channels']}",
            where=base_of(core),
            remedy="take both from one model",
        )
    return ModelSpec(
        family="ltx",
        flavour="ltx-video",
        base=base_of(core),
        networks=(_network(transformer, where=base_of(core)),),
        latents=_geometry(vae),
        size_multiple=_geometry(vae).stride_space,
        fps=frame_rate,
        adapter_targets=tuple(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in LINEARS),
        encoders={"text": ("text_encoder",), "video": ("vae",)},
        rename=RENAME,
        defaults={
            "validation_noise_scheduler": "euler",
            "validation_num_inference_steps": 50,
            "validation_guidance": 3.0,
        },
    )


def check_sampler(name: str) -> None:
    """Raise ConfigError unless the pipeline can render with the sampler ``name``."""
    if name not in SAMPLERS:
        raise ConfigError(
            f"LTX-Video cannot be rendered with validation_noise_scheduler {name!r}",
            allowed=SAMPLERS,
            nearest=nearest(name, SAMPLERS),
        )


def _check_pipeline(core: CoreConfig) -> None:
    """Refuse LTX-Video 0.9.5 and later: their pipeline counts positions in time otherwise."""
    pipeline = read_json(core, "model_index.json").get("_class_name")
    if pipeline != "LTXPipeline":
        raise ModelError(
            f"the model is one of diffusers' {pipeline}",
            where=base_of(core),
            allowed="models of LTXPipeline: LTX-Video 0.9 and 0.9.1",
            remedy=f"use {REPOSITORY}",
        )


def _network(config: dict[str, Any], where: str) -> NetworkSpec:
    if config.get("_class_name") != TRANSFORMER:
        raise ModelError(f"the transformer is {config.get('_class_name')!r}", where=where, allowed=TRANSFORMER)
    if (config["patch_size_t"], config["patch_size"]) != (1, 1):
        raise ModelError("the transformer cuts latents into patches, which no LTX-Video does", where=where)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    wide = FEED_FORWARD * dim
    return NetworkSpec(
        name="transformer",
        blocks=config["num_layers"],
        dim=dim,
        heads=config["num_attention_heads"],
        ffn_dim=wide,
        text_dim=config["caption_channels"],
        text_tokens=TEXT_TOKENS,
        in_channels=config["in_channels"],
        patch=(1, 1, 1),
        linears=_linears(dim, wide),
        small=9 * dim + wide + 4 * dim + 6 * dim,  # biases, norms of queries and keys, modulation
        other=_outside_blocks(config, dim),
    )


def _linears(dim: int, wide: int) -> tuple[Linear, ...]:
    """The matrices of a block."""
    found = [Linear(f"attn1.{each}", dim, dim) for each in LINEARS]
    found += [Linear(f"attn2.{each}", dim, dim, "text" if each in ("to_k", "to_v") else "tokens") for each in LINEARS]
    return (*found, Linear("ff.net.0.proj", dim, wide), Linear("ff.net.2", wide, dim))


def _outside_blocks(config: dict[str, Any], dim: int) -> int:
    """Parameters of the layers around the blocks: latents in and out, times, text, the last modulation."""
    channels: int = config["in_channels"]
    text: int = config["caption_channels"]
    out: int = config.get("out_channels") or channels
    layers = [(channels, dim), (dim, out), (FREQUENCIES, dim), (dim, dim), (dim, 6 * dim), (text, dim), (dim, dim)]
    return sum((inputs + 1) * outputs for inputs, outputs in layers) + 2 * dim


def _geometry(vae: dict[str, Any]) -> LatentGeometry:
    """Strides as ``AutoencoderKLLTXVideo`` computes them: 8 in time and 32 in space."""
    halvings = sum(vae["spatio_temporal_scaling"])
    return LatentGeometry(
        channels=vae["latent_channels"],
        stride_time=vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings,
        stride_space=vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings,
    )


def base_of(core: CoreConfig) -> str:
    """The folder or hub repository of the model."""
    return core.pretrained_model_name_or_path or REPOSITORY


def local_folder(core: CoreConfig) -> Path | None:
    """The model's folder, or None for a hub repository. Raises ModelError for a path that leads nowhere."""
    base = base_of(core)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelError(f"there is no folder {base!r}", remedy=f"name a folder, or a repository such as {REPOSITORY}")
    return None


def read_config(core: CoreConfig, part: str) -> dict[str, Any]:
    """``config.json`` of a part. Raises ModelError without one."""
    return read_json(core, f"{part}/config.json")


def read_json(core: CoreConfig, file: str) -> dict[str, Any]:
    """A JSON file of the model's, from the folder or, a few kilobytes, from the hub. Raises ModelError without one."""
    folder = local_folder(core)
    try:
        path = folder / file if folder else _from_hub(core, file)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # whatever the hub's client and its transports raise
        raise ModelError(
            f"cannot read {file}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}",
            where=base_of(core),
            remedy=f"use a model in the diffusers layout, such as {REPOSITORY}",
        ) from error
    return config


def _from_hub(core: CoreConfig, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(base_of(core), file, revision=core.revision))
