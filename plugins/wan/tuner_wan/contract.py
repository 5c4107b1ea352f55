"""What this plugin is held to: read by its tests, and by ``tuner plugins check wan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuner.testing.contract import FamilyContract, PluginContract


class WanContract(PluginContract):
    """Found, light to import, with keys of its own, hooks that are called and a state that survives."""

    plugin = "wan"
    legacy_keys = frozenset({"pretrained_transformer_2_model_name_or_path"})


class WanFamilyContract(FamilyContract):
    """Describes, loads, encodes, learns and samples as the core relies on."""

    plugin = "wan"

    def build(self, folder: Path) -> dict[str, Any]:
        """A tiny Wan 2.1 with random weights."""
        from tuner_wan.tiny import build_tiny_t2v

        build_tiny_t2v(folder / "wan")
        return {"pretrained_model_name_or_path": str(folder / "wan")}
