"""What this plugin is held to: read by its tests, and by ``tuner plugins check ltx``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.testing.contract import FamilyContract, PluginContract


class LtxContract(PluginContract):
    """Found, light to import, with keys of its own, hooks that are called and a state that survives."""

    plugin = "ltx"


class LtxFamilyContract(FamilyContract):
    """Describes, loads, encodes, learns and samples as the core relies on."""

    plugin = "ltx"
    clip = (9, 64, 96)

    def build(self, folder: Path) -> dict[str, Any]:
        """A tiny LTX-Video with random weights."""
        from tuner_ltx.tiny import build_tiny

        return {"pretrained_model_name_or_path": str(build_tiny(folder / "tiny-ltx"))}
