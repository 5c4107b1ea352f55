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

_SAGE = "a CUDA device and SageAttention 2.1.1 or newer (`pip install git+https://github.com/thu-ml/SageAttention`)"
_FLASH = "a CUDA device and FlashAttention (`pip install flash-attn --no-build-isolation`)"
_XFORMERS = "a CUDA device and xFormers (`pip install xformers`)"
PENDING_VALUES: dict[str, dict[str, str]] = {
    "attention_mechanism": {
        **dict.fromkeys(
            (
                "sageattention",
                "sageattention-int8-fp16-cuda",
                "sageattention-int8-fp16-triton",
                "sageattention-int8-fp8-cuda",
                "sage",
                "sage_hub",
                "sage_varlen",
            ),
            _SAGE,
        ),
        **dict.fromkeys(("flash", "flash_hub", "flash_varlen", "_flash_3", "_flash_3_hub", "flash_4_hub"), _FLASH),
        "xformers": _XFORMERS,
        **dict.fromkeys(("native", "_native_math", "_native_efficient"), "nothing more"),
        **dict.fromkeys(("_native_flash", "_native_cudnn"), "a CUDA device"),
    }
}
"""Values of open core keys that users' files have and no plugin serves yet, and what the machine needs for each."""


def pending_value(key: str, value: str) -> str:
    """The warning for a known value that nothing serves yet."""
    return (
        f"{key} {value!r} has no effect yet: the best exact kernel of this device is used instead. "
        f"Once it is supported it needs {PENDING_VALUES[key][value]}."
    )


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
