"""Formats of adapter files, and what the commands ``convert``, ``merge``, ``extract`` and ``inspect`` do with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.builtin.adapter_file import AdapterFormat
    from tuner.run import Run


class AdapterFormatsPlugin(Plugin[PluginConfig]):
    """Adapter files as ComfyUI, diffusers, musubi-tuner (kohya), LyCORIS and PEFT name them."""

    @hookimpl
    def adapter_formats(self, run: Run) -> Mapping[str, AdapterFormat]:
        """The formats by name; the last one that claims a file is taken."""
        from tuner.builtin.adapter_names import FORMATS

        return FORMATS
