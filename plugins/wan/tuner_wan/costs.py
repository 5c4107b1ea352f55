"""What a Wan block holds of each token: diffusers' ``WanTransformerBlock``, run eagerly under bf16 autocast.

The figures are sums over the tensors that its operations save, and agree with counts of live bytes on fake tensors of
real dimensions (see docs/memory-model.md). Biases, statistics of norms and the like are left out: under 0.2 %.
"""

from __future__ import annotations

from dataclasses import replace

from tuner.spec import Activations, Held, NetworkSpec
from tuner.workload import Workload
from tuner_wan.dimensions import CROSS_OUTPUT, SELF_OUTPUT

PIECE_TOKENS = 8192
"""With more tokens than these a block computes what goes token by token in pieces, where it is to keep less."""
ROTARY_BYTES = 8
"""Cosine and sine in float32."""
TILE = 256
VAE_22_CHANNELS = 48
VAE_21: dict[str, float] = {
    "weights": 4.0 * 126_892_531,
    "encode_picture": 3860,
    "encode_clip": 14090,
    "decode_picture": 6920,
    "decode_clip": 19500,
    "frame": 12.5,
    "tile": TILE * TILE,
}
VAE_22: dict[str, float] = {
    "weights": 4.0 * 704_688_668,
    "encode_picture": 1950,
    "encode_clip": 7280,
    "decode_picture": 5800,
    "decode_clip": 21510,
    "frame": 12.5,
    "tile": TILE * TILE,
}


def activations(network: NetworkSpec, trained: bool, timed: bool) -> Activations:
    """What a block of ``network`` holds.

    Arguments
        trained: whether the block's own weights are trained; else an adapter beside them.
        timed: whether each token has a time of its own, and so the six factors of its modulation.
    """
    kept, around = _trained() if trained else _frozen(), Held()
    frames = 1 if network.image_tokens else 0
    if frames:
        kept = _sum(kept, Held(dim=2))  # what embedded frames give; the queries, cast once more for them
    if timed:
        # All six factors, of which views are kept, and 1 + scale, twice: each token's own, in float32.
        kept = _sum(kept, Held(float32=8))
        # The six factors before the block's own are added, and the embedding of the time.
        around = Held(dim=7)
    return Activations(
        kept=kept,
        forward=Held(dim=3, float32=4) if trained else Held(dim=4, float32=4),
        recompute=(Held(dim=3, float32=2),) if trained else (Held(dim=4, float32=3), Held(dim=4, float32=1, wide=1)),
        inference=(
            Held(dim=5 + frames, float32=11 if timed else 4),
            Held(dim=5 + frames, float32=6 if timed else 0, wide=2),
        ),
        backward=(Held(dim=1, wide=1),) if trained else (Held(dim=1, wide=2),),
        context=Held(dim=4, float32=2) if trained else Held(dim=2, float32=1),
        around=around,
        companions=ROTARY_BYTES * network.dim / network.heads,
    )


def lean(workload: Workload, tokens: int, checkpointed: bool) -> Activations:
    """What a block holds that is :mod:`tuner_wan.lean`'s and sees ``tokens`` of a clip; its own weights are frozen.

    Queries and keys before and after their norms, values and output of self-attention, the same without keys and
    values of cross-attention, the inputs of two norms (the third's is the block's own), and the input of the
    feed-forward's activation. Where each token has gates of its own, what goes through them.
    """
    network = workload.network
    timed, frames = network.per_token_times and workload.shape[0] > 1, bool(network.image_tokens)
    plain = activations(network, False, timed)
    if tokens <= PIECE_TOKENS:
        return plain
    kept = Held(dim=11 + 2 * timed + frames, wide=1)
    # Embedded frames give an output of their own, and the two are added up.
    inputs = frozenset({SELF_OUTPUT} if frames else {SELF_OUTPUT, CROSS_OUTPUT})
    return replace(
        plain, kept=kept, inputs=inputs, forward=Held(dim=2, float32=1), recompute=(Held(dim=3, float32=1.25),)
    )


def components(latent_channels: int, *, image_context: bool) -> dict[str, dict[str, float]]:
    """Sizes of UMT5-XXL in bfloat16, of the VAE in float32 and, with ``image_context``, of CLIP ViT-H in float32.

    What they work in was counted like the denoiser's; the VAE's is for its pieces of one frame, then of four.
    """
    vae = VAE_22 if latent_channels == VAE_22_CHANNELS else VAE_21
    words = 256384 * 4096
    text = {"weights": 2.0 * 5_680_910_336, "matrices": 5_680_910_336 - words, "blocks": 24, "working": 126e6}
    image = {"image_encoder": {"weights": 4.0 * 630_766_080, "working": 56e6}} if image_context else {}
    return {"text_encoder": text, "vae": vae, **image}


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
