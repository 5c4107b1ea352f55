"""What a Wan model is, from its config files or the table of flavours: no torch, no weights, no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_wan import costs, dimensions, sources
from tuner_wan.flavours import DEFAULT_FLAVOUR, FLAVOURS, TEXT_TOKENS, Flavour, named, of_repository, resembling
from tuner_wan.names import RENAME
from tuner_wan.sources import Part

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner_wan import WanConfig

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER_TARGETS = tuple(f"{attention}.{linear}" for attention in ("attn1", "attn2") for linear in ATTENTION_LINEARS)
TEXT_DIM = 4096
"""Width of UMT5-XXL."""
PATCH = (1, 2, 2)
ENCODERS: dict[str, tuple[str, ...]] = {"text": ("text_encoder",), "video": ("vae",)}
IMAGE_ENCODERS: dict[str, tuple[str, ...]] = {"conditioning": ("image_encoder",)}
LABELS = {"transformer": "high_noise", "transformer_2": "low_noise"}
"""What people call the two experts."""
CONDITIONING_FRAMES = {"first_frame": ("first_frame",), "first_and_last_frame": ("first_frame", "last_frame")}


def describe(core: CoreConfig, own: WanConfig | None = None) -> ModelSpec:
    """The ModelSpec of the configured Wan model.

    Dimensions come from the config.json files of local folders and of repositories in the hub's local
    cache, else from the flavour's table. Raises ModelError for folders that are missing or incomplete
    and ConfigError for flavours that are unknown and for parts that do not fit.
    """
    flavour = choose(core)
    parts = locate(core, own, flavour)
    sources.check_whole(parts.values())
    denoisers = {name: denoiser_config(parts[name], flavour) for name, _ in flavour.networks}
    vae = sources.read_config(parts["vae"]) or {}
    latents = LatentGeometry(
        channels=vae.get("z_dim", flavour.latents.channels),
        stride_time=vae.get("scale_factor_temporal", flavour.latents.stride_time),
        stride_space=vae.get("scale_factor_spatial", flavour.latents.stride_space),
    )
    boundary = _boundary(parts, flavour)
    networks = tuple(
        replace(
            _network(name, denoisers[name], flavour, _range(noise, flavour, boundary)),
            per_token_times=_condition(own, flavour) == "clean_first_frame",
        )
        for name, noise in flavour.networks
    )
    for network in networks:
        _check_fit(parts, denoisers[network.name], network, latents, flavour)
    return ModelSpec(
        family="wan",
        flavour=flavour.name,
        license="apache-2.0",
        base=parts[networks[0].name].base,
        networks=networks,
        latents=latents,
        size_multiple=latents.stride_space * networks[0].patch[1],
        fps=flavour.fps,
        adapter_targets=ADAPTER_TARGETS,
        encoders=ENCODERS | (IMAGE_ENCODERS if flavour.image_context else {}),
        conditioning_frames=CONDITIONING_FRAMES[flavour.condition] if flavour.image_context else (),
        components=costs.components(latents.channels, image_context=flavour.image_context),
        condition=_condition(own, flavour),
        boundary=boundary,
        switch_steps=own.wan_expert_switch_steps if own is not None and len(networks) > 1 else 0,
        rename=RENAME,
        defaults=_defaults(parts, core, flavour),
    )


def known(core: CoreConfig) -> list[ModelSpec]:
    """Every flavour, as published; ``core`` names none."""
    return [describe(core.model_copy(update={"model_flavour": name})) for name in FLAVOURS]


def locate(core: CoreConfig, own: WanConfig | None, flavour: Flavour) -> dict[str, Part]:
    """Every part of the configured model by name, the expert that is only validated with among them."""
    if own is not None and own.wan_validation_load_other_stage and flavour.expert is not None:
        flavour = replace(flavour, expert="both")
    return sources.locate_parts(core, flavour, own.pretrained_transformer_2_model_name_or_path if own else None)


def choose(core: CoreConfig) -> Flavour:
    """The configured flavour: by name, by known repository, by what the files look like, or the default.

    Raises ConfigError for a name that is unknown or contradicts the repository, and for a model with two
    experts where none is named.
    """
    base = core.pretrained_model_name_or_path
    if core.model_flavour is not None:
        return named(core.model_flavour, base)
    known = of_repository(base)
    flavour = known[0] if known else FLAVOURS[DEFAULT_FLAVOUR]
    if base is not None and not known:
        flavour = _looks_like(core, flavour) or flavour
    if flavour.experts > 1:
        names = [name for name, each in FLAVOURS.items() if each.repository == flavour.repository]
        raise ConfigError(
            "this model has two experts, and model_flavour does not say which to train",
            where=f"pretrained_model_name_or_path = {base}",
            allowed=names,
            remedy="set model_flavour to one of them",
        )
    return flavour


def _looks_like(core: CoreConfig, assumed: Flavour) -> Flavour | None:
    """The flavour that the model's config files look like; None where none can be read yet, or for a stranger."""
    parts = sources.locate_parts(core, assumed)
    config = sources.read_config(parts["transformer"]) if not sources.missing(parts["transformer"]) else None
    if config is None:
        return None
    index = sources.read_model_index(parts["scheduler"].base, parts["scheduler"].revision) or {}
    alike = resembling(
        config.get("in_channels", assumed.in_channels),
        image_context=config.get("image_dim") is not None,
        last_frame=config.get("pos_embed_seq_len") is not None,
        experts=2 if (index.get("transformer_2") or [None])[0] is not None else 1,
    )
    heads = config.get("num_attention_heads")
    return next((each for each in alike if each.heads == heads), alike[0] if alike else None)


def denoiser_config(part: Part, flavour: Flavour) -> dict[str, Any]:
    """A denoiser's config.json; for a single file that of the base beside it; ``{}`` where none can be read yet."""
    config = sources.read_config(part)
    if config is None:
        return {}
    if config.get("_class_name") != "WanTransformer3DModel":
        raise sources.refuse(
            f"the denoiser is a {config.get('_class_name', 'model without a class name')}, not a WanTransformer3DModel",
            part,
            f"use a Wan model in the diffusers layout, such as {flavour.repository}",
        )
    return config


def _network(name: str, config: Mapping[str, Any], flavour: Flavour, sigma_range: tuple[float, float]) -> NetworkSpec:
    heads = config.get("num_attention_heads", flavour.heads)
    dim = heads * config["attention_head_dim"] if config else flavour.dim
    ffn_dim, image = config.get("ffn_dim", flavour.ffn_dim), flavour.image_context
    network = NetworkSpec(
        name=name,
        blocks=config.get("num_layers", flavour.blocks),
        dim=dim,
        heads=heads,
        ffn_dim=ffn_dim,
        text_dim=config.get("text_dim", TEXT_DIM),
        text_tokens=TEXT_TOKENS,
        in_channels=config.get("in_channels", flavour.in_channels),
        patch=tuple(config.get("patch_size", PATCH)),
        label=LABELS.get(name, "") if flavour.expert else "",
        sigma_range=sigma_range,
        linears=dimensions.linears(dim, ffn_dim, image_context=image),
        small=dimensions.small(dim, ffn_dim, image_context=image),
        image_tokens=flavour.image_tokens,
        activations=costs.activations,
    )
    out_channels = config.get("out_channels") or flavour.latent_channels
    frequencies = config.get("freq_dim", dimensions.FREQUENCIES)
    image_dim = config.get("image_dim", dimensions.IMAGE_DIM) if flavour.image_context else None
    positions = flavour.image_tokens if flavour.condition == "first_and_last_frame" else 0
    return replace(
        network,
        other=dimensions.other(
            network, out_channels, frequencies=frequencies, image_dim=image_dim, image_positions=positions
        ),
        weights=dimensions.weights(network, out_channels, frequencies=frequencies, image_dim=image_dim),
    )


def _boundary(parts: Mapping[str, Part], flavour: Flavour) -> float | None:
    """The noise level at which the experts change: the model's own, else the flavour's."""
    if flavour.expert is None:
        return None
    index = sources.read_model_index(parts["scheduler"].base, parts["scheduler"].revision) or {}
    return float(index.get("boundary_ratio") or flavour.boundary or 0.0)


def _range(noise: tuple[float, float], flavour: Flavour, boundary: float | None) -> tuple[float, float]:
    """An expert's noise levels, with the model's own boundary in the place of the flavour's."""
    low, high = (boundary if boundary is not None and end == flavour.boundary else end for end in noise)
    return low, high


def _condition(own: WanConfig | None, flavour: Flavour) -> str:
    """What the denoiser is given beside the text; TI2V may also be trained from text alone."""
    if flavour.condition == "clean_first_frame" and own is not None and own.wan_condition == "none":
        return "none"
    return flavour.condition


def _check_fit(
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    network: NetworkSpec,
    latents: LatentGeometry,
    flavour: Flavour,
) -> None:
    """Refuse parts that do not belong to the flavour, or not to each other."""
    part = parts[network.name]
    image_context = config.get("image_dim") is not None if config else flavour.image_context
    last_frame = config.get("pos_embed_seq_len") is not None
    expected_last = flavour.condition == "first_and_last_frame"
    if (network.in_channels, image_context) != (flavour.in_channels, flavour.image_context) or (
        config and last_frame != expected_last
    ):
        what = f"{network.in_channels} input channels{' and an image context' if image_context else ''}"
        alike = _alike(network.in_channels, image_context, last_frame, flavour.experts)
        raise sources.refuse(
            f"the denoiser has {what}, {f'like flavour {alike[0].name!r}' if alike else 'which no flavour of Wan has'}",
            part,
            f"set model_flavour to {alike[0].name!r}, or use the weights of {flavour.repository} for {flavour.name!r}"
            if alike
            else f"{flavour.name} has {flavour.in_channels}: check the path",
        )
    if latents.channels != flavour.latent_channels:
        raise sources.refuse(
            f"the VAE makes {latents.channels} channels and the denoiser takes {flavour.latent_channels}",
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


def _alike(in_channels: int, image_context: bool, last_frame: bool, experts: int) -> list[Flavour]:
    """Flavours of these properties, those with as many experts before all others."""
    found = resembling(in_channels, image_context=image_context, last_frame=last_frame, experts=None)
    return sorted(found, key=lambda flavour: flavour.experts != experts)


def _defaults(parts: Mapping[str, Part], core: CoreConfig, flavour: Flavour) -> dict[str, object]:
    """What this flavour's authors render with, where the user does not say."""
    return {
        "validation_flow_shift": sampler_shift(parts, core, flavour),
        "validation_num_inference_steps": flavour.steps,
        "validation_guidance": flavour.guidance,
        "validation_guidance_2": flavour.guidance_2,
    }


def sampler_shift(parts: Mapping[str, Part], core: CoreConfig, flavour: Flavour) -> float:
    """Shift of the validation sampler: the scheduler config's own, else the training shift, else the flavour's."""
    config = sources.read_config(parts["scheduler"]) or {}
    shift = config.get("flow_shift") or config.get("shift") or core.flow_schedule_shift or flavour.flow_shift
    return float(shift)
