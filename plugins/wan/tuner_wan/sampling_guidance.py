"""Skip-layer guidance and rescaling in diffusers' plain pipelines, which know neither.

The formula, and the steps at which it holds, are those of diffusers' own guider. The pipeline's prediction is exchanged
for the guider's where it goes into the scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from torch import Tensor, nn

if TYPE_CHECKING:
    from tuner.model import SampleRequest

# It warns of its interface at each guider that is made; which version is installed is up to us.
logging.getLogger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)


@contextmanager
def guided(request: SampleRequest, scheduler: Any, denoisers: Sequence[tuple[nn.Module, float]]) -> Iterator[None]:
    """Within, what ``denoisers`` predict is guided as ``request`` says before ``scheduler`` steps along it.

    Arguments
        denoisers: each module with its guidance scale; 1 where the negative prompt is not run.
    """
    if request.layer_skip is None and not request.rescale:
        yield
        return
    guidance = Guidance(request, denoisers)
    scheduler.step = guidance.wrapped(scheduler.step)
    with ExitStack() as hooks:
        for module, _ in denoisers:
            hooks.callback(module.register_forward_hook(guidance.ran, with_kwargs=True).remove)
        yield


class Guidance:
    """One clip's guidance: what the network predicted in this step, and the guider that combines it.

    A pipeline runs the prompt first and the negative prompt second in each step.
    """

    def __init__(self, request: SampleRequest, denoisers: Sequence[tuple[nn.Module, float]]) -> None:
        self._guiders = {id(module): _guider(request, scale) for module, scale in denoisers}
        self._layers = frozenset(request.layer_skip.layers if request.layer_skip else ())
        self._steps, self._done = request.steps, 0
        self._predicted: dict[str, Tensor] = {}
        self._guider: Any = None
        self._skipping = False

    def ran(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Keep a prediction (B, C, F', h, w); after the prompt's own, predict it again without some blocks."""
        if self._skipping:
            return
        if self._predicted:
            self._predicted["pred_uncond"] = output[0]
            return
        self._predicted["pred_cond"] = output[0]
        self._guider = self._guiders[id(module)]
        self._guider.set_state(self._done, self._steps, torch.empty(0))
        if self._guider._is_slg_enabled():
            self._predicted["pred_cond_skip"] = self._without_layers(module, args, kwargs)

    def wrapped(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """``step`` of a scheduler, taken along the guided prediction."""

        @wraps(step)
        def along(velocity: Tensor, time: Any, noisy: Tensor, *args: Any, **named: Any) -> Any:
            prediction: Tensor = self._guider.forward(**self._predicted).pred
            self._predicted = {}
            self._done += 1
            return step(prediction, time, noisy, *args, **named)

        return along

    def _without_layers(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        self._skipping = True
        try:
            with without_blocks(module, self._layers):
                prediction: Tensor = module(*args, **kwargs)[0]
        finally:
            self._skipping = False
        return prediction


def _guider(request: SampleRequest, scale: float) -> Any:
    skip = request.layer_skip
    return SkipLayerGuidance(
        guidance_scale=scale,
        skip_layer_guidance_scale=skip.scale if skip else 0.0,
        skip_layer_guidance_start=skip.start if skip else 0.0,
        skip_layer_guidance_stop=skip.stop if skip else 0.0,
        # Never applied: leaving out a block is up to the block driver, which knows where its weights are.
        skip_layer_config=LayerSkipConfig(indices=list(skip.layers) if skip else [0]),
        guidance_rescale=request.rescale,
    )


@contextmanager
def without_blocks(module: nn.Module, layers: frozenset[int]) -> Iterator[None]:
    """Within, ``module`` computes without the blocks ``layers``, whether the block driver runs it or not."""
    trampoline: Any = getattr(module, "_tuner_trampoline", None)
    if trampoline is not None and trampoline.enabled:
        context = trampoline.context
        trampoline.context = replace(context, skip=context.skip | layers)
        try:
            yield
        finally:
            trampoline.context = context
        return
    blocks: Any = module.get_submodule("blocks")
    module.blocks = nn.ModuleList(block for index, block in enumerate(blocks) if index not in layers)
    try:
        yield
    finally:
        module.blocks = blocks
