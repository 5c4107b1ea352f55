"""Facts about a model that need no weights and no torch.

``tuner check``, the buckets, the data report, the export of LoRA files and the planner read these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LatentGeometry:
    """How pixels become latents.

    ``stride_time`` pixel frames (after the first) make one latent frame, so the allowed frame counts
    are ``stride_time * k + 1``; one frame is an image.
    """

    channels: int
    stride_time: int
    stride_space: int

    def frames_allowed(self, frames: int) -> int:
        """The largest allowed number of pixel frames that is at most ``frames`` (75 gives 73 for stride 4)."""
        return 0 if frames < 1 else (frames - 1) // self.stride_time * self.stride_time + 1

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, latent frames, latent height, latent width) of a clip of that many frames and pixels."""
        side = self.stride_space
        return self.channels, (frames - 1) // self.stride_time + 1, height // side, width // side


@dataclass(frozen=True)
class Linear:
    """One matrix of a block, for the FLOP model, the memory model and the size of adapters."""

    name: str
    """The end of its module's name, such as ``attn1.to_q``."""
    inputs: int
    outputs: int
    over: Literal["tokens", "text", "image"] = "tokens"
    """What it is applied to: every token of the clip, the text, or the embedding of a frame."""
    within: tuple[str, ...] = ()
    """Classes of the modules around it, as adapters' settings name them: of the block, then of what lies in that."""
    input: str = ""
    """A name for what it is applied to: matrices of a block that are given one tensor have one; empty is its own."""


@dataclass(frozen=True)
class Held:
    """How much of a token is in memory, for the memory model: elements, by their kind."""

    dim: float = 0.0
    """of the network's width, in the activations' type"""
    float32: float = 0.0
    """of the network's width, in float32 whatever the activations are"""
    wide: float = 0.0
    """of the feed-forward's width, in the activations' type"""


@dataclass(frozen=True)
class Activations:
    """What one block holds for each token that it sees, adapters and the log-sum-exp of attention not counted.

    ``forward``, ``recompute`` and ``backward`` are what is held beside ``kept`` where that pass holds most, the
    gradient that comes in among it; several where the widths decide which moment that is.
    """

    kept: Held
    """From its forward to its backward; ``wide`` is the feed-forward's share."""
    forward: Held
    recompute: tuple[Held, ...]
    backward: tuple[Held, ...]
    inference: tuple[Held, ...]
    """Held without gradients, where that is most; nothing is kept."""
    context: Held
    """Kept for each token of the text or of embedded frames."""
    around: Held = Held()
    """Held throughout for each token of the clip, beside the blocks."""
    inputs: frozenset[str] = frozenset()
    """Names of inputs of matrices that are among ``kept``, or made again: an adapter keeps no more of these. ``text``
    is what all blocks read, which matrices over the text may be given as it is."""
    once: frozenset[str] = frozenset()
    """Names of matrices that the recomputation of a checkpointed block leaves out."""
    companions: float = 0.0
    """Bytes for each token that all blocks read, such as rotary tables: once for all clips, and for each after a
    route took tokens out."""


@dataclass(frozen=True)
class NetworkSpec:
    """Dimensions of one denoiser, for the routes, the FLOP model and the memory model."""

    name: str
    blocks: int
    dim: int
    heads: int
    ffn_dim: int
    text_dim: int
    text_tokens: int
    in_channels: int
    patch: tuple[int, int, int] = (1, 2, 2)
    label: str = ""
    """What people call it beside others of its model, such as ``high_noise``; empty where it is alone."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """The noise levels this network is trained on (half open at the low end's upper bound)."""
    linears: tuple[Linear, ...] = ()
    """The matrices of one block; a family that names none is taken for self-attention, cross-attention on the text
    and a feed-forward of two (see :attr:`matrices`)."""
    small: int = 0
    """Parameters of one block that are in no matrix: biases, norms, modulation."""
    other: int = 0
    """Parameters outside the blocks."""
    image_tokens: int = 0
    """Tokens of the embedded frames that cross-attention reads beside the text."""
    per_token_times: bool = False
    """Whether in a clip of several frames each token has a time, and so a modulation, of its own."""
    activations: Callable[[NetworkSpec, bool, bool], Activations] | None = field(
        default=None, compare=False, repr=False
    )
    """What a block holds, where the family knows it: given the network, whether its own weights are trained, and
    whether each token has a time. None takes the usual block's."""

    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    """Shapes of all weights by module name, in the blocks and outside, where the family knows them: adapter files are
    held against these."""

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """``linears``, or those of the usual block of this width."""
        dim, wide = self.dim, self.ffn_dim
        usual = [Linear(f"self.{each}", dim, dim) for each in ("q", "k", "v", "out")]
        usual += [Linear("cross.q", dim, dim), Linear("cross.out", dim, dim)]
        usual += [Linear("cross.k", dim, dim, "text"), Linear("cross.v", dim, dim, "text")]
        usual += [Linear("ffn.up", dim, wide), Linear("ffn.down", wide, dim)]
        return self.linears or tuple(usual)

    def tokens(self, latent_frames: int, latent_height: int, latent_width: int) -> int:
        """Length S of the sequence that the blocks see."""
        time, height, width = self.patch
        return (latent_frames // time) * (latent_height // height) * (latent_width // width)


@dataclass(frozen=True)
class ModelSpec:
    """What :func:`describe_model` answers: everything the core may know of a model before loading it."""

    family: str
    flavour: str
    base: str
    """Where the weights come from: a folder or a hub repository."""
    networks: tuple[NetworkSpec, ...]
    latents: LatentGeometry
    size_multiple: int
    """Width and height of a training clip must be multiples of this many pixels."""
    fps: float
    """Frame rate that the base model was trained at."""
    adapter_targets: tuple[str, ...]
    """Module name suffixes that LoRA adapts by default."""
    encoders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Kind of encoding (``text``, ``video``, ``conditioning``) to the components it needs."""
    components: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Sizes of encoders and decoders, for the memory model. ``weights``: bytes, as they are loaded where nothing
    quantises them; ``matrices``: parameters that a quantiser takes; ``blocks``: how many could stream; ``working``:
    bytes held while it works, and for each pixel of a frame ``encode_picture``, ``encode_clip``, ``decode_picture``
    and ``decode_clip``; ``frame``: bytes a pixel that each decoded frame adds; ``tile``: pixels of a tile."""
    conditioning_frames: tuple[str, ...] = ()
    """Frames that the encoders of kind ``conditioning`` embed: ``first_frame``, ``last_frame``."""
    condition: str = "none"
    """What the denoiser is given beside the text: ``first_frame``, ``first_and_last_frame``, ``clean_first_frame``
    (the first latent frame goes in without noise), or ``none``."""
    boundary: float | None = None
    """The noise level at which the first of two experts hands over to the second."""
    switch_steps: int = 0
    """Optimizer steps that each network is trained before the next one's turn; 0 where there is one network."""
    rename: tuple[tuple[str, str], ...] = ()
    """Pairs (diffusers module suffix, original module suffix) for exported LoRA keys, most specific first."""
    license: str = ""
    """Identifier of the published base's licence, as model cards have it; empty where it is not known."""
    defaults: dict[str, object] = field(default_factory=dict)
    """Core keys this model would rather have another default for, such as ``validation_guidance``."""

    @property
    def frames_taken(self) -> tuple[str, ...]:
        """Roles of the frames that the denoiser is given: ``first_frame``, ``last_frame``."""
        last = ("last_frame",) if self.condition == "first_and_last_frame" else ()
        return () if self.condition == "none" else ("first_frame", *last)

    def network(self, name: str) -> NetworkSpec:
        """The network called ``name``; KeyError when there is none."""
        return next(network for network in self.networks if network.name == name)

    @property
    def public_base(self) -> str:
        """The base as files for others name it: a hub repository as it is, of a folder only its name."""
        base = self.base
        is_repository = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
        return base if is_repository else Path(base).name

    def original_name(self, module: str) -> str:
        """A module's name in the model's original code, e.g. ``blocks.0.self_attn.q`` for ``blocks.0.attn1.to_q``."""
        for ours, theirs in self.rename:
            if module == ours or module.endswith("." + ours):
                return module[: len(module) - len(ours)] + theirs
        return module
