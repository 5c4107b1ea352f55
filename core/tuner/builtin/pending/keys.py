"""Keys that users' files have and whose feature is not built yet.

They are owned, so that those files pass, and each one that is set away from its default gives a visible
warning that it has no effect yet. A key leaves this file for its plugin when its feature arrives.
"""

from __future__ import annotations

from tuner.plugin import PluginConfig, key


class PendingKeys(PluginConfig):
    """Owned, checked, and without effect yet."""

    text_encoder_2_precision: str = key("no_change", "Quantise a second text encoder.", pending="there is only one")
