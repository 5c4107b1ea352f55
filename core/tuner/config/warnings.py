"""What will not happen although the config says so: features to come, and what this machine lacks."""

from __future__ import annotations

import netrc
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec

from tuner.config.describe import facts
from tuner.config.keys import CoreConfig
from tuner.plugin import PluginConfig


def pending(configs: Mapping[str, PluginConfig], explicit: Collection[str]) -> Iterator[str]:
    """A warning for the keys that were set away from their default and have no effect yet, one for each reason."""
    reasons: dict[str, list[str]] = {}
    for config in configs.values():
        for key, field in type(config).model_fields.items():
            reason = facts(field).pending
            changed = getattr(config, key) != field.get_default(call_default_factory=True)
            if reason and key in explicit and changed:
                reasons.setdefault(reason, []).append(key)
    for reason, keys in reasons.items():
        yield f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect yet: {reason}"


def missing(core: CoreConfig) -> Iterator[str]:
    """A warning for everything the config needs that this machine lacks, with the command that mends it."""
    trackers = {part.strip() for part in core.report_to.split(",")}
    if trackers & {"wandb", "all"}:
        if find_spec("wandb") is None:
            yield "report_to wandb: the package is not installed; `pip install wandb`"
        elif not _wandb_login():
            yield "report_to wandb: nobody is logged in on this machine; `wandb login`"
    if (core.push_to_hub or core.push_checkpoints_to_hub) and not _hub_login():
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
