"""The transformer as the block driver sees it: embed, one block, unembed, as diffusers' forward does them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from tuner.blocks import BlockStack, Stream


class LtxStack(BlockStack):
    """An ``LTXVideoTransformer3DModel``. Per token: rotary cos and sin, and modulation where times are per token."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, module.transformer_blocks)  # type: ignore[arg-type]

    def embed(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None,
        num_frames: int,
        height: int,
        width: int,
        rope_interpolation_scale: Any = None,
        video_coords: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Stream:
        """The stream that enters block 0.

        Arguments are those of diffusers' forward: ``hidden_states`` (B, S, C); ``encoder_hidden_states`` (B, L, text
        width) with its mask (B, L); ``timestep`` (B,), or (B, S) for per-token times; the grid that S is made of.
        """
        ltx: Any = self.module
        batch = hidden_states.shape[0]
        cos, sin = ltx.rope(hidden_states, num_frames, height, width, rope_interpolation_scale, video_coords)
        mask = encoder_attention_mask
        if mask is not None and mask.ndim == 2:
            mask = ((1 - mask.to(hidden_states.dtype)) * -10000.0).unsqueeze(1)
        tokens = ltx.proj_in(hidden_states)
        modulation, time = ltx.time_embed(timestep.flatten(), batch_size=batch, hidden_dtype=tokens.dtype)
        modulation, time = (each.view(batch, -1, each.shape[-1]) for each in (modulation, time))
        text = ltx.caption_projection(encoder_hidden_states).view(batch, -1, tokens.shape[-1])

        per_token = {"cos": (cos, 1), "sin": (sin, 1)}
        shared = {"text": text, "mask": mask, "time": time, "return_dict": return_dict}
        if modulation.shape[1] > 1:
            per_token["modulation"] = (modulation, 1)
        else:
            shared["modulation"] = modulation
        return Stream(tokens, per_token, shared, (num_frames, height, width))

    def block(self, block: nn.Module, stream: Stream) -> Stream:
        """The stream after one ``LTXVideoTransformerBlock``."""
        per_token, shared = stream.per_token, stream.shared
        modulation = per_token["modulation"][0] if "modulation" in per_token else shared["modulation"]
        rotary = (per_token["cos"][0], per_token["sin"][0])
        return replace(stream, tokens=block(stream.tokens, shared["text"], modulation, rotary, shared["mask"]))

    def unembed(self, stream: Stream) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction (B, S, C), in diffusers' output class or, with ``return_dict=False``, in a tuple."""
        ltx: Any = self.module
        table = ltx.scale_shift_table[None, None] + stream.shared["time"][:, :, None]
        shift, scale = table[:, :, 0], table[:, :, 1]
        sample = ltx.proj_out(ltx.norm_out(stream.tokens) * (1 + scale) + shift)
        return Transformer2DModelOutput(sample=sample) if stream.shared["return_dict"] else (sample,)

    def forward(self, drive: Callable[[Stream], Stream], *args: Any, **kwargs: Any) -> Any:
        """The whole forward; ``attention_kwargs={"scale": s}`` scales LoRA layers, as in diffusers."""

        def unscaled(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.unembed(drive(self.embed(*args, **kwargs)))

        return apply_lora_scale("attention_kwargs")(unscaled)(self.module, *args, **kwargs)
