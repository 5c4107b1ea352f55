"""diffusers' ``WanTransformerBlock`` in few operations: the same mathematics, less traffic.

What is between matrices and attention is one function each, forward and backward (:mod:`tuner_kernels.functions`);
matrices on the same rows are multiplied together with their LoRA. A block whose norms or modulation are trained runs
its class's forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from tuner.model import Network, Stage, Transform
from tuner_kernels import feed_forward, linears, recompute
from tuner_kernels.functions import GatedAdd, Norm, TurnedNorm

TEXT_TOKENS = 512
"""Of the text; tokens before them are the image's (diffusers' ``WanAttnProcessor``)."""


def transform(networks: frozenset[str]) -> Transform:
    """The transform that rewrites every block of the networks named."""

    def apply(network: Network) -> None:
        for block in network.stack.blocks:
            install(block)

    return Transform(Stage.REWRITE, "fused Wan blocks", frozenset({"block_forward"}), apply, networks=networks)


def install(block: Any) -> None:
    """Make ``block`` compute in few operations. A bound method: its class, hooks and names stay."""
    object.__setattr__(block, "forward", MethodType(forward, block))


def is_known(block: nn.Module) -> bool:
    """Whether ``block`` is what this file is about."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    return type(block) is WanTransformerBlock


def forward(self: Any, tokens: Tensor, text: Tensor, modulation: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The class's forward: tokens (B, S, D), text (B, L, D), modulation (B, 6, D) or, for each token, (B, S, 6, D)."""
    if _is_trained(self) or modulation.requires_grad or not _is_usual(self):
        return type(self).forward(self, tokens, text, modulation, rotary)  # type: ignore[no-any-return]
    table = self.scale_shift_table.float()
    if modulation.ndim > table.ndim:
        rows = (table.unsqueeze(0) + modulation.float()).unbind(2)
    else:
        rows = [each.unsqueeze(1) for each in (table + modulation.float()).unbind(1)]
    shift, scale, gate, fed_shift, fed_scale, fed_gate = rows
    normed, tokens = Norm.apply(tokens, 1 + scale, shift, self.norm1.eps)
    tokens = GatedAdd.apply(tokens, _attend(self.attn1, normed, None, rotary), gate)
    del normed
    normed, tokens = _affine(self.norm2, tokens)
    tokens = tokens + _attend(self.attn2, normed, text, None).to(tokens.dtype)
    if (matrices := feed_forward.applies(self.ffn, tokens)) is not None:
        return feed_forward.apply(matrices, tokens, (1 + fed_scale, fed_shift, fed_gate), self.norm3.eps)
    normed, tokens = Norm.apply(tokens, 1 + fed_scale, fed_shift, self.norm3.eps)
    return GatedAdd.apply(tokens, self.ffn(normed), fed_gate)  # type: ignore[no-any-return]


def _affine(norm: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The norm before cross-attention, which some models leave out."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(tokens), tokens
    weight, bias = (each.float().view(1, 1, -1) for each in (norm.weight, norm.bias))
    return Norm.apply(tokens, weight, bias, norm.eps)  # type: ignore[no-any-return]


def _attend(attention: Any, rows: Tensor, text: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """What ``WanAttnProcessor`` computes: rows (B, S, D) attend to themselves, or to text and the image before it."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    processor = attention.processor
    image: Tensor | None = None
    if text is None:
        query, key, value = linears.apply([attention.to_q, attention.to_k, attention.to_v], rows)
    else:
        if attention.add_k_proj is not None:
            image, text = text[:, : text.shape[1] - TEXT_TOKENS], text[:, text.shape[1] - TEXT_TOKENS :]
        [query] = linears.apply([attention.to_q], rows)
        key, value = linears.apply([attention.to_k, attention.to_v], text)

    def attend(key: Tensor, value: Tensor, parallel: Any) -> Tensor:
        split = (each.unflatten(2, (attention.heads, -1)) for each in (query, key, value))
        backend = processor._attention_backend
        with recompute.made_again(query, key):
            found = dispatch_attention_fn(*split, backend=backend, parallel_config=parallel)
        return found.flatten(2, 3).to(query.dtype)  # type: ignore[no-any-return]

    query, key = _normed(attention.norm_q, query, rotary), _normed(attention.norm_k, key, rotary)
    attended = attend(key, value, processor._parallel_config if text is None else None)
    if image is not None:
        added_key, added_value = linears.apply([attention.add_k_proj, attention.add_v_proj], image)
        attended = attended + attend(_normed(attention.norm_added_k, added_key, None), added_value, None)
    [projected] = linears.apply([attention.to_out[0]], attended)
    return attention.to_out[1](projected)  # type: ignore[no-any-return]


def _normed(norm: Any, rows: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys (B, S, D), normed over all heads and turned."""
    cos, sin = (None, None) if rotary is None else (rotary[0][..., 0::2].float(), rotary[1][..., 1::2].float())
    return TurnedNorm.apply(rows, norm.weight, cos, sin, norm.eps)  # type: ignore[no-any-return]


def _is_trained(block: Any) -> bool:
    """Whether anything is trained whose gradient is not computed here: all but the adapters of matrices."""
    norms = [block.norm1, block.norm2, block.norm3]
    for attention in (block.attn1, block.attn2):
        norms += [attention.norm_q, attention.norm_k, *([attention.norm_added_k] if attention.add_k_proj else [])]
    return block.scale_shift_table.requires_grad or any(
        each.requires_grad for norm in norms for each in norm.parameters()
    )


def _is_usual(block: Any) -> bool:
    """Whether nothing else has put itself into attention: another processor, fused projections, a norm of its own."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    both = (block.attn1, block.attn2)
    norms = [norm for each in both for norm in (each.norm_q, each.norm_k)]
    plain = all(type(each.processor) is WanAttnProcessor and not each.fused_projections for each in both)
    return plain and all(isinstance(norm, nn.RMSNorm) and "forward" not in vars(norm) for norm in norms)
