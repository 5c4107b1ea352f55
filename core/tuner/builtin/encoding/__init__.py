"""Encoding what the cache lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.builtin.encoding.encoder import EncodeHooks
    from tuner.data.cached import CachedData
    from tuner.data.samples import Prepared
    from tuner.model import Model
    from tuner.run import Run


class EncodingPlugin(Plugin[PluginConfig]):
    """Encodes captions, clips and masks once; each process its share, and only what the cache lacks."""

    @hookimpl
    def configure(self, run: Run) -> None:
        """Ask for the package that compressed entries need. Raises ConfigError when it is not installed."""
        if run.config.compress_disk_cache:
            from tuner.builtin.encoding import compression

            compression.zstandard()

    @hookimpl
    def fill_cache(
        self, run: Run, model: Model, data: Prepared, captions: Sequence[str], hooks: EncodeHooks, verify: bool
    ) -> CachedData:
        """Encode what is missing."""
        from tuner.builtin.encoding.fill import build_cache

        return build_cache(run, model, hooks, data, captions, verify=verify)
