"""What will not happen although the config says so: features to come, and features that are off."""

from __future__ import annotations

import json
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


def idle(configs: Mapping[str, PluginConfig], core: PluginConfig, explicit: Collection[str]) -> Iterator[str]:
    """A warning for keys that were set and are read only beside another value of a core key, one for each reason."""
    reasons: dict[str, list[str]] = {}
    for config in configs.values():
        for key, field in type(config).model_fields.items():
            changed = getattr(config, key) != field.get_default(call_default_factory=True)
            for name, values in facts(field).needs.items() if key in explicit and changed else ():
                if getattr(core, name) not in values:
                    reasons.setdefault(f"{name} is {json.dumps(getattr(core, name))}", []).append(key)
    for reason, keys in reasons.items():
        yield f"{', '.join(keys)} {'does' if len(keys) == 1 else 'do'} nothing: {reason}"


def unused(config: PluginConfig, why: str, prefix: str = "") -> Iterator[str]:
    """One line for the keys of ``config`` that begin with ``prefix`` and are set away from their default, but unused.

    Arguments
        why: what makes them do nothing, such as "use_ema is false".
    """
    fields = type(config).model_fields
    keys = [key for key in sorted(config.model_fields_set) if key.startswith(prefix)]
    idle = [key for key in keys if getattr(config, key) != fields[key].get_default(call_default_factory=True)]
    if idle:
        yield f"{', '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing: {why}"
