"""A toy network with LoRA, loaded through the core's own materialising and transforms, with and without offload."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from tuner.blocks import StepContext
from tuner.builtin.full.adapter import attach
from tuner.config.keys import CoreConfig
from tuner.model import Adapter, Network, ParameterGroup, Stage, Transform
from tuner.run import Run
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import load
from tuner.transforms import prepare
from tuner_offload import placement
from tuner_offload.placement import group_offload

POISON = 0xFF
"""Every byte so: NaN in float32 and in bfloat16."""


class StreamSimulator:
    """A device whose copies land late: when chance has it, or when someone waits for them.

    What a copy will write is spoilt the moment the copy is started, so whoever reads it before, or writes it while it
    is read, computes with NaN. Each direction is a stream of its own: its copies land in order.
    """

    def __init__(self, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.loads: list[Load] = []
        self.results: list[Result] = []
        self.in_use: list[Tensor] = []
        """device memory of blocks between their entry and their release"""
        self.bound: Callable[[], Iterable[Tensor]] = tuple
        """what modules would compute with at the moment"""
        self.late = 0
        """copies that had not landed when they were waited for"""

    def start(self, target: Tensor, source: Tensor) -> Load:
        self.pass_time()
        for used in (*self.in_use, *self.bound()):
            assert not _overlap(used, target), "a block that is in use is overwritten"
        target.fill_(POISON)
        self.loads.append(Load(target, source, source._version))
        return self.loads[-1]

    def wait(self, ticket: Load) -> None:
        self.late += not ticket.landed
        while not ticket.landed:
            self.loads.pop(0).land()

    def collect(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        self.pass_time()
        self.results.append(Result(target, source, add=add))

    def finish(self) -> None:
        while self.loads:
            self.loads.pop(0).land()
        while self.results:
            self.results.pop(0).land()

    def pass_time(self) -> None:
        """Some copies land."""
        for queue in (self.loads, self.results):
            for _ in range(self.chance.choice((0, 0, 0, 1, 2))):
                if queue:
                    queue.pop(0).land()


@dataclass(eq=False)
class Load:
    """A copy to the device."""

    target: Tensor
    source: Tensor
    version: int
    landed: bool = False

    def land(self) -> None:
        assert self.source._version == self.version, "host memory was changed while it was copied"
        with torch.no_grad():
            self.target.copy_(self.source)
        self.landed = True


class Result:
    """A copy to the host, or a sum there."""

    def __init__(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        self.target, self.source, self.add = target, source, add
        self.earlier = target.clone() if add else None
        target.fill_(torch.nan)

    def land(self) -> None:
        # Where the earlier value was itself on its way, it has come by now.
        waited = self.add and self.earlier.isnan().any() and not self.target.isnan().any()
        earlier = self.target.clone() if waited else self.earlier
        self.target.copy_(self.source if earlier is None else earlier + self.source)


class Observed:
    """A residency that tells the simulator which device memory is in use, and else does what ``inner`` does."""

    def __init__(self, inner: Any, simulator: StreamSimulator) -> None:
        self.inner, self.simulator = inner, simulator
        entries = [entry for master in inner.masters for entry in master.entries]
        simulator.bound = lambda: [entry.bound for entry in entries]
        self.memory: dict[int, list[Tensor]] = {}

    def begin(self, differentiated: bool) -> None:
        self._release(tuple(self.memory))
        self.inner.begin(differentiated)

    def enter(self, index: int) -> None:
        self.inner.enter(index)
        self.simulator.pass_time()
        entries = [entry for master in self.inner.masters for entry in master.entries if entry.block == index]
        buffers = [buffer for buffer in self.inner.ring.buffers if entries and _overlap(buffer, entries[0].bound)]
        assert len(buffers) == bool(entries)
        self.memory[index] = buffers
        self._tell()

    def leave(self, index: int) -> None:
        self._release([index])
        self.inner.leave(index)

    def backward_done(self, index: int) -> None:
        self._release([index])
        self.inner.backward_done(index)

    def end(self, differentiated: bool) -> None:
        self._release(tuple(self.memory))
        self.inner.end(differentiated)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _release(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.memory.pop(index, None)
        self._tell()

    def _tell(self) -> None:
        self.simulator.in_use = [tensor for tensors in self.memory.values() for tensor in tensors]


def _overlap(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@dataclass
class Trained:
    """A network as the training loop has it, and fixed batches for it."""

    network: Network
    run: Run
    device: torch.device
    autocast: bool
    originals: dict[str, Tensor]
    """the base's weights as they are in the file, by name before LoRA"""
    checkpointing: Any = True
    context: dict[str, Any] = field(default_factory=dict)
    """What else a training forward is run with."""

    @property
    def residency(self) -> Any:
        return self.network.residency

    @property
    def lora(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in self.network.module.named_parameters() if each.requires_grad}

    def loss(self, seed: int, *, checkpointing: Any = None) -> Tensor:
        """Mean square of one forward in training mode, as the loop would run it."""
        self.network.trampoline.context = StepContext(
            checkpointing=self.checkpointing if checkpointing is None else checkpointing,
            residency=self.network.residency,
            **self.context,
        )
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
def new_simulator():
    """A factory of stream simulators."""
    return StreamSimulator


@pytest.fixture
def toy(tmp_path, monkeypatch):
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
        full: bool = False,
        by_leaf: bool = False,
        disk: Any = None,
        simulator: StreamSimulator | None = None,
        extra: tuple[Transform, ...] = (),
    ) -> Trained:
        folder = tmp_path / f"toy-{blocks}"
        if not folder.exists():
            build_toy(folder, blocks=blocks, dim=24)
        run = Run(CoreConfig(pretrained_model_name_or_path=str(folder)), plugins={})
        run.spec = describe(run.config)
        run.place(torch.device(device), dtype)
        network = load(run).network
        place = group_offload(
            run,
            blocks_per_group=blocks_per_group,
            use_stream=use_stream,
            resident=resident,
            by_leaf=by_leaf,
            disk=disk,
        )
        if simulator is not None:
            monkeypatch.setattr(placement, "copier_for", lambda device, use_stream: simulator)
        if not while_reading:
            place = Transform(place.stage, place.name, place.claims, place.apply)
        trained = Transform(Stage.ADAPT, "full", frozenset({"adapter"}), attach) if full else lora(layers)
        prepare(run, network, sorted([trained, *extra, *([place] if offload else [])], key=lambda each: each.stage))
        if simulator is not None and not by_leaf:
            network.residency = Observed(network.residency, simulator)
        originals = {name: tensor.to(network.dtype_of(name)) for name, tensor in network.weights()}
        return Trained(network, run, torch.device(device), dtype == torch.bfloat16, originals)

    return make
