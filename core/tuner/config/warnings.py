"""What will not happen although the config says so: features to come."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from tuner.config.describe import facts
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
