"""Size, length and sampling of the validation clips, from the config, the model's facts and the trained data.

Torch-free: ``tuner check`` reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.config.keys import CoreConfig
    from tuner.model import SampleRequest
    from tuner.run import Run
    from tuner.spec import ModelSpec

RESOLUTION = "validation_resolution"
_SIZE = re.compile(r"\s*(\d+)\s*[xX×*]\s*(\d+)\s*")
_EDGE = re.compile(r"\s*(\d+)\s*")
DEFAULT_FRAMES = 33
"""Frames of a clip where neither the config nor the data says."""
MEGAPIXEL = 1_000_000


@dataclass(frozen=True)
class Settings:
    """How every validation clip of a run is rendered."""

    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    guidance_2: float | None
    seed: int
    scheduler: str
    flow_shift: float | None
    negative: str

    def request(
        self,
        prompt: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        on_step: Callable[[int], None] | None,
        images: Mapping[str, Tensor] | None = None,
        on_prediction: Callable[[int, Tensor], None] | None = None,
    ) -> SampleRequest:
        """What a family is asked for one prompt; ``images``: what was encoded of the frames it starts from."""
        from tuner.model import SampleRequest

        return SampleRequest(
            prompt=prompt,
            negative=negative,
            width=self.width,
            height=self.height,
            frames=self.frames,
            steps=self.steps,
            guidance=self.guidance,
            guidance_2=self.guidance_2,
            seed=self.seed,
            scheduler=self.scheduler,
            flow_shift=self.flow_shift,
            images=images or {},
            on_step=on_step,
            on_prediction=on_prediction,
        )

    def record(self) -> dict[str, Any]:
        """All of it, for ``validation.json``."""
        return asdict(self)


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) of ``WIDTHxHEIGHT``, or of one edge, which makes a square. Raises ConfigError otherwise."""
    size = _SIZE.fullmatch(text)
    edge = _EDGE.fullmatch(text)
    found = (int(size[1]), int(size[2])) if size else (int(edge[1]), int(edge[1])) if edge else (0, 0)
    if min(found) < 1:
        raise ConfigError(
            f"{RESOLUTION} {text!r} is no size",
            where=RESOLUTION,
            allowed='"WIDTHxHEIGHT" such as "832x480", or one edge',
        )
    return found


def settings_for(run: Run, spec: ModelSpec) -> tuple[Settings, list[str]]:
    """The settings of this run, and a line for each wish that the model does not allow exactly."""
    core = run.config
    size, notes = _size(run, spec)
    frames = _frames(run, spec, notes)
    seed = core.seed if core.validation_seed is None else core.validation_seed
    settings = Settings(
        *size,
        frames=frames,
        fps=spec.fps,
        steps=chosen(run, spec, "validation_num_inference_steps"),
        guidance=chosen(run, spec, "validation_guidance"),
        guidance_2=_second_guidance(run, spec),
        seed=seed,
        scheduler=chosen(run, spec, "validation_noise_scheduler"),
        flow_shift=chosen(run, spec, "validation_flow_shift"),
        negative=chosen(run, spec, "validation_negative_prompt"),
    )
    return settings, notes


def chosen(run: Run, spec: ModelSpec | None, key: str) -> Any:
    """The value of a core key: the user's, else the model's own default, else the core's."""
    value = getattr(run.config, key)
    return value if spec is None or key in run.explicit else spec.defaults.get(key, value)


def _second_guidance(run: Run, spec: ModelSpec) -> float | None:
    """The user's, else the model's own unless the user set the first one: that is then for both."""
    value: float | None = chosen(run, spec, "validation_guidance_2")
    only_first = "validation_guidance" in run.explicit and "validation_guidance_2" not in run.explicit
    return None if only_first else value


def _size(run: Run, spec: ModelSpec) -> tuple[tuple[int, int], list[str]]:
    wish = run.config.validation_resolution
    if wish is None:
        return _trained_size(run, spec), []
    asked = parse_resolution(wish)
    width, height = (rounded(edge, spec.size_multiple) for edge in asked)
    if (width, height) == asked:
        return asked, []
    return (width, height), [
        f"{RESOLUTION} {wish}: rendered at {width}x{height}, since sizes must be multiples of {spec.size_multiple}"
    ]


def _trained_size(run: Run, spec: ModelSpec) -> tuple[int, int]:
    """(width, height) of most trained clips; before the data is known, a square of the configured resolution."""
    if run.trained_shape is not None:
        _, height, width = run.trained_shape
        return width, height
    edge = rounded(configured_edge(run.config), spec.size_multiple)
    return edge, edge


def configured_edge(core: CoreConfig) -> float:
    """The edge in pixels of the square that ``resolution`` asks for."""
    return (core.resolution * MEGAPIXEL) ** 0.5 if core.resolution_type == "area" else core.resolution


def _frames(run: Run, spec: ModelSpec, notes: list[str]) -> int:
    wish = run.config.validation_num_video_frames
    if wish is None:
        trained = run.trained_shape
        return spec.latents.frames_allowed(DEFAULT_FRAMES) if trained is None else trained[0]
    allowed = spec.latents.frames_allowed(wish)
    if allowed != wish:
        stride = spec.latents.stride_time
        notes.append(
            f"validation_num_video_frames {wish}: rendered with {allowed}, since a clip must have {stride}k + 1 frames"
        )
    return allowed


def rounded(edge: float, multiple: int) -> int:
    """``edge`` rounded to the nearest multiple, at least one of them."""
    return max(1, int(edge / multiple + 0.5)) * multiple
