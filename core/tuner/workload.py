"""What a training step of one network does and holds, in numbers that the config gives: no torch, no weights.

The core fills in what it knows; each plugin says with the hook ``estimate`` what it changes. The closed-form
models of speed and memory (the built-in ``planner``) read nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from tuner.errors import PluginError

if TYPE_CHECKING:
    from tuner.data.samples import Bucket
    from tuner.manager import Manager
    from tuner.run import Run
    from tuner.spec import Activations, LatentGeometry, ModelSpec, NetworkSpec

BYTES = {"bf16": 2.0, "fp32": 4.0}


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one network on clips of one shape."""

    network: NetworkSpec
    latents: LatentGeometry
    shape: tuple[int, int, int]
    """(frames, height, width) of a clip in pixels"""
    samples: int
    """clips in a micro-batch"""
    micro_batches: int = 1
    """micro-batches of a step, in this process"""
    activation_bytes: float = 2.0
    """per element of an activation"""
    weight_bytes: float = 2.0
    """per element of a block's matrices"""
    resident_blocks: int | None = None
    """Blocks whose weights are on the device at any time; None is all of them."""
    offloaded_to: Literal["host", "disk"] = "host"
    """Where the weights of the other blocks wait."""
    shards: int = 1
    """Processes that the network's own weights, and what is kept for training them, are spread over."""
    gathered_blocks: int | None = None
    """Blocks that are whole at any time where weights are spread; None is all of them."""
    parts_on_host: bool = False
    """Whether the parts wait on the host, and the optimizer works there."""
    waiting: frozenset[str] = frozenset()
    """What is on the host while it is not at work: a component's name for one of whose blocks two are on the device at
    a time, ``network`` for a denoiser that leaves while others encode or decode."""
    trained: Literal["adapter", "network"] = "adapter"
    """What gets a gradient."""
    adapter_parameters: int = 0
    """Trained parameters beside the network's own."""
    adapter_parameters_on_text: int = 0
    """Those of them that are applied to the text, not to the tokens."""
    adapted_width: int = 0
    """Inputs of the adapted matrices over tokens, summed over one block: what adapters keep of a token."""
    adapted_inputs: frozenset[str] = frozenset()
    """Names of these inputs, where the family names them."""
    gradients_released: bool = False
    """Whether each gradient is applied and freed as soon as it is known."""
    optimizer_bytes: float = 8.0
    """Optimizer state per trained parameter."""
    average_bytes: float = 0.0
    """Of an average of the weights on the device, per trained parameter."""
    average_bytes_on_host: float = 0.0
    """The same on the host."""
    dropped: tuple[float, ...] = ()
    """Share of the tokens that each block does not see; empty is none."""
    dropped_sometimes: bool = False
    """Whether there are steps that drop nothing, for which memory must be there."""
    checkpointing: str = "full"
    """How activations are kept for backward: ``none``, ``full``, ``selective`` or ``offload``."""
    checkpointing_interval: int = 1
    """Every so many-th block is checkpointed."""
    activations: Callable[[Workload, int, bool], Activations] | None = field(default=None, compare=False, repr=False)
    """What a block holds, where it is computed in another way than the family's plain one: given this, how many tokens
    of a clip the block sees, and whether it is checkpointed. None is as the family says."""
    traffic: float = 1.0
    """Elementwise traffic of a block beside that of the family's plain one."""
    feed_forward_tokens: int | None = None
    """Tokens that a feed-forward layer computes at a time, recomputed in backward; None is all, kept."""
    rendered: tuple[int, int, int] | None = None
    """(frames, height, width) in pixels of the clips that validation renders; None is no rendering."""

    @property
    def tokens(self) -> int:
        """Tokens S of one clip."""
        return self.network.tokens(*self.latents.shape(*self.shape)[1:])

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Tokens of one clip that each block sees (``S - round(S * dropped)``)."""
        tokens, dropped = self.tokens, self.dropped or (0.0,) * self.network.blocks
        return tuple(tokens - round(tokens * share) for share in dropped)


FIELDS = frozenset(each.name for each in fields(Workload))


def of(run: Run, spec: ModelSpec, manager: Manager, network: NetworkSpec, bucket: Bucket, samples: int) -> Workload:
    """The workload of ``network`` on ``samples`` clips of ``bucket`` at once, as all loaded plugins have it.

    Raises PluginError where two plugins answer for one thing, or for one that is none.
    """
    config = run.config
    width = BYTES["fp32" if config.mixed_precision == "no" else "bf16"]
    plain = Workload(
        network=network,
        latents=spec.latents,
        shape=(bucket.frames, bucket.height, bucket.width),
        samples=samples,
        micro_batches=config.gradient_accumulation_steps,
        activation_bytes=width,
        weight_bytes=BYTES[config.base_model_default_dtype] if config.base_model_default_dtype else width,
        trained="network" if config.model_type == "full" else "adapter",
        checkpointing=config.checkpointing,
        checkpointing_interval=config.gradient_checkpointing_interval,
    )
    owner: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for plugin, answer in manager.collect("estimate", run=run, spec=spec, workload=plain):
        _take(plugin, answer, changes, owner)
    return replace(plain, **changes)


def _take(plugin: str, answer: Mapping[str, Any], changes: dict[str, Any], owner: dict[str, str]) -> None:
    for name, value in answer.items():
        if name not in FIELDS:
            raise PluginError(f"hook 'estimate' of plugin {plugin!r} answers for {name!r}", allowed=sorted(FIELDS))
        if name in owner:
            raise PluginError(f"plugins {owner[name]!r} and {plugin!r} both answer for {name!r} in hook 'estimate'")
        owner[name], changes[name] = plugin, value
