"""FLOP of a training step, in closed form over the network's dimensions.

A multiplication and an addition are 2 FLOP. A matrix costs 2 FLOP per parameter and token. Attention of S queries to
L keys over the width D costs 4·S·L·D forward and, as FlashAttention computes it, 2.5 times that backward (scores again,
and four products), which is also how kernels' speeds are published (arXiv:2307.08691). Norms, activations and losses
are not counted: they are traffic, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from functools import reduce
from math import prod

from tuner.spec import Linear, NetworkSpec
from tuner.workload import Workload

ATTENTION_BACKWARD = 2.5
"""Times the forward that the backward of a fused attention kernel computes: five products for two."""
FREQUENCIES = 256
"""Width of the embedding of a time, in diffusers' models."""


@dataclass(frozen=True)
class Pass:
    """FLOP of one pass over one block or more."""

    linear: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, times: float) -> Pass:
        return Pass(self.linear * times, self.attention * times)


@dataclass(frozen=True)
class StepFlops:
    """FLOP of an optimizer step in one process, or of one block's part of it."""

    forward: Pass = field(default_factory=Pass)
    recompute: Pass = field(default_factory=Pass)
    """what checkpointing computes a second time"""
    backward: Pass = field(default_factory=Pass)
    self_attention: float = 0.0
    """of the forward"""
    model: float = 0.0
    """What MFU is counted in (PaLM, arXiv:2204.02311, appendix B): no recomputation, no adapters; matrices once for the
    forward, once for their inputs' gradients and, where they are trained, once for their own; attention three times."""

    @property
    def linear(self) -> float:
        """Matrix multiplications, of all three passes."""
        return self.forward.linear + self.recompute.linear + self.backward.linear

    @property
    def attention_forward(self) -> float:
        """Attention kernels' forward, recomputation included."""
        return self.forward.attention + self.recompute.attention

    @property
    def hardware(self) -> float:
        """All that is computed."""
        return self.linear + self.attention_forward + self.backward.attention

    @property
    def self_attention_share(self) -> float:
        """Share of self-attention in the forward."""
        return self.self_attention / (self.forward.linear + self.forward.attention)

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(
            self.forward + other.forward,
            self.recompute + other.recompute,
            self.backward + other.backward,
            self.self_attention + other.self_attention,
            self.model + other.model,
        )


def step_flops(workload: Workload) -> StepFlops:
    """FLOP of an optimizer step of ``workload`` in one process: all micro-batches, all blocks, and what is around them.

    LoRA computes no gradient of a frozen matrix, and none of what text becomes: the backward of a block is one product
    for each matrix over tokens, and two for each of the adapters'. Training the network adds the matrices' own.
    """
    return total([*block_flops(workload), outside_flops(workload)])


def total(parts: Iterable[StepFlops]) -> StepFlops:
    """The sum of ``parts``."""
    return reduce(StepFlops.__add__, parts, StepFlops())


def block_flops(workload: Workload) -> list[StepFlops]:
    """FLOP of each block in an optimizer step."""
    known: dict[tuple[int, bool], StepFlops] = {}
    found = []
    for index, tokens in enumerate(workload.block_tokens):
        case = tokens, is_checkpointed(workload, index)
        if case not in known:
            known[case] = _block(workload, *case)
        found.append(known[case])
    return found


def is_checkpointed(workload: Workload, index: int) -> bool:
    """Whether block ``index`` is computed again in backward."""
    return workload.checkpointing != "none" and index % workload.checkpointing_interval == 0


def _block(workload: Workload, tokens: int, checkpointed: bool) -> StepFlops:
    """One block that sees ``tokens`` tokens of each clip."""
    network, clips = workload.network, workload.samples * workload.micro_batches
    over_tokens, over_context = _matrices(network, tokens)
    adapters = _adapters(workload, tokens)
    self_attention = 4.0 * tokens * tokens * network.dim
    attention = self_attention + 4.0 * tokens * context_tokens(network) * network.dim
    trained = workload.trained == "network"
    backward = over_tokens + (over_tokens + 2 * over_context if trained else 0.0)
    recompute = Pass()
    if checkpointed:
        kept = self_attention if workload.checkpointing == "selective" else 0.0
        once = workload.activations(workload, tokens, True).once if workload.activations else frozenset()
        recompute = Pass(sum(_matrices(network, tokens, without=once)) + adapters, attention - kept)
    recompute += Pass(_chunked_feed_forward(workload, tokens))
    return StepFlops(
        forward=Pass(over_tokens + over_context + adapters, attention) * clips,
        recompute=recompute * clips,
        backward=Pass(backward + 2 * adapters, ATTENTION_BACKWARD * attention) * clips,
        self_attention=self_attention * clips,
        model=((over_tokens + over_context) * (3 if trained else 2) + 3 * attention) * clips,
    )


def _matrices(network: NetworkSpec, tokens: int, without: Set[str] = frozenset()) -> tuple[float, float]:
    """Forward FLOP of a block's matrices on one clip: of those over tokens, and of those over text and frames."""
    length = {"tokens": tokens, "text": network.text_tokens, "image": network.image_tokens}
    found = [linear for linear in network.matrices if linear.name not in without]
    cost = [(linear, 2.0 * length[linear.over] * linear.inputs * linear.outputs) for linear in found]
    return (
        sum(flops for linear, flops in cost if linear.over == "tokens"),
        sum(flops for linear, flops in cost if linear.over != "tokens"),
    )


def _adapters(workload: Workload, tokens: int) -> float:
    """Forward FLOP of the adapters of one block on one clip."""
    network, on_text = workload.network, workload.adapter_parameters_on_text
    per_clip = (workload.adapter_parameters - on_text) * tokens + on_text * network.text_tokens
    return 2.0 * per_clip / network.blocks


def context_tokens(network: NetworkSpec) -> int:
    """Tokens beside the clip's own that a block attends to: those of text and frames that it has matrices for."""
    read = {linear.over for linear in network.matrices}
    return network.text_tokens * ("text" in read) + network.image_tokens * ("image" in read)


def _chunked_feed_forward(workload: Workload, tokens: int) -> float:
    """FLOP on one clip that a feed-forward layer computes once more in backward because it is chunked.

    Its last matrix is not among them: torch's checkpoint stops once it has what backward needs.
    """
    limit = workload.feed_forward_tokens
    if limit is None or tokens <= limit:
        return 0.0
    return sum(
        2.0 * tokens * each.inputs * each.outputs for each in workload.network.matrices if _widens(each, workload)
    )


def _widens(linear: Linear, workload: Workload) -> bool:
    network = workload.network
    return linear.over == "tokens" and linear.outputs == network.ffn_dim and linear.outputs != linear.inputs


def outside_flops(workload: Workload) -> StepFlops:
    """FLOP around the blocks: patches in and out, embedders of text and time. Backward only where they are trained."""
    network, clips = workload.network, workload.samples * workload.micro_batches
    dim, patch = network.dim, prod(network.patch)
    channels = network.in_channels + workload.latents.channels
    times = workload.tokens if network.per_token_times and workload.shape[0] > 1 else 1
    parameters_by_length = (
        (dim * patch * channels, workload.tokens),
        (network.text_dim * dim + dim * dim, network.text_tokens),
        (FREQUENCIES * dim + 7 * dim * dim, times),
    )
    forward = sum(2.0 * parameters * length for parameters, length in parameters_by_length) * clips
    backward = forward if workload.trained == "network" else 0.0
    return StepFlops(forward=Pass(forward), backward=Pass(backward), model=forward + backward)
