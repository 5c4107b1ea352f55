"""What a model family hands over, and what passes between it and the core.

Nothing outside a family knows more about its model than the types of this file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tuner.blocks import BlockStack, Residency, SequenceParallel, StepContext, Trampoline
from tuner.checkpointing import Checkpointing
from tuner.errors import PluginError
from tuner.spec import ModelSpec, NetworkSpec

EncodeKind = Literal["text", "video", "conditioning"]


class Stage(IntEnum):
    """When a model edit happens, whatever order its plugins were named in."""

    QUANTIZE = 1
    """weights replaced, tensor by tensor as they are read"""
    ADAPT = 2
    """LoRA and its kind attached"""
    REWRITE = 3
    """attention and feed-forward rewritten"""
    CHECKPOINT = 4
    """activation checkpointing"""
    COMPILE = 5
    """torch.compile"""
    PLACE = 6
    """offload, or onto the device"""


class Sink(Protocol):
    """Takes weights as they are read, in place of the plain copy into the parameter."""

    def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
        """Take parameter ``name`` (its full name in ``module``), already in its final dtype; False to decline.

        A sink that comes after one that took it is offered the parameter that this one put in its place.
        """


@dataclass(frozen=True)
class Adapter:
    """What is trained on one network: its parameters in groups, and how its state is read and written."""

    kind: str
    """``lora``, ``full``, ``lycoris`` …"""
    groups: tuple[ParameterGroup, ...]
    state: Callable[[], dict[str, Tensor]]
    """Trained tensors by name, as ``save`` formats them; views, on whatever device they live, or each process's part
    of them (``tuner.sharded``)."""
    load: Callable[[Mapping[str, Tensor]], None]
    """Copy a state into the existing tensors (never replaces their storage). Raises CheckpointError on other names."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """rank, alpha and the like, for file metadata"""
    disabled: Callable[[], AbstractContextManager[None]] | None = None
    """While entered, the network computes as if it had never been adapted; what requires a gradient stays as it is.
    None where there is no way back to the base, as in training the network itself."""
    scaled: Callable[[float], AbstractContextManager[None]] | None = None
    """While entered, what it adds counts that many times; None where that has no meaning."""


class Sharding(Protocol):
    """A network whose parameters are spread over the processes, each forward of which needs every process."""

    saves_parts: bool
    """Whether each process writes its own parts into a checkpoint; else the main process writes all of them whole."""

    def synchronise(self, last: bool) -> None:
        """Called before each micro-batch: the gradients are summed over the processes after the ``last`` of a step."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate scale and a weight decay setting, named for logs and errors."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    rate_scale: float = 1.0
    weight_decay: bool = True


@dataclass(frozen=True)
class Transform:
    """One edit of a network, declared by a plugin and applied by the core in order of stage.

    ``claims`` names what it takes for itself, such as ``feed_forward`` or ``base_weights``: two
    transforms with one claim on the same network are an error that names both.
    """

    stage: Stage
    name: str
    claims: frozenset[str]
    apply: Callable[[Network], Adapter | None]
    """Edits the network; a transform of stage ADAPT returns the adapter, others None."""
    networks: frozenset[str] | None = None
    """Names of the networks it applies to; None is all."""
    sink: Callable[[Network], Sink] | None = None
    """Made before the weights are read; only for QUANTIZE and PLACE."""


@dataclass
class Network:
    """One denoiser: its module (without storage until the core materialises it) and how to run and fill it."""

    spec: NetworkSpec
    module: nn.Module
    stack: BlockStack
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """A fresh iterator over (parameter name, tensor), read lazily from disk, one tensor in memory at a time."""
    dtype_of: Callable[[str], torch.dtype]
    """The dtype each parameter must have (norms and modulation stay float32, say)."""
    trampoline: Trampoline
    feed_forwards: Mapping[str, nn.Module] = field(default_factory=dict)
    """Feed-forward modules by name: token-wise, (B, S, D) -> (B, S, D)."""
    attention_processors: Callable[[], Iterable[Any]] = tuple
    """Objects with diffusers' ``_attention_backend`` attribute, one per attention of the denoiser."""
    residency: Residency | None = None
    sharding: Sharding | None = None
    """Where each process holds a part of the parameters; None where all hold them whole."""
    sequence: SequenceParallel | None = None
    """Where processes share each sample, and each runs the blocks over a part of its tokens."""
    checkpointing: Checkpointing | None = None
    """Another policy than keeping the blocks' inputs, where a transform put one."""
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """The network's name, e.g. ``transformer``."""
        return self.spec.name

    @contextmanager
    def base(self) -> Iterator[None]:
        """While entered, the network as it was before training: adapter off, evaluation mode, no gradient, no routes.

        Residency stays: the weights may live elsewhere. All is restored on exit. Raises PluginError where the
        adapter cannot be switched off.
        """
        if self.adapter is not None and self.adapter.disabled is None:
            raise PluginError(
                f"the base of network {self.name!r} cannot be run: its adapter ({self.adapter.kind}) "
                "cannot be switched off",
                remedy="train a LoRA, or leave out what needs the base's own prediction",
            )
        disabled = self.adapter.disabled() if self.adapter and self.adapter.disabled else nullcontext()
        with disabled, self.inference():
            yield

    @contextmanager
    def inference(self) -> Iterator[None]:
        """While entered: evaluation mode, no gradient, no routes. Residency stays; all is restored on exit."""
        context = self.trampoline.context
        modes = [(each, each.training) for each in self.module.modules()]
        with torch.no_grad():
            try:
                self.module.eval()
                self.trampoline.context = StepContext(residency=self.residency, sequence=self.sequence)
                yield
            finally:
                self.trampoline.context = context
                for module, training in modes:
                    module.training = training


@dataclass(frozen=True)
class Component:
    """An encoder or decoder that is loaded for a phase and freed after it."""

    load: Callable[[], Any]
    files: tuple[Path, ...]
    """config.json, the safetensors and whatever else decides its output: the cache's fingerprint is made of them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """precision, tiling and whatever else changes its output"""
    around: Callable[[Component], AbstractContextManager[Any]] | None = None
    """Takes the place of ``load`` where a plugin has something to do when its phase begins and ends: gives what
    ``load`` gives, and when it is left nothing holds that any more."""
    on_host: Callable[[], tuple[Any, Network]] | None = None
    """The same on the CPU, and its module as a network whose blocks a plugin may stream through the device: what lies
    outside of them computes where it is. None where the family has no such way."""
    version: int = 1
    """Bumped by hand when the family's encoding code changes its output (guarded by a golden test)."""

    def phase(self) -> AbstractContextManager[Any]:
        """What gives the component when it is entered."""
        return nullcontext(self.load()) if self.around is None else self.around(self)


@dataclass(frozen=True)
class EncodeBatch:
    """What a family is asked to encode for the cache."""

    kind: EncodeKind
    captions: tuple[str, ...] = ()
    """for ``text``"""
    pixels: Tensor | None = None
    """for ``video`` and ``conditioning``: (B, 3, F, H, W) float32 in [-1, 1]"""
    frames: Mapping[str, Tensor] = field(default_factory=dict)
    """Frames that stand in the place of the clip's own: role (``first_frame``, ``last_frame``) -> (B, 3, 1, H, W)"""

    def frame(self, role: str) -> Tensor:
        """(B, 3, 1, H, W): the frame of that role, the clip's own first or last one where no other was given."""
        assert self.pixels is not None
        own = self.pixels[:, :, -1:] if role == "last_frame" else self.pixels[:, :, :1]
        return self.frames.get(role, own)


Encoded = list[dict[str, Tensor]]
"""One dict of tensors for each item of the batch, without a batch axis, as it is stored and collated.
``video`` gives at least ``latents`` (C, F', h, w); ``text`` gives tensors whose first axis is the true length."""


@dataclass
class Batch:
    """One micro-batch on the device. The core fills it; a ``compute_loss`` wrapper may replace its noise fields.

    B samples; latents have the shape (B, C, F', h, w).
    """

    latents: Tensor
    text: dict[str, Tensor]
    """What ``encode_batch`` gave for the captions; the first axis is zero-padded to the longest of the batch."""
    video: dict[str, Tensor]
    """What ``encode_batch`` gave beside ``latents`` for the clips."""
    sample_ids: tuple[str, ...]
    positions: tuple[int, ...]
    """Position of each sample in the global batch of this optimizer step."""
    sigmas: Tensor
    """(B,) float32 in [0, 1]"""
    noise: Tensor
    noisy: Tensor
    """(1 - sigma) * latents + sigma * noise"""
    target: Tensor
    """noise - latents"""
    keep_at_least: int = 0
    """the largest number of forced tokens of its samples: no route may keep fewer"""
    mask: Tensor | None = None
    """(B, 1, F', h, w) float32 in [0, 1]: how much each place counts in the loss; None is everywhere alike"""
    forced: Tensor | None = None
    """(B, S) bool: tokens that no route may drop; None is none of them"""
    regularisation: tuple[bool, ...] = ()
    """Which samples hold the model to its base; empty is none of them."""
    levels: tuple[float, ...] = ()
    """``sigmas`` as the core drew them, for the host to read without waiting for the device; empty where it did not"""


@dataclass(frozen=True)
class Loss:
    """What ``compute_loss`` answers."""

    per_sample: Tensor
    """(B,) float32, with its graph"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """detached scalars for the log"""


@dataclass(frozen=True)
class LayerSkip:
    """Skip-layer guidance: away from what the network predicts for the prompt without some of its blocks.

    As ``diffusers.guiders.SkipLayerGuidance`` does it, whose words these are.
    """

    layers: tuple[int, ...]
    """Blocks that are left out, from 0."""
    scale: float
    start: float
    """Fraction of the steps after which it begins."""
    stop: float
    """Fraction of the steps before which it ends."""


@dataclass(frozen=True)
class SampleRequest:
    """What validation asks a family to render."""

    prompt: Mapping[str, Tensor]
    """The prompt as ``encode_batch`` gave it (first axis its true length)."""
    negative: Mapping[str, Tensor]
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    seed: int
    scheduler: str
    flow_shift: float | None
    guidance_2: float | None = None
    """Guidance of the expert of low noise, where there are two; None is the same."""
    rescale: float = 0.0
    """How far the guided prediction is brought back to the deviation of the unguided one (arXiv:2305.08891, 3.4)."""
    layer_skip: LayerSkip | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """What ``encode_batch`` gave, beside ``latents``, for the frames that the clip starts from (and ends at); empty
    where the model takes none."""
    on_step: Callable[[int], None] | None = None
    """Called with the number of steps done, for the progress bar."""
    on_prediction: Callable[[int, Tensor], None] | None = None
    """Called after each step, before ``on_step``, with the number of steps done and the clean latents (1, C, F', h, w),
    float32, that the step was taken towards: noisy latents - sigma * predicted velocity. It must not change them.
    A family that cannot tell them does not call it."""


class Model(ABC):
    """A family's model: its networks, its encoders by phase, and sampling for validation."""

    spec: ModelSpec
    networks: dict[str, Network]
    components: dict[str, Component]
    guidance: frozenset[str] = frozenset()
    """What of a SampleRequest it heeds beside plain guidance: ``rescale``, ``layer_skip``."""

    def __init__(
        self,
        spec: ModelSpec,
        networks: Sequence[Network],
        components: Mapping[str, Component],
        active: str | None = None,
    ) -> None:
        self.spec = spec
        self.networks = {network.name: network for network in networks}
        self.components = dict(components)
        self.active = active or networks[0].name
        self._held: dict[str, Any] = {}

    @property
    def network(self) -> Network:
        """The network being trained now."""
        return self.networks[self.active]

    @contextmanager
    def use(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """The named components, loaded on entry unless an outer ``use`` holds them, freed on the outermost exit."""
        with ExitStack() as phases:
            for name in names:
                if name not in self._held:
                    self._held[name] = phases.enter_context(self.components[name].phase())
                    phases.callback(self._held.pop, name)  # gone before its phase ends
            yield tuple(self._held[name] for name in names)

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Velocity (B, C, F', h, w) that the active network predicts for ``batch.noisy`` at ``batch.sigmas``.

        It reads nothing else of the noise fields, and neither target nor mask.
        """

    def forced_tokens(self, grid: tuple[int, int, int]) -> Tensor | None:
        """(S,) bool on the CPU: tokens of a clip of ``grid`` latent (frames, height, width) that no route may drop.

        None is none of them: that is so unless a family says otherwise.
        """
        return None

    @abstractmethod
    def sample(self, request: SampleRequest) -> Tensor:
        """Latents (1, C, F', h, w) of a rendered clip, through the network's own forward, without routes."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Frames (F, H, W, 3) uint8 of latents (1, C, F', h, w)."""
