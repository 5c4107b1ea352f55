"""Rendering: diffusers' own ``LTXPipeline`` around the network in training, on cached prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuner import flow
from tuner_ltx.describe import check_sampler
from tuner_ltx.encode import padded
from tuner_ltx.model import unpack

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    from tuner.model import Network, SampleRequest
    from tuner.spec import ModelSpec


def sample(network: Network, spec: ModelSpec, scheduler_config: Mapping[str, Any], request: SampleRequest) -> Tensor:
    """Normalised latents (1, C, F', h, w), float32, of the clip that ``request`` describes.

    Exactly what ``LTXPipeline`` makes of the same weights, embeddings, scheduler and seed; the noise is drawn on the
    CPU, so that it does not depend on the device. Raises ConfigError for a sampler that the pipeline cannot use.
    """
    scheduler = make_scheduler(request.scheduler, scheduler_config, request.flow_shift)
    grid = spec.latents.shape(request.frames, request.height, request.width)[1:]
    if (tell := request.on_prediction) is not None:
        flow.watch(scheduler, lambda done, tokens: tell(done, unpack(tokens, grid)))
    prompt, prompt_mask = _prompt(request.prompt, network)
    negative, negative_mask = _prompt(request.negative, network) if request.guidance > 1 else (None, None)
    with torch.no_grad(), _no_registry_left(network.module):
        tokens: Tensor = _pipeline(network, spec, scheduler)(
            prompt_embeds=prompt,
            prompt_attention_mask=prompt_mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=negative_mask,
            width=request.width,
            height=request.height,
            num_frames=request.frames,
            frame_rate=spec.fps,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=_report(request.on_step),
        )[0]
    return unpack(tokens, grid)


def _pipeline(network: Network, spec: ModelSpec, scheduler: FlowMatchEulerDiscreteScheduler) -> LTXPipeline:
    from diffusers import LTXPipeline

    pipeline = LTXPipeline(transformer=network.module, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
    # Without a VAE the pipeline would assume its usual strides.
    pipeline.vae_temporal_compression_ratio = spec.latents.stride_time
    pipeline.vae_spatial_compression_ratio = spec.latents.stride_space
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(name: str, config: Mapping[str, Any], shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """The sampler called ``name``: with the model's own shift, by the size of the clip, or with a fixed ``shift``."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    check_sampler(name)
    options: dict[str, Any] = {"use_beta_sigmas": name == "euler-beta"}
    if shift is not None:
        options |= {"use_dynamic_shifting": False, "shift_terminal": None, "shift": shift}
    return FlowMatchEulerDiscreteScheduler.from_config(dict(config), **options)


def _prompt(prompt: Mapping[str, Tensor], network: Network) -> tuple[Tensor, Tensor]:
    """States (1, 128, D), in the dtype that the pipeline is to compute in, and mask (1, 128), on the device."""
    device = network.module.get_parameter("scale_shift_table").device
    one = {name: tensor[None].to(device) for name, tensor in prompt.items()}
    states, mask = padded(one, network.spec.text_tokens)
    return states.to(network.dtype_of("proj_in.weight")), mask


def _report(on_step: Callable[[int], None] | None) -> Callable[..., dict[str, Any]] | None:
    if on_step is None:
        return None

    def callback(pipeline: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(index + 1)
        return tensors

    return callback


@contextmanager
def _no_registry_left(module: nn.Module) -> Iterator[None]:
    """Take away the hook registry that a diffusers pipeline leaves on a network that had none."""
    had = hasattr(module, "_diffusers_hook")
    try:
        yield
    finally:
        if not had and hasattr(module, "_diffusers_hook"):
            del module._diffusers_hook
