"""Core keys about validation: the clips rendered while training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tuner.plugin import PluginConfig, key


class ValidationKeys(PluginConfig):
    """Prompts, sizes and sampling of the validation clips."""

    validation_step_interval: int = key(
        0, "Steps between validations; 0 validates only at the end.", ge=0, aliases=("validation_steps",)
    )
    validation_prompt: str | None = key(None, "A prompt to render.")
    validation_negative_prompt: str = key("", "Negative prompt of every validation clip.")
    user_prompt_library: Path | None = key(None, "JSON file of nickname -> prompt, each rendered.")
    validation_images: Path | list[Path] | None = key(
        None,
        "Image to video: the pictures that validation clips start from, a folder or a list of files, each for "
        "the prompt whose nickname it is named after, else in turn; `<name>-last` is the last frame beside `<name>`. "
        "First frames of held-out or trained clips when absent.",
    )
    validation_seed: int | None = key(None, "Seed of the validation noise; `seed` when absent.", ge=0)
    validation_resolution: str | None = key(
        None, "`WIDTHxHEIGHT` in pixels, or one edge; the trained size when absent."
    )
    validation_num_video_frames: int | None = key(
        None, "Frames per validation clip; the trained number when absent.", ge=1
    )
    validation_num_inference_steps: int = key(30, "Sampling steps.", ge=1)
    validation_guidance: float = key(5.0, "Guidance scale; 1 renders without the negative prompt.", ge=0)
    validation_guidance_2: float | None = key(
        None,
        "Guidance scale below the boundary, where the low-noise expert of a two-expert model renders; the same, or the "
        "flavour's own, when absent.",
        ge=0,
    )
    validation_noise_scheduler: Literal["unipc", "euler", "euler-beta"] = key(
        "unipc", "Sampler of the validation clips."
    )
    validation_flow_shift: float | None = key(
        None, "Shift of the sampler; the model's own scheduler config when absent.", gt=0
    )
