"""What each sampling step predicts, told while a clip is sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from tuner.materialise import materialise
from tuner.model import EncodeBatch, Model, SampleRequest
from tuner.run import Run
from tuner_wan import WanPlugin

STEPS = 5


def request_for(model: Model, plugin: WanPlugin, **changes: Any) -> SampleRequest:
    prompt, negative = plugin.encode_batch(model, EncodeBatch("text", captions=("a red circle", "")))
    settings: dict[str, Any] = {
        "prompt": prompt,
        "negative": negative,
        "width": 48,
        "height": 32,
        "frames": 9,
        "steps": STEPS,
        "guidance": 4.0,
        "seed": 7,
        "scheduler": "euler",
        "flow_shift": 3.0,
    }
    return SampleRequest(**{**settings, **changes})


def watched(model: Model, request: SampleRequest) -> tuple[Tensor, list[Tensor]]:
    """The clip, and what was predicted in each step."""
    told: list[tuple[int, Tensor]] = []
    latents = model.sample(replace(request, on_prediction=lambda step, seen: told.append((step, seen))))
    assert [step for step, _ in told] == list(range(1, STEPS + 1))
    return latents, [seen for _, seen in told]


def test_predictions_are_what_a_plain_pipelines_steps_lead_to(
    tiny: Path, loaded: tuple[Run, Model], plugin: WanPlugin
) -> None:
    """An Euler step from x to y goes part of the way to the prediction p: y = r x + (1 - r) p, r of sigmas."""
    request = request_for(loaded[1], plugin)
    _, predicted = watched(loaded[1], request)
    pipeline = WanPipeline.from_pretrained(tiny)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.scheduler.set_shift(3.0)
    seen: list[Tensor] = []

    def keep(pipe: Any, index: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    pipeline(
        "a red circle",
        "",
        width=48,
        height=32,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        callback_on_step_end=keep,
    )
    sigmas = pipeline.scheduler.sigmas
    for step in range(1, STEPS):
        ratio = sigmas[step + 1] / sigmas[step]
        torch.testing.assert_close(
            predicted[step], (seen[step] - ratio * seen[step - 1]) / (1 - ratio), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("scheduler", ["unipc", "euler", "euler-beta"])
def test_who_watches_changes_nothing_and_sees_the_clip_at_last(
    scheduler: str, loaded: tuple[Run, Model], plugin: WanPlugin
) -> None:
    request = request_for(loaded[1], plugin, scheduler=scheduler)
    latents, predicted = watched(loaded[1], request)
    assert torch.equal(latents, loaded[1].sample(request))
    torch.testing.assert_close(predicted[-1], latents, atol=0.05 * float(latents.std()), rtol=0)
    assert not torch.allclose(predicted[0], latents, atol=0.05 * float(latents.std()))


def test_a_first_frame_that_is_given_is_in_every_prediction(
    flavours: Callable[[str], Path], new_run: Callable[..., Run], plugin: WanPlugin
) -> None:
    flavour = "ti2v-5b-2.2"
    run = new_run(plugin, model_flavour=flavour, pretrained_model_name_or_path=str(flavours(flavour)))
    model = plugin.load_model(run)
    materialise(model.network, device=run.device)
    given = torch.randn(48, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    images = {"first_frame": given}
    latents, predicted = watched(model, request_for(model, plugin, width=128, height=64, images=images))
    assert torch.equal(latents[0, :, :1], given)
    assert all(torch.equal(each[0, :, :1], given) for each in predicted)
