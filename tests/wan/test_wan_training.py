"""The loss of a micro-batch is flow matching on diffusers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from tuner import flow
from tuner.materialise import materialise
from tuner.model import Batch, EncodeBatch, Model
from tuner.run import Run
from tuner_wan import WanPlugin


def make_batch(model: Model, plugin: WanPlugin, sigmas: Tensor) -> Batch:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 3, 4, 6, generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    noisy, target = flow.mix(latents, noise, sigmas)
    texts = plugin.encode_batch(model, EncodeBatch("text", captions=("A red circle", "两只猫 and a much longer text")))
    states = torch.nn.utils.rnn.pad_sequence([each["states"] for each in texts], batch_first=True)
    return Batch(latents, {"states": states}, {}, ("a", "b"), (0, 1), sigmas, noise, noisy, target)


def test_loss_is_the_velocity_error_of_diffusers_forward(
    tiny: Path, loaded: tuple[Run, Model], plugin: WanPlugin
) -> None:
    run, model = loaded
    sigmas = torch.tensor([0.12345, 0.987])
    batch = make_batch(model, plugin, sigmas)
    loss = plugin.compute_loss(run, model, batch)

    reference = WanTransformer3DModel.from_pretrained(tiny, subfolder="transformer")
    text = torch.zeros(2, 512, 16)
    text[:, : batch.text["states"].shape[1]] = batch.text["states"]
    with torch.no_grad():
        velocity = reference(batch.noisy, sigmas * 1000, text).sample
    expected = (velocity - (batch.noise - batch.latents)).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(loss.per_sample, expected)
    assert loss.per_sample.shape == (2,)
    assert loss.per_sample.dtype == torch.float32


def test_times_between_whole_steps_matter(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    run, model = loaded
    batch = make_batch(model, plugin, torch.tensor([0.5, 0.5]))
    before = plugin.compute_loss(run, model, batch).per_sample
    batch.sigmas = torch.tensor([0.5003, 0.5003])
    assert not torch.equal(plugin.compute_loss(run, model, batch).per_sample, before)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_trainable_in_mixed_precision(
    base: torch.dtype, tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    run = new_run(plugin, base, pretrained_model_name_or_path=str(tiny))
    model = plugin.load_model(run)
    materialise(model.network, device=run.device)
    module = model.network.module.requires_grad_(True).train()
    batch = make_batch(model, plugin, torch.tensor([0.2, 0.8]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plugin.compute_loss(run, model, batch)
    assert loss.per_sample.dtype == torch.float32
    loss.per_sample.mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_the_network_is_called_through_its_call(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    run, model = loaded
    seen: list[torch.Size] = []
    model.network.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape), with_kwargs=True
    )
    plugin.compute_loss(run, model, make_batch(model, plugin, torch.tensor([0.2, 0.8])))
    assert seen == [(2, 512, 16)]
