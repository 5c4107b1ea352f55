"""Keys that users' files have and whose feature is not built yet, so that those files pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.builtin.pending.keys import PendingKeys
from tuner.plugin import Plugin

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig


class PendingPlugin(Plugin[PendingKeys]):
    """Keys of features to come: accepted, and said to have no effect yet."""

    Config = PendingKeys

    def is_active(self, core: CoreConfig) -> bool:
        """It does nothing."""
        return False
