"""What a Wan denoiser consists of, from its dimensions alone: diffusers' ``WanTransformer3DModel``, counted."""

from __future__ import annotations

from math import prod

from tuner.spec import Linear, NetworkSpec

IMAGE_DIM = 1280
"""Width of CLIP ViT-H."""
FREQUENCIES = 256
"""Of the sinusoidal embedding of a time."""
SELF_OUTPUT, CROSS_OUTPUT = "output of self-attention", "output of cross-attention"
ATTENTION = ("WanTransformerBlock", "WanAttention")
FEED_FORWARD = ("WanTransformerBlock", "FeedForward")


def linears(dim: int, ffn_dim: int, *, image_context: bool = False) -> tuple[Linear, ...]:
    """The matrices of a block of width ``dim``; with ``image_context`` those of image to video in 2.1, too."""
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    self_attention = [
        Linear(f"attn1.{each}", dim, dim, within=ATTENTION, input=SELF_OUTPUT if each == "to_out.0" else "attn1")
        for each in projections
    ]
    cross_attention = [
        Linear(f"attn2.{each}", dim, dim, "text" if each in ("to_k", "to_v") else "tokens", ATTENTION)
        for each in projections[:-1]
    ]
    cross_attention.append(Linear("attn2.to_out.0", dim, dim, within=ATTENTION, input=CROSS_OUTPUT))
    if image_context:
        images = ("add_k_proj", "add_v_proj")
        cross_attention += [Linear(f"attn2.{each}", dim, dim, "image", ATTENTION) for each in images]
    widths = {"net.0.proj": (dim, ffn_dim), "net.2": (ffn_dim, dim)}
    feed_forward = [Linear(f"ffn.{each}", *sizes, within=FEED_FORWARD) for each, sizes in widths.items()]
    return (*self_attention, *cross_attention, *feed_forward)


def small(dim: int, ffn_dim: int, *, image_context: bool = False) -> int:
    """Parameters of a block beside its matrices: biases, norms of queries and keys, norm 2, modulation."""
    biases = 9 * dim + ffn_dim
    image = 3 * dim if image_context else 0  # two biases and a norm
    return biases + 4 * dim + 2 * dim + 6 * dim + image


def other(
    network: NetworkSpec,
    out_channels: int,
    *,
    frequencies: int = FREQUENCIES,
    image_dim: int | None = None,
    image_positions: int = 0,
) -> int:
    """Parameters outside the blocks: patches in and out, embedders of time, text and, with ``image_dim``, frames.

    ``image_positions``: tokens that have a learnt position (first and last frame).
    """
    dim, patch = network.dim, prod(network.patch)
    time = _layer(frequencies, dim) + _layer(dim, dim) + _layer(dim, 6 * dim)
    text = _layer(network.text_dim, dim) + _layer(dim, dim)
    image = 0
    if image_dim is not None:
        image = _layer(image_dim, image_dim) + _layer(image_dim, dim) + 2 * image_dim + 2 * dim
        image += image_positions * image_dim
    patches = _layer(network.in_channels * patch, dim) + _layer(dim, out_channels * patch)
    return patches + time + text + image + 2 * dim


def weights(
    network: NetworkSpec,
    out_channels: int,
    *,
    frequencies: int = FREQUENCIES,
    image_dim: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by module name; ``image_dim`` is the width of embedded frames, where there are any."""
    dim, patch = network.dim, prod(network.patch)
    found: dict[str, tuple[int, ...]] = {"patch_embedding": (dim, network.in_channels, *network.patch)}
    embedder = "condition_embedder"
    found[f"{embedder}.time_embedder.linear_1"] = (dim, frequencies)
    found[f"{embedder}.time_embedder.linear_2"] = (dim, dim)
    found[f"{embedder}.time_proj"] = (6 * dim, dim)
    found[f"{embedder}.text_embedder.linear_1"] = (dim, network.text_dim)
    found[f"{embedder}.text_embedder.linear_2"] = (dim, dim)
    if image_dim is not None:
        found[f"{embedder}.image_embedder.norm1"] = (image_dim,)
        found[f"{embedder}.image_embedder.ff.net.0.proj"] = (image_dim, image_dim)
        found[f"{embedder}.image_embedder.ff.net.2"] = (dim, image_dim)
        found[f"{embedder}.image_embedder.norm2"] = (dim,)
    norms = [f"attn{attention}.norm_{each}" for attention in (1, 2) for each in "qk"]
    norms += ["norm2", *(["attn2.norm_added_k"] if image_dim is not None else [])]
    for block in range(network.blocks):
        found |= {f"blocks.{block}.{each.name}": (each.outputs, each.inputs) for each in network.linears}
        found |= {f"blocks.{block}.{each}": (dim,) for each in norms}
    found["proj_out"] = (out_channels * patch, dim)
    return found


def _layer(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
