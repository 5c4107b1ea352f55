"""What a Wan block holds of each token: diffusers' ``WanTransformerBlock``, run eagerly under bf16 autocast.

The figures are sums over the tensors that its operations save, and agree with counts of live bytes on fake tensors of
real dimensions (see docs/memory-model.md). Biases, statistics of norms and the like are left out: under 0.2 %.
"""

from __future__ import annotations

from tuner.spec import Activations, Held, NetworkSpec

ROTARY_BYTES = 8
"""Cosine and sine in float32."""


def activations(network: NetworkSpec, trained: bool, timed: bool) -> Activations:
    """What a block of ``network`` holds.

    Arguments
        trained: whether the block's own weights are trained; else an adapter beside them.
        timed: whether each token has a time of its own, and so the six factors of its modulation.
    """
    kept = _trained() if trained else _frozen()
    if network.image_tokens:
        kept = _sum(kept, Held(dim=2))  # what embedded frames give; the queries, cast once more for them
    around = Held()
    if timed:
        # All six factors, of which views are kept, and 1 + scale, twice: each token's own, in float32.
        kept = _sum(kept, Held(float32=8))
        # The six factors before the block's own are added, and the embedding of the time.
        around = Held(dim=7)
    return Activations(
        kept=kept,
        forward=Held(dim=3, float32=4) if trained else Held(dim=4, float32=4),
        recompute=(Held(dim=3, float32=2),) if trained else (Held(dim=4, float32=3), Held(dim=4, float32=1, wide=1)),
        backward=(Held(dim=1, wide=1),) if trained else (Held(dim=1, wide=2),),
        context=Held(dim=4, float32=2) if trained else Held(dim=2, float32=1),
        around=around,
        companions=ROTARY_BYTES * network.dim / network.heads,
    )


def _frozen() -> Held:
    """Where only an adapter is trained.

    In float32 the inputs of three norms and of the three norms of queries and keys; else queries, keys, values and
    output of self-attention, queries and output of cross-attention, and the input of the feed-forward's activation.
    """
    return Held(dim=6, float32=6, wide=1)


def _trained() -> Held:
    """Where the weights are: also the inputs of matrices and, in float32, what modulation multiplies."""
    return Held(dim=10, float32=10, wide=2)


def _sum(one: Held, other: Held) -> Held:
    return Held(one.dim + other.dim, one.float32 + other.float32, one.wide + other.wide)
