"""Keys that users' files have and whose feature is not built yet.

They are owned, so that those files pass, and each one that is set away from its default gives a visible
warning that it has no effect yet. A key leaves this file for its plugin when its feature arrives.
"""

from __future__ import annotations

from tuner.plugin import PluginConfig, key


class PendingKeys(PluginConfig):
    """Owned, checked, and without effect yet."""

    text_encoder_2_precision: str = key("no_change", "Quantise a second text encoder.", pending="there is only one")
    disable_benchmark: bool = key(
        False, "Do not render the base model at step 0.", pending="the base model is not rendered at step 0"
    )
    validation_guidance_skip_layers: list[int] | None = key(
        None, "Blocks skipped by skip-layer guidance.", pending="clips are rendered with plain guidance"
    )
    validation_guidance_skip_layers_start: float = key(
        0.0, "Step fraction at which it starts.", pending="clips are rendered with plain guidance", ge=0, le=1
    )
    validation_guidance_skip_layers_stop: float = key(
        0.2, "Step fraction at which it stops.", pending="clips are rendered with plain guidance", ge=0, le=1
    )
    validation_prompt_library: bool = key(
        False, "Render a built-in set of prompts.", pending="there is no built-in set of prompts"
    )
