"""A toy network with LoRA, loaded through the core's own materialising and transforms, with and without offload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tuner.blocks import StepContext
from tuner.config.keys import CoreConfig
from tuner.model import Adapter, Network, ParameterGroup, Stage, Transform
from tuner.run import Run
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import load
from tuner.transforms import prepare
from tuner_offload.placement import group_offload


@dataclass
class Trained:
    """A network as the training loop has it, and fixed batches for it."""

    network: Network
    run: Run
    device: torch.device
    autocast: bool
    originals: dict[str, Tensor]
    """the base's weights as they are in the file, by name before LoRA"""

    @property
    def residency(self) -> Any:
        return self.network.residency

    @property
    def lora(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in self.network.module.named_parameters() if each.requires_grad}

    def loss(self, seed: int, *, checkpointing: bool = True) -> Tensor:
        """Mean square of one forward in training mode, as the loop would run it."""
        self.network.trampoline.context = StepContext(checkpointing=checkpointing, residency=self.network.residency)
        self.network.module.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._forward(seed).float().square().mean()

    def render(self, seed: int) -> Tensor:
        """One forward without gradients, as validation would run it."""
        self.network.trampoline.context = StepContext(residency=self.network.residency)
        self.network.module.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._forward(seed)

    def _forward(self, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        latents = torch.randn(2, 12, 2, 4, 4, generator=draw).to(self.device)
        text = torch.randn(2, 8, 16, generator=draw).to(self.device)
        prediction: Tensor = self.network.module(latents, torch.tensor([100.0, 700.0], device=self.device), text)
        return prediction

    def gradients(self) -> dict[str, Tensor]:
        found = {name: each.grad.clone() for name, each in self.lora.items()}
        self.network.module.zero_grad()
        return found

    def frozen(self) -> list[tuple[int, str, torch.nn.Parameter]]:
        """(block, name in the block, parameter) of every frozen block parameter, as it is bound right now."""
        return [
            (index, name.replace(".base_layer", ""), parameter)
            for index, block in enumerate(self.network.stack.blocks)
            for name, parameter in block.named_parameters()
            if not parameter.requires_grad
        ]


def lora(layers: list[int] | None) -> Transform:
    """PEFT's own injection, on all blocks or on some; B is not zero, so that every tensor has a gradient at once."""

    def apply(network: Network) -> Adapter:
        wanted = r"\d+" if layers is None else "|".join(map(str, layers))
        config = LoraConfig(r=4, target_modules=rf"blocks\.({wanted})\..*\.to_(q|k|v|out)", init_lora_weights=False)
        inject_adapter_in_model(config, network.module)
        trained = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        return Adapter("lora", (ParameterGroup("lora", trained),), dict, lambda state: None)

    return Transform(Stage.ADAPT, "lora", frozenset({"adapter"}), apply)


@pytest.fixture
def toy(tmp_path):
    """A factory: ``toy(offload=True, blocks_per_group=2, …)`` gives a :class:`Trained`."""
    torch.set_num_threads(1)

    def make(
        *,
        offload: bool,
        blocks: int = 6,
        blocks_per_group: int = 1,
        while_reading: bool = True,
        dtype: torch.dtype = torch.float32,
        layers: list[int] | None = None,
        device: str = "cpu",
        use_stream: bool = False,
        resident: int = 0,
        extra: tuple[Transform, ...] = (),
    ) -> Trained:
        folder = tmp_path / f"toy-{blocks}"
        if not folder.exists():
            build_toy(folder, blocks=blocks, dim=24)
        run = Run(CoreConfig(pretrained_model_name_or_path=str(folder)), plugins={})
        run.spec = describe(run.config)
        run.place(torch.device(device), dtype)
        network = load(run).network
        place = group_offload(run, blocks_per_group=blocks_per_group, use_stream=use_stream, resident=resident)
        if not while_reading:
            place = Transform(place.stage, place.name, place.claims, place.apply)
        prepare(run, network, [lora(layers), *extra, *([place] if offload else [])])
        originals = {name: tensor.to(network.dtype_of(name)) for name, tensor in network.weights()}
        return Trained(network, run, torch.device(device), dtype == torch.bfloat16, originals)

    return make
