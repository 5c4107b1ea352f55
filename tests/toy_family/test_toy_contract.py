"""The toy family, a package that is not installed, passes the contract kit: so others' packages can use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.testing.contract import FamilyContract, PluginContract
from tuner.testing.plugin_env import importable
from tuner.testing.toy import build_toy

PACKAGE = Path(__file__).parent / "package"


@pytest.fixture(autouse=True, scope="module")
def _toy_package() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with importable(PACKAGE):
        yield
    torch.set_num_threads(threads)


class TestToyPlugin(PluginContract):
    plugin = "toy"


class TestToyFamily(FamilyContract):
    plugin = "toy"

    def build(self, folder: Path) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(build_toy(folder / "toy"))}
