"""Memory while caching: the VAE sees a few frames at a time, the text encoder may be quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner.model import EncodeBatch
from tuner.run import Run
from tuner.testing.live_bytes import LiveBytes
from tuner_wan import WanPlugin
from tuner_wan.encode import encode_clip

LONG, SHORT = 33, 17


def clip(frames: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "ti2v-5b-2.2"])
@pytest.mark.parametrize("tiled", [False, True])
def test_the_vae_never_holds_more_of_a_clip_than_it_works_on(
    flavour: str, tiled: bool, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    """Float64 stands for the device: what is brought to the VAE is a copy, and the clip is not in it."""
    keys = {"pretrained_model_name_or_path": str(flavours(flavour)), "model_flavour": flavour}
    run = new_run(plugin, **keys, vae_enable_tiling=tiled)
    peaks: dict[int, int] = {}
    with plugin.load_model(run).use("vae") as (vae,), torch.no_grad():
        vae.double()
        if tiled:
            vae.enable_tiling(32, 32, 24, 24)
        for frames in (SHORT, LONG):
            pixels = clip(frames)
            with LiveBytes(lambda tensor: tensor.dtype == torch.float64) as held:
                latents = encode_clip(vae, pixels)
            peaks[frames] = held.peak
    # Posterior of mean and variance, once more while it grows, its mode and what is made of that.
    results = 8 * latents.numel() * latents.element_size() * 2
    whole = 2 * clip(LONG).nbytes
    assert peaks[LONG] - peaks[SHORT] < results < whole / 2


@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "ti2v-5b-2.2"])
@pytest.mark.parametrize("tiled", [False, True])
def test_pieces_give_the_bits_of_a_whole_clip(
    flavour: str, tiled: bool, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    run = new_run(plugin, pretrained_model_name_or_path=str(flavours(flavour)), model_flavour=flavour)
    model = plugin.load_model(run)
    pixels = clip(9)
    with model.use("vae") as (vae,), torch.no_grad():
        if tiled:
            vae.enable_tiling(32, 32, 24, 24)
        mode = vae.encode(pixels[None]).latent_dist.mode()[0]
        (encoded,) = plugin.encode_batch(model, EncodeBatch("video", pixels=pixels[None]))
        mean, std = (torch.tensor(each).view(-1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    assert torch.equal(encoded["latents"], (mode - mean) / std)
    assert not vae.encoder._forward_pre_hooks, "nothing is left on the VAE"
