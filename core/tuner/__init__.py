"""tuner: a minimal core that assembles a fine-tuning run for video diffusion models from plugins.

The names that a plugin's entry module needs are exported here and loaded on first use, so that
``import tuner`` costs nothing and ``tuner --help`` never pays for pluggy, pydantic or torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.errors import ConfigError as ConfigError
    from tuner.errors import TunerError as TunerError
    from tuner.hookspecs import hookimpl as hookimpl
    from tuner.plugin import API_VERSION as API_VERSION
    from tuner.plugin import Plugin as Plugin
    from tuner.plugin import PluginConfig as PluginConfig
    from tuner.plugin import key as key

__version__ = "0.1.0"

_HOMES = {
    "API_VERSION": "tuner.plugin",
    "ConfigError": "tuner.errors",
    "Plugin": "tuner.plugin",
    "PluginConfig": "tuner.plugin",
    "TunerError": "tuner.errors",
    "hookimpl": "tuner.hookspecs",
    "key": "tuner.plugin",
}
__all__ = ["API_VERSION", "ConfigError", "Plugin", "PluginConfig", "TunerError", "hookimpl", "key"]


def __getattr__(name: str) -> Any:
    """Load an exported name from its home on first use (PEP 562)."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
