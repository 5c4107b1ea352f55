"""The flavours of Wan: where each lives and what it looks like, so that nothing need be downloaded to know.

Figures from the repositories' own config.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuner.errors import ConfigError, nearest
from tuner.spec import LatentGeometry

DEFAULT_FLAVOUR = "t2v-480p-1.3b-2.1"
TEXT_TOKENS = 512
"""Length of the text that the network reads; shorter prompts are padded with zeros, without a mask."""
HEAD_DIM = 128


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
    flow_shift: float = 5.0
    """Shift of the sampler where the model has no scheduler config: 3 for 480p, 5 above (Wan's authors' advice)."""
    image_context: bool = False
    """Whether CLIP embeddings of an image go into cross-attention (2.1 image to video)."""
    experts: int = 1
    trains: bool = False
    """Whether this version trains it."""

    @property
    def dim(self) -> int:
        """Width of the denoiser."""
        return self.heads * HEAD_DIM

    @property
    def latents(self) -> LatentGeometry:
        """How pixels become latents; every flavour's VAE makes one latent frame of four."""
        return LatentGeometry(channels=self.latent_channels, stride_time=4, stride_space=self.stride_space)


def _of_14b(name: str, repository: str, **extra: float | bool) -> Flavour:
    return Flavour(name, f"Wan-AI/{repository}", blocks=40, heads=40, ffn_dim=13824, **extra)  # type: ignore[arg-type]


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            DEFAULT_FLAVOUR,
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            blocks=30,
            heads=12,
            ffn_dim=8960,
            flow_shift=3.0,
            trains=True,
        ),
        _of_14b("t2v-480p-14b-2.1", "Wan2.1-T2V-14B-Diffusers", flow_shift=3.0, trains=True),
        _of_14b("i2v-14b-2.1", "Wan2.1-I2V-14B-480P-Diffusers", in_channels=36, image_context=True),
        _of_14b("i2v-14b-2.1-720p", "Wan2.1-I2V-14B-720P-Diffusers", in_channels=36, image_context=True),
        _of_14b("flf2v-14b-2.1", "Wan2.1-FLF2V-14B-720P-diffusers", in_channels=36, image_context=True),
        _of_14b("t2v-14b-2.2-high", "Wan2.2-T2V-A14B-Diffusers", experts=2),
        _of_14b("t2v-14b-2.2-low", "Wan2.2-T2V-A14B-Diffusers", experts=2),
        _of_14b("i2v-14b-2.2-high", "Wan2.2-I2V-A14B-Diffusers", in_channels=36, experts=2),
        _of_14b("i2v-14b-2.2-low", "Wan2.2-I2V-A14B-Diffusers", in_channels=36, experts=2),
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


def choose(name: str | None, base: str | None) -> Flavour:
    """The flavour called ``name``; without a name that of the known repository ``base``, else the default.

    Raises ConfigError for an unknown name, for a flavour that this version does not train, and where
    name and repository contradict each other.
    """
    from_base = [flavour for flavour in FLAVOURS.values() if base is not None and flavour.repository == base]
    if name is None:
        flavour = from_base[0] if from_base else FLAVOURS[DEFAULT_FLAVOUR]
    elif name in FLAVOURS:
        flavour = FLAVOURS[name]
    else:
        raise ConfigError(
            f"model_flavour {name!r} is not a flavour of wan", allowed=trained(), nearest=nearest(name, FLAVOURS)
        )
    if not flavour.trains:
        raise coming_later(flavour)
    if from_base and flavour not in from_base:
        raise ConfigError(
            f"model_flavour is {flavour.name!r}, but pretrained_model_name_or_path {base!r} is {from_base[0].name!r}",
            remedy=f"drop one of the two, or set pretrained_model_name_or_path to {flavour.repository}",
        )
    return flavour


def trained() -> list[str]:
    """Names of the flavours that this version trains."""
    return [flavour.name for flavour in FLAVOURS.values() if flavour.trains]


def coming_later(flavour: Flavour, where: object = None) -> ConfigError:
    """The error for a flavour that is known and not trained yet."""
    return ConfigError(
        f"flavour {flavour.name!r} comes with a later release of the wan plugin", where=where, allowed=trained()
    )


def resembling(in_channels: int, *, image_context: bool, last_frame: bool) -> Flavour | None:
    """The flavour that a denoiser of these properties looks like; None when it is like none."""
    for flavour in FLAVOURS.values():
        same = (flavour.in_channels, flavour.image_context) == (in_channels, image_context)
        if same and flavour.name.startswith("flf2v") == last_frame:
            return flavour
    return None
