"""What each block of a step holds: its input, what its backward needs, and what is held beside while it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from tuner.flops import is_checkpointed
from tuner.spec import Activations, Held, NetworkSpec
from tuner.workload import Workload

FLOAT32 = 4
TEXT = "text"
"""Among an adapter's inputs: what all blocks read, as it is."""
RING = 2
"""Blocks that stream through the device at a time, where each moves alone."""
USUAL = Activations(
    kept=Held(dim=6, float32=6, wide=1),
    forward=Held(dim=4, float32=4),
    inference=(Held(dim=5, float32=4), Held(dim=5, wide=2)),
    recompute=(Held(dim=4, float32=3), Held(dim=4, float32=1, wide=1)),
    backward=(Held(dim=1, wide=2),),
    context=Held(dim=2, float32=1),
)
USUAL_TRAINED = Activations(
    kept=Held(dim=10, float32=10, wide=2),
    forward=Held(dim=3, float32=4),
    inference=(Held(dim=5, float32=4), Held(dim=5, wide=2)),
    recompute=(Held(dim=3, float32=2),),
    backward=(Held(dim=1, wide=1),),
    context=Held(dim=4, float32=2),
)
"""A block with self-attention, cross-attention and a feed-forward of two matrices, norms and modulation in float32:
Wan's without its rotary tables."""


@dataclass(frozen=True)
class Block:
    """Bytes of one block, for all clips of a micro-batch."""

    checkpointed: bool
    offloaded: bool
    """whether its input waits on the host"""
    input: float
    held: float
    """on the device, once its forward is done"""
    kept: float
    """what its backward needs, once that is computed"""
    forward: float
    recompute: tuple[float, ...]
    backward: tuple[float, ...]
    """beside that, at the worst moments"""
    copies: float
    """of trained parameters in the activations' type, which autocast makes; part of ``kept``"""
    gradient: float
    """of its trained parameters"""


def activations_of(workload: Workload) -> Activations:
    """What a block holds for each token: as its family says, or the usual block."""
    network, trained = workload.network, workload.trained == "network"
    if network.activations is None:
        return USUAL_TRAINED if trained else USUAL
    return network.activations(network, trained, network.per_token_times and workload.shape[0] > 1)


def held_by(workload: Workload, tokens: int, *, checkpointed: bool) -> Activations:
    """What a block holds of each of the ``tokens`` of a clip that it sees, feed-forwards in chunks included."""
    own, chunk = workload.activations, _chunk(workload, tokens)
    held = activations_of(workload) if own is None else own(workload, tokens, checkpointed)
    if chunk is None or not held.kept.wide:  # whose figures have the chunks already
        return held
    return _chunked(held, chunk, trained=workload.trained == "network")


def bytes_of(held: Held, network: NetworkSpec, width: float) -> float:
    """Bytes for one token, ``width`` being those of an element of an activation."""
    return held.dim * network.dim * width + held.float32 * network.dim * FLOAT32 + held.wide * network.ffn_dim * width


def blocks_of(workload: Workload) -> list[Block]:
    """The blocks of the forward that takes most, in order: with a ramp of the routes there are steps without any."""
    most = replace(workload, dropped=()) if workload.dropped_sometimes else workload
    found = [_block(workload, index, tokens) for index, tokens in enumerate(most.block_tokens)]
    return [
        replace(block, held=block.held + block.input) if after.input < block.input else block
        for block, after in zip(found, [*found[1:], found[-1]], strict=True)
    ]


def _block(workload: Workload, index: int, tokens: int) -> Block:
    network, width, seen = workload.network, workload.activation_bytes, workload.samples * tokens

    def size(each: Held) -> float:
        return seen * bytes_of(each, network, width)

    checkpointed = is_checkpointed(workload, index)
    held = held_by(workload, tokens, checkpointed=checkpointed)
    offloaded = checkpointed and workload.checkpointing == "offload"
    kept = size(held.kept) + _kept_beside(workload, held, index, tokens)
    inputs, attention = size(Held(dim=1)), size(Held(dim=1)) + seen * FLOAT32 * network.heads
    left = inputs + attention if workload.checkpointing == "selective" else inputs
    return Block(
        checkpointed=checkpointed,
        offloaded=offloaded,
        input=inputs,
        held=kept if not checkpointed else 0.0 if offloaded else left,
        kept=kept,
        forward=size(held.forward),
        recompute=tuple(map(size, held.recompute)),
        backward=tuple(map(size, held.backward)),
        copies=_copies(workload),
        gradient=_gradient(workload),
    )


def _kept_beside(workload: Workload, held: Activations, index: int, tokens: int) -> float:
    """What a block keeps beside its own activations, in bytes.

    The log-sum-exp of two attentions; inputs of adapters and what is between their two matrices; text; the gathered
    companions of a routed block; copies that autocast makes of trained parameters. A frozen network's first norm
    keeps nothing: its input needs no gradient.
    """
    network, width, clips = workload.network, workload.activation_bytes, workload.samples
    on_text = workload.adapter_parameters_on_text
    on_tokens = workload.adapter_parameters - on_text
    between = on_tokens / network.blocks / (2 * network.dim)
    text_width = workload.adapted_width * on_text / on_tokens if on_tokens and TEXT not in held.inputs else 0.0
    widths = {each.input or each.name: each.inputs for each in network.matrices}
    adapted = workload.adapted_width - sum(widths[name] for name in held.inputs & workload.adapted_inputs)
    token = 2 * FLOAT32 * network.heads + width * (adapted + between)
    token += held.companions * (tokens < workload.tokens)
    if index == 0 and workload.trained == "adapter" and held.kept.float32:
        token -= FLOAT32 * network.dim
    read = network.text_tokens + network.image_tokens
    context = read * bytes_of(held.context, network, width) + network.text_tokens * width * text_width
    return clips * (tokens * token + context) + _copies(workload)


def _chunk(workload: Workload, tokens: int) -> float | None:
    """The share of a clip's tokens that a feed-forward computes at a time; None is all."""
    limit = workload.feed_forward_tokens
    return None if limit is None or tokens <= limit else 1 / ceil(tokens / limit)


def _chunked(held: Activations, share: float, *, trained: bool) -> Activations:
    """``held`` where each chunk of the feed-forward is computed again in backward: its input is kept, and no width.

    The chunk at work holds its width three times: before and after the activation, and the gradient.
    """
    extra = 0 if trained else 1  # training its matrices keeps their input anyway
    return replace(
        held,
        kept=replace(held.kept, dim=held.kept.dim + extra, wide=0),
        forward=replace(held.forward, dim=held.forward.dim - extra, wide=0),
        recompute=tuple(replace(each, dim=each.dim - extra) for each in held.recompute if not each.wide),
        backward=(Held(dim=2, wide=3 * share),),
    )


def _copies(workload: Workload) -> float:
    """Bytes of the copies in the activations' type of one block's trained parameters, kept in float32."""
    width, network = workload.activation_bytes, workload.network
    if width >= FLOAT32:
        return 0.0
    trained = workload.trained == "network" and workload.weight_bytes >= FLOAT32
    return (workload.adapter_parameters / network.blocks + trained * block_parameters(network)) * width


def _gradient(workload: Workload) -> float:
    """Bytes of the gradients of one block on the device."""
    network = workload.network
    if workload.gradients_released:
        return 0.0
    if workload.trained == "adapter":
        return workload.adapter_parameters / network.blocks * FLOAT32
    return block_bytes(workload) * (1 - streamed_blocks(workload) / network.blocks) / workload.shards


def block_parameters(network: NetworkSpec) -> int:
    """Parameters of one block of the base."""
    return sum(each.inputs * each.outputs for each in network.matrices) + network.small


def block_bytes(workload: Workload) -> float:
    """Bytes of one block of the base: its matrices, quantised or not, and the rest, which never is."""
    small = workload.network.small
    return (block_parameters(workload.network) - small) * workload.weight_bytes + small * plain_bytes(workload)


def plain_bytes(workload: Workload) -> float:
    """Bytes of a parameter that is not quantised."""
    return max(workload.weight_bytes, workload.activation_bytes)


def streamed_blocks(workload: Workload) -> int:
    """Blocks whose weights wait elsewhere, where each block streams alone."""
    resident, blocks = workload.resident_blocks, workload.network.blocks
    return 0 if resident is None or resident >= blocks else min(blocks, blocks - resident + RING)
