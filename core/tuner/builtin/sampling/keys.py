"""Keys of validation clips beside the core's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tuner.plugin import PluginConfig, key

Layer = Annotated[int, Field(ge=0)]
Strength = Annotated[float, Field(ge=0)]


class SamplingConfig(PluginConfig):
    """When clips are rendered, of which prompts, and with which guidance."""

    validation_epoch_interval: int = key(0, "Epochs between validation clips, beside those by steps; 0 is none.", ge=0)
    disable_benchmark: bool = key(
        False, "Do not render the base model before the first step; its clips stand beside the later ones."
    )
    validation_prompt_library: bool = key(
        False, "Render a built-in set of prompts too: people, animals, places, motion of the camera, text, crowds."
    )
    validation_guidance_rescale: float = key(
        0.0,
        "How far the guided prediction is brought back to the deviation of the unguided one, against overexposed "
        "clips; 0 is not at all.",
        ge=0,
        le=1,
    )
    validation_guidance_skip_layers: list[Layer] | None = key(
        None, "Blocks, from 0, that skip-layer guidance leads away from; none when absent. One more forward per step."
    )
    validation_guidance_skip_scale: float = key(2.8, "Scale of skip-layer guidance.", ge=0)
    validation_guidance_skip_layers_start: float = key(
        0.01, "Fraction of the sampling steps after which skip-layer guidance begins.", ge=0, lt=1
    )
    validation_guidance_skip_layers_stop: float = key(
        0.2, "Fraction of the sampling steps before which skip-layer guidance ends.", ge=0, le=1
    )
    validation_adapter_strength: Strength | Annotated[list[Strength], Field(min_length=1)] = key(
        1.0, "Strength of the trained LoRA in the clips, or a list of several: a clip for each."
    )
    evaluation_type: Literal["none", "clip"] | None = key(
        None, "Scores of rendered media. `clip` is for pictures and is refused: `eval_steps_interval` measures video."
    )

    @property
    def strengths(self) -> list[float]:
        """Each strength once."""
        wish = self.validation_adapter_strength
        return list(dict.fromkeys(wish if isinstance(wish, list) else [wish]))
