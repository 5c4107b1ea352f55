"""diffusers' ``WanTransformer3DModel`` as a block stack: its forward in three parts.

The order of operations is that of the class's own forward, so outputs and all gradients are equal bit
for bit: for Wan 2.1 and 2.2, text to video, image to video (CLIP context) and per-token times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, cat, nn

from tuner.blocks import BlockStack, Stream

if TYPE_CHECKING:
    from collections.abc import Callable


class WanStack(BlockStack):
    """Embed, block and unembed of one ``WanTransformer3DModel``.

    Of what blocks read, rotary tables (1, S, 1, head_dim) and, with per-token times, the modulation
    (B, S, 6, D) go with the tokens; text (B, L, D) and global modulation (B, 6, D) are shared.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, module.blocks)  # type: ignore[arg-type]

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Stream:
        """The stream that enters block 0.

        Arguments are those of diffusers' forward: ``hidden_states`` (B, C, F', h, w); ``timestep`` (B,), or
        (B, S) for per-token times; ``encoder_hidden_states`` (B, L, text width);
        ``encoder_hidden_states_image`` (B, image tokens, image width).
        """
        wan: Any = self.module
        frames, height, width = hidden_states.shape[2:]
        patch_time, patch_height, patch_width = wan.config.patch_size
        cos, sin = wan.rope(hidden_states)
        tokens = wan.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()

        per_token_times = timestep.ndim == 2
        temb, modulation, text, image = wan.condition_embedder(
            timestep.flatten() if per_token_times else timestep,
            encoder_hidden_states,
            encoder_hidden_states_image,
            timestep_seq_len=timestep.shape[1] if per_token_times else None,
        )
        modulation = modulation.unflatten(2 if per_token_times else 1, (6, -1))
        if image is not None:
            text = cat([image, text], dim=1)

        per_token = {"cos": (cos, 1), "sin": (sin, 1)}
        shared = {"text": text, "temb": temb, "return_dict": return_dict}
        if per_token_times:
            per_token["modulation"] = (modulation, 1)
        else:
            shared["modulation"] = modulation
        grid = (frames // patch_time, height // patch_height, width // patch_width)
        return Stream(tokens, per_token, shared, grid)

    def block(self, block: nn.Module, stream: Stream) -> Stream:
        """The stream after one ``WanTransformerBlock``."""
        per_token, shared = stream.per_token, stream.shared
        modulation = per_token["modulation"][0] if "modulation" in per_token else shared["modulation"]
        rotary = (per_token["cos"][0], per_token["sin"][0])
        return replace(stream, tokens=block(stream.tokens, shared["text"], modulation, rotary))

    def unembed(self, stream: Stream) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction (B, C, F', h, w), in diffusers' output class or, with ``return_dict=False``, in a tuple."""
        wan: Any = self.module
        tokens = stream.tokens
        shift, scale = self._final_modulation(stream.shared["temb"])
        shift, scale = shift.to(tokens.device), scale.to(tokens.device)
        tokens = (wan.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        patches = wan.proj_out(tokens).reshape(tokens.shape[0], *stream.grid, *wan.config.patch_size, -1)
        sample = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if stream.shared["return_dict"] else (sample,)

    def _final_modulation(self, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of the last norm: (B, 1, D), or (B, S, D) for per-token times."""
        table: Any = self.module.scale_shift_table
        if temb.ndim == 3:
            shift, scale = (table.unsqueeze(0).to(temb.device) + temb.unsqueeze(2)).chunk(2, dim=2)
            return shift.squeeze(2), scale.squeeze(2)
        shift, scale = (table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
        return shift, scale

    def forward(self, drive: Callable[[Stream], Stream], *args: Any, **kwargs: Any) -> Any:
        """The whole forward; ``attention_kwargs={"scale": s}`` scales LoRA layers, as in diffusers."""

        def unscaled(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.unembed(drive(self.embed(*args, **kwargs)))

        return apply_lora_scale("attention_kwargs")(unscaled)(self.module, *args, **kwargs)
