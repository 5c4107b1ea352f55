"""What a Wan model is, from its config files or the table of flavours: no torch, no weights, no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_wan import sources
from tuner_wan.flavours import FLAVOURS, TEXT_TOKENS, Flavour, choose, coming_later, resembling, trained
from tuner_wan.names import RENAME
from tuner_wan.sources import Part

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig

NETWORK = "transformer"
ADAPTER_TARGETS = tuple(
    f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in ("to_q", "to_k", "to_v", "to_out.0")
)
TEXT_DIM = 4096
"""Width of UMT5-XXL."""
PATCH = (1, 2, 2)


def describe(core: CoreConfig) -> ModelSpec:
    """The ModelSpec of the configured Wan model.

    Dimensions come from the config.json files of local folders and of repositories in the hub's local
    cache, else from the flavour's table. Raises ModelError for folders that are missing or incomplete
    and ConfigError for flavours that are unknown or not trained yet and for parts that do not fit.
    """
    flavour = choose(core.model_flavour, core.pretrained_model_name_or_path)
    parts = sources.locate_parts(core, flavour)
    sources.check_whole(parts.values())
    denoiser = denoiser_config(parts, flavour)
    vae = sources.read_config(parts["vae"]) or {}
    latents = LatentGeometry(
        channels=vae.get("z_dim", flavour.latents.channels),
        stride_time=vae.get("scale_factor_temporal", flavour.latents.stride_time),
        stride_space=vae.get("scale_factor_spatial", flavour.latents.stride_space),
    )
    network = _network(denoiser, flavour)
    _check_experts(parts, flavour)
    _check_fit(parts, denoiser, network, latents, flavour)
    return ModelSpec(
        family="wan",
        flavour=flavour.name,
        base=parts["transformer"].base,
        networks=(network,),
        latents=latents,
        size_multiple=latents.stride_space * network.patch[1],
        fps=flavour.fps,
        adapter_targets=ADAPTER_TARGETS,
        encoders={"text": ("text_encoder",), "video": ("vae",)},
        rename=RENAME,
        defaults={"validation_flow_shift": sampler_shift(parts, core, flavour)},
    )


def denoiser_config(parts: Mapping[str, Part], flavour: Flavour) -> dict[str, Any]:
    """The denoiser's config.json; for a single file that of the base beside it; ``{}`` where none can be read yet."""
    part = parts["transformer"]
    config = sources.read_config(part if part.file is None else _beside(parts))
    if config is None:
        return {}
    if config.get("_class_name") != "WanTransformer3DModel":
        raise sources.refuse(
            f"the denoiser is a {config.get('_class_name', 'model without a class name')}, not a WanTransformer3DModel",
            part,
            f"use a Wan model in the diffusers layout, such as {flavour.repository}",
        )
    return config


def _beside(parts: Mapping[str, Part]) -> Part:
    """The base's own denoiser, whose config goes with a single file of weights."""
    scheduler = parts["scheduler"]
    folder = None if scheduler.folder is None else scheduler.folder.parent / NETWORK
    return Part(NETWORK, scheduler.key, scheduler.base, NETWORK, scheduler.revision, folder)


def _network(config: Mapping[str, Any], flavour: Flavour) -> NetworkSpec:
    heads = config.get("num_attention_heads", flavour.heads)
    return NetworkSpec(
        name=NETWORK,
        blocks=config.get("num_layers", flavour.blocks),
        dim=heads * config["attention_head_dim"] if config else flavour.dim,
        heads=heads,
        ffn_dim=config.get("ffn_dim", flavour.ffn_dim),
        text_dim=config.get("text_dim", TEXT_DIM),
        text_tokens=TEXT_TOKENS,
        in_channels=config.get("in_channels", flavour.in_channels),
        patch=tuple(config.get("patch_size", PATCH)),  # type: ignore[arg-type]
    )


def _check_experts(parts: Mapping[str, Part], flavour: Flavour) -> None:
    """Refuse the two-expert models of Wan 2.2: their parts look like those of 2.1."""
    scheduler = parts["scheduler"]
    index = sources.read_model_index(scheduler.base, scheduler.revision) or {}
    if (index.get("transformer_2") or [None])[0] is not None:
        looks_like = FLAVOURS["t2v-14b-2.2-high"]
        raise sources.refuse(
            f"this model has two denoisers and looks like flavour {looks_like.name!r}, not {flavour.name!r}",
            scheduler,
            f"{looks_like.name!r} comes with a later release of the wan plugin; train one of {', '.join(trained())}",
        )


def _check_fit(
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    network: NetworkSpec,
    latents: LatentGeometry,
    flavour: Flavour,
) -> None:
    """Refuse parts that do not belong to a text-to-video model, or not to each other."""
    part = parts["transformer"]
    image_context = config.get("image_dim") is not None
    if network.in_channels != flavour.in_channels or image_context != flavour.image_context:
        last_frame = config.get("pos_embed_seq_len") is not None
        found = resembling(network.in_channels, image_context=image_context, last_frame=last_frame)
        what = f"{network.in_channels} input channels{' and an image context' if image_context else ''}"
        if found is None:
            raise sources.refuse(
                f"the denoiser has {what}, which no flavour of Wan has",
                part,
                f"{flavour.name} has {flavour.in_channels}: check the path",
            )
        raise coming_later(found, where=f"{part.key} = {part.base}: the denoiser has {what}")
    if latents.channels != network.in_channels:
        raise sources.refuse(
            f"the VAE makes {latents.channels} channels and the denoiser takes {network.in_channels}",
            parts["vae"],
            f"use the VAE of {flavour.repository}",
        )
    text = sources.read_config(parts["text_encoder"]) or {}
    if text.get("d_model", network.text_dim) != network.text_dim:
        raise sources.refuse(
            f"the text encoder is {text['d_model']} wide and the denoiser takes {network.text_dim}",
            parts["text_encoder"],
            f"use the text encoder of {flavour.repository}",
        )


def sampler_shift(parts: Mapping[str, Part], core: CoreConfig, flavour: Flavour) -> float:
    """Shift of the validation sampler: the scheduler config's own, else the training shift, else the flavour's."""
    config = sources.read_config(parts["scheduler"]) or {}
    shift = config.get("flow_shift") or config.get("shift") or core.flow_schedule_shift or flavour.flow_shift
    return float(shift)
