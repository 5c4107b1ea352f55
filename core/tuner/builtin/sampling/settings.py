"""Size, length and sampling of the validation clips, from the config, the model's facts and the trained data.

Torch-free: ``tuner check`` reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tuner.builtin.sampling.keys import SamplingConfig
from tuner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from tuner.config.keys import CoreConfig
    from tuner.model import LayerSkip, SampleRequest
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
    rescale: float = 0.0
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    skip_start: float = 0.01
    skip_stop: float = 0.2
    strength: float = 1.0
    """Of the trained adapter."""

    @property
    def layer_skip(self) -> LayerSkip | None:
        """Skip-layer guidance, where there is any."""
        from tuner.model import LayerSkip

        if not self.skip_layers:
            return None
        return LayerSkip(self.skip_layers, self.skip_scale, self.skip_start, self.skip_stop)

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
            rescale=self.rescale,
            layer_skip=self.layer_skip,
            images=images or {},
            on_step=on_step,
            on_prediction=on_prediction,
        )

    def record(self) -> dict[str, Any]:
        """All of it, for ``validation.json``; without what is not done."""
        off = {name for name, usual in (("rescale", 0.0), ("strength", 1.0)) if getattr(self, name) == usual}
        if not self.skip_layers:
            off |= {"skip_layers", "skip_scale", "skip_start", "skip_stop"}
        return {name: value for name, value in asdict(self).items() if name not in off}


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


def parse_resolutions(text: str) -> list[tuple[int, int]]:
    """(width, height) of each of several sizes with commas between them. Raises ConfigError for what is no size."""
    return list(dict.fromkeys(parse_resolution(each) for each in text.split(",")))


def settings_for(run: Run, spec: ModelSpec, own: Mapping[str, Any] | None = None) -> tuple[Settings, list[str]]:
    """The settings of this run, and a line for each wish that the model does not allow exactly.

    Of several sizes the first. ``own``: core keys that one prompt has its own values for.
    """
    found, notes = all_settings(run, spec, own)
    return found[0], notes


def all_settings(run: Run, spec: ModelSpec, own: Mapping[str, Any] | None = None) -> tuple[list[Settings], list[str]]:
    """The settings for each size that is asked for, and the lines of :func:`settings_for`."""
    own = own or {}
    sizes, notes = _sizes(run, spec, own)
    frames = _frames(run, spec, own, notes)
    guidance = _guidance_keys(run)
    seed = chosen(run, spec, "validation_seed", own)
    found = [
        Settings(
            *size,
            frames=frames,
            fps=spec.fps,
            steps=chosen(run, spec, "validation_num_inference_steps", own),
            guidance=chosen(run, spec, "validation_guidance", own),
            guidance_2=_second_guidance(run, spec, own),
            seed=run.config.seed if seed is None else seed,
            scheduler=chosen(run, spec, "validation_noise_scheduler", own),
            flow_shift=chosen(run, spec, "validation_flow_shift", own),
            negative=chosen(run, spec, "validation_negative_prompt", own),
            rescale=guidance.validation_guidance_rescale,
            skip_layers=tuple(dict.fromkeys(guidance.validation_guidance_skip_layers or ())),
            skip_scale=guidance.validation_guidance_skip_scale,
            skip_start=guidance.validation_guidance_skip_layers_start,
            skip_stop=guidance.validation_guidance_skip_layers_stop,
        )
        for size in sizes
    ]
    return found, notes


def _guidance_keys(run: Run) -> SamplingConfig:
    """This plugin's own keys; the defaults where it is left out."""
    plugin = run.plugins.get("sampling")
    return plugin.config if plugin is not None and isinstance(plugin.config, SamplingConfig) else SamplingConfig()


def chosen(run: Run, spec: ModelSpec | None, key: str, own: Mapping[str, Any] | None = None) -> Any:
    """The value of a core key: the prompt's own, else the user's, else the model's own default, else the core's."""
    if own and key in own:
        return own[key]
    value = getattr(run.config, key)
    return value if spec is None or key in run.explicit else spec.defaults.get(key, value)


def _second_guidance(run: Run, spec: ModelSpec, own: Mapping[str, Any]) -> float | None:
    """The nearest word on it: the prompt's, the user's, the model's; who says the first alone says it for both."""
    for said in (own, run.explicit):
        if "validation_guidance_2" in said:
            break
        if "validation_guidance" in said:
            return None
    value: float | None = chosen(run, spec, "validation_guidance_2", own)
    return value


def _sizes(run: Run, spec: ModelSpec, own: Mapping[str, Any]) -> tuple[list[tuple[int, int]], list[str]]:
    wish = chosen(run, None, RESOLUTION, own)
    if wish is None:
        return [_trained_size(run, spec)], []
    found, notes = zip(*(_size(asked, spec) for asked in parse_resolutions(wish)), strict=True)
    return list(dict.fromkeys(found)), [line for lines in notes for line in lines]


def _size(asked: tuple[int, int], spec: ModelSpec) -> tuple[tuple[int, int], list[str]]:
    width, height = (rounded(edge, spec.size_multiple) for edge in asked)
    if (width, height) == asked:
        return asked, []
    return (width, height), [
        f"{RESOLUTION} {asked[0]}x{asked[1]}: rendered at {width}x{height}, "
        f"since sizes must be multiples of {spec.size_multiple}"
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


def _frames(run: Run, spec: ModelSpec, own: Mapping[str, Any], notes: list[str]) -> int:
    wish: int | None = chosen(run, None, "validation_num_video_frames", own)
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
