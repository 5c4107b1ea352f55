"""Bytes that streamed blocks copy in a step, on a device that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from rows.row import Row
from tuner.blocks import StepContext
from tuner.config.keys import CoreConfig
from tuner.model import Adapter, Network, ParameterGroup, Stage, Transform
from tuner.run import Run
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import load
from tuner.transforms import prepare
from tuner_offload import placement
from tuner_offload.transfer import InlineCopier

BLOCKS, STEPS = 8, 3


class Counting(InlineCopier):
    """Copies in line and counts the bytes of each direction."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.loaded, self.collected = 0, 0
        self.streamed: dict[int, int] = {}
        """bytes of each buffer that was ever copied"""

    def start(self, target: Tensor, source: Any) -> None:
        """Count what goes to the device."""
        self.loaded += source.nbytes
        self.streamed[id(source)] = source.nbytes
        super().start(target, source)

    def collect(self, target: Tensor, source: Tensor, *, add: bool) -> None:
        """Count what comes back."""
        self.collected += source.nbytes
        super().collect(target, source, add=add)


def measure(folder: Path, *, tiny: bool) -> list[Row]:
    """Bytes each way, over the streamed blocks' own: all streamed, and some resident."""
    rows = []
    for resident in (0, 3):
        copier = Counting()
        with network(folder / f"toy-{resident}", copier, resident) as made:
            train(made)  # the first step finds the ring empty
            copier.loaded = copier.collected = 0
            for _ in range(STEPS):
                train(made)
        rows += of_one(copier, resident)
    return rows


def of_one(copier: Counting, resident: int) -> list[Row]:
    """The rows of one placement."""
    share = copier.loaded / STEPS / sum(copier.streamed.values()) / 2
    note = f"toy network, LoRA, {STEPS} steps; blocks that are there when the direction turns are not copied again"
    case = f"{len(copier.streamed)} of {BLOCKS} blocks streamed"
    return [
        Row(f"bytes host to device / streamed bytes x 2, {case}", round(share, 3), 1.0, note=note),
        Row(f"bytes of frozen weights device to host, {case}", copier.collected, 0),
    ]


@contextmanager
def network(folder: Path, copier: Counting, resident: int) -> Iterator[Network]:
    """A toy network whose blocks stream through ``copier``, with a LoRA."""
    build_toy(folder, blocks=BLOCKS, dim=24)
    run = Run(CoreConfig(pretrained_model_name_or_path=str(folder)), plugins={})
    run.spec = describe(run.config)
    run.place(torch.device("cpu"), torch.float32)
    made = load(run).network
    place = placement.group_offload(run, blocks_per_group=1, use_stream=True, resident=resident, by_leaf=False)
    edits = sorted([Transform(Stage.ADAPT, "lora", frozenset({"adapter"}), adapt), place], key=lambda each: each.stage)
    with mock.patch.object(placement, "copier_for", return_value=copier):
        prepare(run, made, edits)
        yield made


def adapt(network: Network) -> Adapter:
    """PEFT's own injection."""
    config = LoraConfig(r=4, target_modules=r"blocks\.\d+\..*\.to_(q|k|v|out)", init_lora_weights=False)
    inject_adapter_in_model(config, network.module)
    trained = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
    return Adapter("lora", (ParameterGroup("lora", trained),), dict, lambda state: None)


def train(network: Network) -> None:
    """Forward and backward, checkpointed."""
    network.trampoline.context = StepContext(checkpointing=True, residency=network.residency)
    network.module.train()
    found = network.module(torch.randn(2, 12, 2, 4, 4), torch.tensor([100.0, 700.0]), torch.randn(2, 8, 16))
    found.square().mean().backward()
    network.module.zero_grad()
