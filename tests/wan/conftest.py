"""Tiny Wan models: real classes, real files, random weights."""

from __future__ import annotations

import os

# Before anything imports the hub's client: no test may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.config.keys import CoreConfig
from tuner.materialise import materialise
from tuner.model import Model
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.flavours import FLAVOURS
from tuner_wan.tiny import build_tiny, build_tiny_t2v


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T2V with four blocks. Read only: copy it before you change a file."""
    return build_tiny_t2v(tmp_path_factory.mktemp("base") / "tiny-wan", layers=4)


@pytest.fixture(scope="session")
def flavours(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a flavour's structure, one for each repository. Read only."""
    root, built = tmp_path_factory.mktemp("flavours"), dict[str, Path]()

    def base(name: str) -> Path:
        repository = FLAVOURS[name].repository
        if repository not in built:
            built[repository] = build_tiny(root / repository.rpartition("/")[2], name)
        return built[repository]

    return base


@pytest.fixture(scope="session")
def plugin() -> WanPlugin:
    return WanPlugin("wan", WanPlugin.Config())


@pytest.fixture(scope="session")
def new_run() -> Callable[..., Run]:
    """A described run on the CPU with these core keys."""

    def make(plugin: WanPlugin, dtype: torch.dtype = torch.float32, **keys: Any) -> Run:
        run = Run(CoreConfig(**keys), {})
        run.spec = plugin.describe_model(run)
        run.place(torch.device("cpu"), dtype)
        return run

    return make


@pytest.fixture
def loaded(tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]) -> tuple[Run, Model]:
    """The tiny model, loaded and materialised in float32."""
    run = new_run(plugin, pretrained_model_name_or_path=str(tiny))
    model = plugin.load_model(run)
    materialise(model.network, device=run.device)
    return run, model
