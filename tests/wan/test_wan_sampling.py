"""Validation renders what a plain WanPipeline renders, through the network in training, and leaves no trace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from tuner.blocks import RouteRequest, StepContext, TokenRoute
from tuner.errors import ConfigError
from tuner.model import EncodeBatch, Model, SampleRequest
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.sampling import make_scheduler

GOLDEN = Path(__file__).parent / "golden"
PROMPT = "A red circle moving downwards，背景"
NEGATIVE = "色调艳丽，过曝"


@pytest.fixture
def request_of(loaded: tuple[Run, Model], plugin: WanPlugin) -> SampleRequest:
    prompt, negative = plugin.encode_batch(loaded[1], EncodeBatch("text", captions=(PROMPT, NEGATIVE)))
    return SampleRequest(
        prompt=prompt,
        negative=negative,
        width=48,
        height=32,
        frames=9,
        steps=4,
        guidance=5.0,
        seed=11,
        scheduler="unipc",
        flow_shift=None,
    )


@pytest.fixture
def pipeline(tiny: Path, loaded: tuple[Run, Model]) -> WanPipeline:
    """A plain pipeline from the same files; the network's own copy of the weights, for equal storage offsets."""
    pipeline = WanPipeline.from_pretrained(tiny)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.data = parameter.data.clone()
    return pipeline


def rendered(pipeline: WanPipeline, output_type: str = "latent", **arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": 48,
        "height": 32,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
    }
    seeded = torch.Generator().manual_seed(11)
    return pipeline(**{**settings, **arguments}, generator=seeded, output_type=output_type).frames


@pytest.mark.parametrize("shift", [None, 7.0])
def test_unipc_equals_a_plain_pipeline(
    shift: float | None, loaded: tuple[Run, Model], request_of: SampleRequest, pipeline: WanPipeline
) -> None:
    if shift is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)
    latents = loaded[1].sample(replace(request_of, flow_shift=shift))
    assert torch.equal(latents, rendered(pipeline))
    assert latents.shape == (1, *loaded[0].spec.latents.shape(9, 32, 48))


@pytest.mark.parametrize("name", ["euler", "euler-beta"])
def test_euler_equals_a_plain_pipeline(
    name: str, loaded: tuple[Run, Model], request_of: SampleRequest, pipeline: WanPipeline
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=name == "euler-beta")
    scheduler.set_shift(3.0)
    pipeline.scheduler = scheduler
    latents = loaded[1].sample(replace(request_of, scheduler=name))
    assert torch.equal(latents, rendered(pipeline))
    assert not torch.equal(latents, loaded[1].sample(request_of)), "the choice of a scheduler must matter"


def test_without_guidance_the_negative_prompt_is_not_run(
    loaded: tuple[Run, Model], request_of: SampleRequest, pipeline: WanPipeline
) -> None:
    module = loaded[1].network.module
    forwards: list[int] = []
    handle = module.register_forward_hook(lambda *_: forwards.append(1))
    latents = loaded[1].sample(replace(request_of, guidance=1.0))
    handle.remove()
    assert len(forwards) == 4
    assert torch.equal(latents, rendered(pipeline, guidance_scale=1.0))


def test_decoded_frames_equal_the_pipelines(
    loaded: tuple[Run, Model], request_of: SampleRequest, pipeline: WanPipeline
) -> None:
    model = loaded[1]
    frames = model.decode(model.sample(request_of))
    assert frames.dtype == torch.uint8
    assert frames.shape == (9, 32, 48, 3)
    expected = np.stack([np.asarray(picture) for picture in rendered(pipeline, "pil")[0]])
    difference = np.abs(frames.numpy().astype(int) - expected)
    # The pipeline divides by 1 / std where we multiply by std: some values round the other way.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


def test_every_step_is_reported(loaded: tuple[Run, Model], request_of: SampleRequest) -> None:
    done: list[int] = []
    loaded[1].sample(replace(request_of, on_step=done.append))
    assert done == [1, 2, 3, 4]


def test_the_seed_alone_decides_the_noise(loaded: tuple[Run, Model], request_of: SampleRequest) -> None:
    model = loaded[1]
    first = model.sample(request_of)
    torch.manual_seed(999)
    assert torch.equal(model.sample(request_of), first)
    assert not torch.equal(model.sample(replace(request_of, seed=12)), first)


def test_no_trace_is_left(loaded: tuple[Run, Model], request_of: SampleRequest) -> None:
    model = loaded[1]
    module = model.network.module.eval()
    module.train()
    keep = torch.arange(4).expand(1, -1)

    def router(request: RouteRequest) -> list[TokenRoute]:
        return [TokenRoute(0, 2, keep)]

    model.network.trampoline.context = context = StepContext(router=router, checkpointing=True)
    attributes, state = set(vars(module)), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    generator = torch.get_rng_state()
    routed = model.sample(request_of)
    assert model.network.trampoline.context is context
    assert module.training
    assert all(each.training for each in module.modules())
    assert set(vars(module)) == attributes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    model.network.trampoline.context = StepContext()
    module.eval()
    assert torch.equal(model.sample(request_of), routed), "no route applies without gradients"


def test_the_vae_is_freed_and_not_loaded_twice(loaded: tuple[Run, Model], request_of: SampleRequest) -> None:
    model = loaded[1]
    latents = model.sample(request_of)
    with model.use("vae") as (vae,):
        model.decode(latents)
        with model.use("vae") as (again,):
            assert again is vae
    assert not model._held


@pytest.mark.parametrize("case", sorted(json.loads((GOLDEN / "validation_timesteps.json").read_text())))
def test_noise_levels_equal_the_reference_figures(case: str) -> None:
    golden = json.loads((GOLDEN / "validation_timesteps.json").read_text())[case]
    shift, steps = case.removeprefix("shift").split("_steps")
    for name in ("euler", "unipc"):
        scheduler = make_scheduler(name, {}, float(shift))
        scheduler.set_timesteps(int(steps))
        times, sigmas = (torch.tensor(golden[f"{name}_{key}"], dtype=torch.float64) for key in ("t", "sigma"))
        torch.testing.assert_close(scheduler.timesteps.double(), times, rtol=1e-5, atol=1e-2)
        torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-5, atol=1e-5)


def test_an_unknown_scheduler_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'euler-beta'"):
        make_scheduler("euler_beta", {}, 3.0)
