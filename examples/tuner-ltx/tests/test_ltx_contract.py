"""The plugin and the family keep tuner's contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner_ltx.tiny import build_tiny

from tuner.testing.contract import FamilyContract, PluginContract


class TestLtxPlugin(PluginContract):
    plugin = "ltx"


class TestLtxFamily(FamilyContract):
    plugin = "ltx"
    clip = (9, 64, 96)

    def build(self, folder: Path) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(build_tiny(folder / "tiny-ltx"))}
