"""Loading, encoding, predicting and sampling of the toy family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner import flow
from tuner.blocks import install
from tuner.model import Batch, Component, EncodeBatch, Encoded, Model, Network, SampleRequest
from tuner.testing.toy.describe import CONFIG, NETWORK, WEIGHTS, ToyDimensions, describe, model_folder, read_dimensions
from tuner.testing.toy.networks import ToyTextEncoder, ToyTransformer, ToyVae
from tuner.testing.toy.stack import ToyStack

if TYPE_CHECKING:
    from tuner.run import Run


def load(run: Run) -> ToyModel:
    """The model of ``pretrained_model_name_or_path``; its network has no storage yet."""
    from accelerate import init_empty_weights

    for name in ("vae_enable_tiling", "vae_enable_slicing"):
        if getattr(run.config, name):
            run.log.warning("%s has no effect: the toy VAE encodes whole clips, all of a batch at once", name)
    if run.config.text_encoder_1_precision != "no_change":
        run.log.warning("text_encoder_1_precision has no effect: the toy text encoder has no blocks to quantise")
    folder, spec = model_folder(run.config), run.spec or describe(run.config)
    dimensions = read_dimensions(folder)
    with init_empty_weights(include_buffers=False):
        module = ToyTransformer(dimensions)
    module.requires_grad_(False)
    stack = ToyStack(module)
    network = Network(
        spec=spec.network(NETWORK),
        module=module,
        stack=stack,
        weights=lambda: read_weights(folder / NETWORK / WEIGHTS),
        dtype_of=lambda name: torch.float32 if "norm" in name else run.dtype,
        trampoline=install(module, stack),
        feed_forwards={
            name: each
            for name, each in module.named_modules()
            if name.startswith("blocks.") and name.endswith(".feed_forward")
        },
    )
    return ToyModel(spec, [network], _components(folder, dimensions, run.device))


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, one tensor in memory at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def _components(folder: Path, dimensions: ToyDimensions, device: torch.device) -> dict[str, Component]:
    def component(part: str, make: Callable[[], nn.Module]) -> Component:
        files = (folder / part / CONFIG, folder / part / WEIGHTS)

        def filled() -> nn.Module:
            module = make()
            module.load_state_dict(dict(read_weights(files[1])))
            return module.requires_grad_(False).eval().to(device)

        return Component(load=filled, files=files, settings={"precision": "float32"})

    def text_encoder() -> nn.Module:
        return ToyTextEncoder(dimensions.text_dim, dimensions.text_tokens)

    return {"vae": component("vae", ToyVae), "text_encoder": component("text_encoder", text_encoder)}


def encode(model: Model, batch: EncodeBatch) -> Encoded:
    """``video``: latents (C, F', h, w) of each clip; ``text``: states (L, T) of each caption."""
    if batch.kind == "text":
        with model.use("text_encoder") as (encoder,):
            return [{"states": encoder(caption)} for caption in batch.captions]
    if batch.pixels is None:
        raise ValueError(f"encoding {batch.kind!r} needs pixels")
    with model.use("vae") as (vae,):
        latents: Tensor = vae.encode(batch.pixels.to(next(vae.parameters()).device))
    return [{"latents": each.contiguous()} for each in latents]


def velocity(network: Network, noisy: Tensor, sigmas: Tensor, states: Tensor) -> Tensor:
    """The velocity (B, C, F', h, w) at ``sigmas`` (B,); text ``states`` (B, L, T) are padded to full length."""
    text = functional.pad(states, (0, 0, 0, network.spec.text_tokens - states.shape[1]))
    prediction: Tensor = network.module(noisy, sigmas * 1000, text)
    return prediction


class ToyModel(Model):
    """Sampling by Euler steps along the flow."""

    def predict(self, batch: Batch) -> Tensor:
        """Velocity (B, C, F', h, w) of ``batch.noisy`` at ``batch.sigmas``."""
        return velocity(self.network, batch.noisy, batch.sigmas, batch.text["states"])

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> Tensor:
        """Latents (1, C, F', h, w) of ``request``."""
        latents = torch.randn(
            (1, *self.spec.latents.shape(request.frames, request.height, request.width)),
            generator=torch.Generator().manual_seed(request.seed),
        )
        device = next(self.network.module.parameters()).device
        latents, shift = latents.to(device), request.flow_shift or 1.0
        sigmas = flow.shift_sigmas(torch.linspace(1, 0, request.steps + 1, device=device), shift)
        for step in range(request.steps):
            guided = self._guided(request, latents, sigmas[step : step + 1])
            if request.on_prediction is not None:
                request.on_prediction(step + 1, latents - sigmas[step] * guided)
            latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
            if request.on_step is not None:
                request.on_step(step + 1)
        return latents

    def _guided(self, request: SampleRequest, latents: Tensor, sigmas: Tensor) -> Tensor:
        def along(prompt: Mapping[str, Tensor]) -> Tensor:
            states = prompt["states"].to(latents.device).unsqueeze(0)
            return velocity(self.network, latents, sigmas, states).float()

        wanted = along(request.prompt)
        if request.guidance == 1:
            return wanted
        unwanted = along(request.negative)
        return unwanted + request.guidance * (wanted - unwanted)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8 of latents (1, C, F', h, w)."""
        with self.use("vae") as (vae,):
            pixels: Tensor = vae.decode(latents.float())[0]
        scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return scaled.permute(1, 2, 3, 0).cpu()
