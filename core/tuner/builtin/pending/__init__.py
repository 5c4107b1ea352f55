"""Keys that users' files have and whose feature is not built yet, so that those files pass."""

from __future__ import annotations

from collections.abc import Iterator
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

    def warnings(self, core: CoreConfig) -> Iterator[str]:
        """What the config will need and this machine lacks, with the command that mends it."""
        if (self.config.push_to_hub or self.config.push_checkpoints_to_hub) and not _hub_login():
            yield "push_to_hub: nobody is logged in to the Hugging Face hub on this machine; `hf auth login`"


def _hub_login() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
