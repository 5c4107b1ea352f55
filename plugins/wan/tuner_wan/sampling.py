"""Rendering: diffusers' own ``WanPipeline`` around the network in training, on cached prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner import flow
from tuner.errors import ConfigError, nearest
from tuner_wan.conditions import CLEAN, CLEAN_LATENT
from tuner_wan.encode import pad_states
from tuner_wan.experts import Pair, one_resident
from tuner_wan.sampling_guidance import guided

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from tuner.model import Network, SampleRequest
    from tuner.spec import ModelSpec

TRAIN_TIMES = 1000


def sample(
    network: Network,
    spec: ModelSpec,
    scheduler_config: Mapping[str, Any],
    request: SampleRequest,
    *,
    flow_shift: float,
    pair: Pair | None = None,
) -> Tensor:
    """Normalised latents (1, C, F', h, w), float32, of the clip that ``request`` describes.

    With a ``pair`` of experts both render, each on its side of the boundary; else ``network`` alone. Exactly what
    a plain ``WanPipeline`` makes of the same weights, embeddings, scheduler and seed, or a
    ``WanImageToVideoPipeline`` where the model takes frames; the noise is drawn on the CPU, so that it does not
    depend on the device.
    """
    scheduler = make_scheduler(request.scheduler, scheduler_config, flow_shift)
    if request.on_prediction is not None:
        flow.watch(scheduler, _telling(request.on_prediction, request))
    pipeline, images = _pipeline(spec, request, {"scheduler": scheduler, **_denoisers(network, pair)})
    with torch.no_grad(), _resident(network, pair), guided(request, scheduler, _scales(network, pair, request)):
        latents: Tensor = pipeline(
            prompt_embeds=_states(request.prompt, network),
            negative_prompt_embeds=_states(request.negative, network) if request.guidance > 1 else None,
            width=request.width,
            height=request.height,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_scale_2=request.guidance_2 if pair is not None else None,
            generator=torch.Generator().manual_seed(request.seed),
            max_sequence_length=network.spec.text_tokens,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=_report(request.on_step),
            **images,
        )[0]
    return latents


def _pipeline(spec: ModelSpec, request: SampleRequest, parts: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A pipeline without encoders and VAE, and what its call takes beside what all take."""
    pipeline: Any
    images: dict[str, Any] = {}
    # A picture has no frame after the one that would be given: it is rendered from text alone.
    if spec.frames_taken and not (spec.condition == CLEAN and request.frames == 1):
        from tuner_wan.sampling_image import image_arguments, make_pipeline

        pipeline, images = make_pipeline(spec, request, parts), image_arguments(request)
    else:
        from diffusers import WanPipeline

        pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, **parts)
    # Without a VAE the pipeline would assume Wan 2.1's strides.
    pipeline.vae_scale_factor_temporal = spec.latents.stride_time
    pipeline.vae_scale_factor_spatial = spec.latents.stride_space
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, images


def _scales(network: Network, pair: Pair | None, request: SampleRequest) -> list[tuple[nn.Module, float]]:
    """The denoisers, each with its guidance scale; 1 where the pipeline does not run the negative prompt."""
    if request.guidance <= 1:
        modules = [network.module] if pair is None else [pair.high.module, pair.low.module]
        return [(module, 1.0) for module in modules]
    if pair is None:
        return [(network.module, request.guidance)]
    low = request.guidance if request.guidance_2 is None else request.guidance_2
    return [(pair.high.module, request.guidance), (pair.low.module, low)]


def _denoisers(network: Network, pair: Pair | None) -> dict[str, Any]:
    if pair is None:
        return {"transformer": network.module}
    return {
        "transformer": pair.high.module,
        "transformer_2": pair.low.module,
        "boundary_ratio": pair.boundary,
    }


@contextmanager
def _resident(network: Network, pair: Pair | None) -> Iterator[None]:
    """With a pair: one of them on the device at a time, and the network in training back there afterwards."""
    with ExitStack() as stack:
        if pair is None:
            stack.enter_context(_no_registry_left(network.module))
        else:
            for expert in (pair.high, pair.low):
                stack.enter_context(_no_registry_left(expert.module))
            then = next(each for each in (pair.high, pair.low) if each.module is network.module)
            device = network.module.get_parameter("patch_embedding.weight").device
            stack.enter_context(one_resident(pair, device, then=then))
        yield


def make_scheduler(name: str, config: Mapping[str, Any], shift: float) -> SchedulerMixin:
    """The sampler called ``name`` for flow matching, its noise levels shifted by ``shift``.

    ``unipc`` takes what else it needs from the model's own scheduler ``config``. ``euler`` runs from
    sigma 1 down to 0.001, shifted once. ``euler-beta`` spaces its levels by a beta(0.6, 0.6)
    distribution between the same ends, so that the shift only moves the last one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if name == "unipc":
        return UniPCMultistepScheduler.from_config(
            dict(config),
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=TRAIN_TIMES,
            flow_shift=shift,
        )
    if name in ("euler", "euler-beta"):
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=TRAIN_TIMES, use_beta_sigmas=name == "euler-beta"
        )
        # Given to the constructor, the shift would be applied to the last noise level twice.
        scheduler.set_shift(shift)
        return scheduler
    known = ("unipc", "euler", "euler-beta")
    raise ConfigError(f"validation_noise_scheduler is {name!r}", allowed=known, nearest=nearest(name, known))


def _states(prompt: Mapping[str, Tensor], network: Network) -> Tensor:
    """The states (1, 512, D) of one cached prompt, on the network's device."""
    device = network.module.get_parameter("patch_embedding.weight").device
    return pad_states(prompt["states"].unsqueeze(0).to(device), network.spec.text_tokens)


def _report(on_step: Callable[[int], None] | None) -> Callable[..., dict[str, Any]] | None:
    if on_step is None:
        return None

    def callback(pipeline: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(index + 1)
        return tensors

    return callback


def _telling(tell: Callable[[int, Tensor], None], request: SampleRequest) -> Callable[[int, Tensor], None]:
    """``tell``, of latents whose first frame is the given one where that goes in without noise."""
    given = request.images.get(CLEAN_LATENT)

    def telling(done: int, latents: Tensor) -> None:
        if given is not None and request.frames > 1:
            latents[:, :, :1] = given.to(latents)
        tell(done, latents)

    return telling


@contextmanager
def _no_registry_left(module: nn.Module) -> Iterator[None]:
    """Take away the hook registry that a diffusers pipeline leaves on a network that had none."""
    had = hasattr(module, "_diffusers_hook")
    try:
        yield
    finally:
        if not had and hasattr(module, "_diffusers_hook"):
            del module._diffusers_hook
