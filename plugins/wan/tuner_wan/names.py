"""Names of modules in diffusers and in Wan's own code, which ComfyUI and most LoRA files use.

The table was checked by giving both models the same tensors under their names and comparing outputs.
"""

from __future__ import annotations

RENAME = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "self_attn.norm_k"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "cross_attn.norm_k"),
    ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"),
    ("attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("proj_out", "head.head"),
)
"""(diffusers, original) suffixes of module names, most specific first. A block's affine norm is ``norm2`` here and
``norm3`` there; its other norms have no parameters."""

PARAMETERS = (
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("scale_shift_table", "head.modulation"),
    ("scale_shift_table", "modulation"),
)
"""(diffusers, original) suffixes of parameters that belong to no renamed module, most specific first."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What some files put before every name."""


def diffusers_name(name: str) -> str:
    """The name that a parameter of Wan's own code, such as ``blocks.0.self_attn.q.weight``, has in diffusers.

    A name that is diffusers' already comes back as it is, without a file's prefix.
    """
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for ours, theirs in PARAMETERS:
        if _ends_with(name, theirs):
            return name.removesuffix(theirs) + ours
    module, _, leaf = name.rpartition(".")
    for ours, theirs in RENAME:
        if _ends_with(module, theirs):
            return f"{module.removesuffix(theirs)}{ours}.{leaf}"
    return name


TEXT_MODULES = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
)
TEXT_BLOCK_MODULES = (
    ("attn.q", "layer.0.SelfAttention.q"),
    ("attn.k", "layer.0.SelfAttention.k"),
    ("attn.v", "layer.0.SelfAttention.v"),
    ("attn.o", "layer.0.SelfAttention.o"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("norm1", "layer.0.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ("norm2", "layer.1.layer_norm"),
)
"""(Wan's own code, transformers) names of the text encoder's modules, outside and inside its blocks."""


def text_encoder_name(name: str) -> str:
    """The name that a parameter of Wan's own UMT5, such as ``blocks.0.attn.q.weight``, has in transformers.

    A name that is transformers' already comes back as it is.
    """
    module, _, leaf = name.rpartition(".")
    for theirs, ours in TEXT_MODULES:
        if module == theirs:
            return f"{ours}.{leaf}"
    if module.startswith("blocks."):
        _, index, inner = module.split(".", 2)
        for theirs, ours in TEXT_BLOCK_MODULES:
            if inner == theirs:
                return f"encoder.block.{index}.{ours}.{leaf}"
    return name


def is_original(name: str) -> bool:
    """Whether a parameter's name can only come from Wan's own code (the block norms' names occur in both)."""
    return ".self_attn." in name or ".cross_attn." in name or "head.modulation" in name


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)
