"""Keys that users' files have and whose feature is not built yet, so that those files pass."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
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
        trackers = {part.strip() for part in self.config.report_to.split(",")}
        if trackers & {"wandb", "all"}:
            if find_spec("wandb") is None:
                yield "report_to wandb: the package is not installed; `pip install wandb`"
            elif not _wandb_login():
                yield "report_to wandb: nobody is logged in on this machine; `wandb login`"
        if (self.config.push_to_hub or self.config.push_checkpoints_to_hub) and not _hub_login():
            yield "push_to_hub: nobody is logged in to the Hugging Face hub on this machine; `hf auth login`"


def _hub_login() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return any("wandb" in host for host in netrc.netrc().hosts)
    return False
