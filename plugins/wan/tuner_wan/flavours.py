"""The flavours of Wan: where each lives and what it looks like, so that nothing need be downloaded to know.

Dimensions are from the repositories' own config.json files; steps, guidance, shift and sizes are what Wan's
authors render with (``wan/configs`` of their code).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tuner.errors import ConfigError, nearest
from tuner.spec import LatentGeometry

DEFAULT_FLAVOUR = "t2v-480p-1.3b-2.1"
TEXT_TOKENS = 512
"""Length of the text that the network reads; shorter prompts are padded with zeros, without a mask."""
HEAD_DIM = 128
IMAGE_TOKENS = 257
"""Tokens of one frame that CLIP embeds."""

Condition = Literal["none", "first_frame", "first_and_last_frame", "clean_first_frame"]
Expert = Literal["high", "low", "both"]


@dataclass(frozen=True)
class Flavour:
    """One flavour. The denoiser's width is ``heads * 128``."""

    name: str
    repository: str
    blocks: int
    heads: int
    ffn_dim: int
    in_channels: int = 16
    latent_channels: int = 16
    stride_space: int = 8
    fps: float = 16.0
    size: tuple[int, int] = (832, 480)
    """Width and height of the clips it was trained on."""
    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    """Guidance below the boundary, where the low-noise expert renders; None is the same."""
    flow_shift: float = 5.0
    """Shift of the sampler where the model has no scheduler config."""
    condition: Condition = "none"
    """What it is given beside the text: a first frame (and a last one), or a first latent frame without noise."""
    image_context: bool = False
    """Whether CLIP embeddings of an image go into cross-attention (2.1 image to video)."""
    expert: Expert | None = None
    """Which expert is trained, of a model that has two."""
    boundary: float | None = None
    """The noise level at which the high-noise expert hands over to the other."""

    @property
    def dim(self) -> int:
        """Width of the denoiser."""
        return self.heads * HEAD_DIM

    @property
    def image_tokens(self) -> int:
        """Tokens of the frames that CLIP embeds; 0 where it embeds none."""
        return IMAGE_TOKENS * (2 if self.condition == "first_and_last_frame" else 1) if self.image_context else 0

    @property
    def experts(self) -> int:
        """Denoisers that the model has."""
        return 1 if self.expert is None else 2

    @property
    def latents(self) -> LatentGeometry:
        """How pixels become latents; every flavour's VAE makes one latent frame of four."""
        return LatentGeometry(channels=self.latent_channels, stride_time=4, stride_space=self.stride_space)

    @property
    def networks(self) -> tuple[tuple[str, tuple[float, float]], ...]:
        """(subfolder, noise levels) of each denoiser that is trained. The high-noise expert is ``transformer``."""
        high, low = ("transformer", (self.boundary or 0.0, 1.0)), ("transformer_2", (0.0, self.boundary or 0.0))
        if self.expert is None:
            return (("transformer", (0.0, 1.0)),)
        return {"high": (high,), "low": (low,), "both": (high, low)}[self.expert]


_SMALL = Flavour(DEFAULT_FLAVOUR, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 30, 12, 8960, flow_shift=3.0, guidance=6.0)
_LARGE = Flavour("t2v-480p-14b-2.1", "Wan-AI/Wan2.1-T2V-14B-Diffusers", 40, 40, 13824, flow_shift=3.0)
_IMAGE = replace(
    _LARGE,
    name="i2v-14b-2.1",
    repository="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    in_channels=36,
    steps=40,
    condition="first_frame",
    image_context=True,
)
_TEXT_EXPERTS = replace(
    _LARGE,
    repository="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    size=(1280, 720),
    steps=40,
    guidance=4.0,
    guidance_2=3.0,
    flow_shift=12.0,
    boundary=0.875,
)
_IMAGE_EXPERTS = replace(
    _TEXT_EXPERTS,
    repository="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    in_channels=36,
    guidance=3.5,
    guidance_2=3.5,
    flow_shift=5.0,
    boundary=0.9,
    condition="first_frame",
)


def _experts(kind: str, model: Flavour) -> list[Flavour]:
    experts: tuple[Expert, ...] = ("high", "low", "both")
    return [replace(model, name=f"{kind}-14b-2.2-{expert}", expert=expert) for expert in experts]


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        _SMALL,
        _LARGE,
        _IMAGE,
        replace(
            _IMAGE,
            name="i2v-14b-2.1-720p",
            repository="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            size=(1280, 720),
            flow_shift=5.0,
        ),
        replace(
            _IMAGE,
            name="flf2v-14b-2.1",
            repository="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
            size=(1280, 720),
            steps=50,
            guidance=5.5,
            flow_shift=16.0,
            condition="first_and_last_frame",
        ),
        *_experts("t2v", _TEXT_EXPERTS),
        *_experts("i2v", _IMAGE_EXPERTS),
        Flavour(
            "ti2v-5b-2.2",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            blocks=30,
            heads=24,
            ffn_dim=14336,
            in_channels=48,
            latent_channels=48,
            stride_space=16,
            fps=24.0,
            size=(1280, 704),
            condition="clean_first_frame",
        ),
    )
}

ORIGINAL_LAYOUTS = {
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan2.1-I2V-14B-480P": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan2.1-I2V-14B-720P": "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
    "Wan2.1-FLF2V-14B-720P": "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
    "Wan2.2-T2V-A14B": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "Wan2.2-I2V-A14B": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    "Wan2.2-TI2V-5B": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
"""Repositories in the layout of Wan's own code, which we do not read, to those in the diffusers layout."""


def of_repository(base: str | None) -> list[Flavour]:
    """The flavours that the known repository ``base`` holds, the usual one first; none for any other base."""
    return [flavour for flavour in FLAVOURS.values() if base is not None and flavour.repository == base]


def named(name: str, base: str | None) -> Flavour:
    """The flavour called ``name``.

    Raises ConfigError for an unknown name, and where name and known repository contradict each other.
    """
    if name not in FLAVOURS:
        raise ConfigError(
            f"model_flavour {name!r} is not a flavour of wan", allowed=FLAVOURS, nearest=nearest(name, FLAVOURS)
        )
    flavour, held = FLAVOURS[name], of_repository(base)
    if held and flavour not in held:
        raise ConfigError(
            f"model_flavour is {flavour.name!r}, but pretrained_model_name_or_path {base!r} is {held[0].name!r}",
            remedy=f"drop one of the two, or set pretrained_model_name_or_path to {flavour.repository}",
        )
    return flavour


def resembling(in_channels: int, *, image_context: bool, last_frame: bool, experts: int | None) -> list[Flavour]:
    """The flavours that a model of these properties looks like; ``experts`` None is any number of them."""
    return [
        flavour
        for flavour in FLAVOURS.values()
        if (flavour.in_channels, flavour.image_context) == (in_channels, image_context)
        and (flavour.condition == "first_and_last_frame") == last_frame
        and experts in (None, flavour.experts)
    ]
