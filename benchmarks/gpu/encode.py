"""Encoding: clips by Wan's VAE, captions by UMT5-XXL, as the cache calls them. Random weights of the true shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from gpu.ceilings import device, seconds_of
from gpu.running import Row
from tuner_wan import encode
from tuner_wan.components import TILE, TILE_STRIDE
from tuner_wan.flavours import TEXT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = (
    *("dtype", "seconds", "peak_gib", "weights_gib", "captions_per_second", "clips_per_second"),
    *("tokens_each", "captions"),
)
GIB = 2**30
SHAPE, TINY_SHAPE = (81, 480, 832), (5, 32, 32)
"""(frames, height, width) in pixels"""
CAPTION = 100
"""Tokens of a caption, about what people write for clips."""
BATCH = 32
XXL: dict[str, Any] = {
    "vocab_size": 256_384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""google/umt5-xxl."""
TINY_TEXT = {**XXL, "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
TINY_VAE: dict[str, Any] = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def filled(module: nn.Module, dtype: torch.dtype) -> Any:
    """``module``, made without weights, on the device: matrices normal with variance 1 / inputs, norms 1, biases 0."""
    # Not diffusers' own: it warns of what it would keep in float32, which in this class is nothing.
    nn.Module.to(module, dtype).to_empty(device=device()).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def peak(found: dict[str, Any], held: int) -> dict[str, Any]:
    """``found``, and on a GPU what tensors took at most, with ``held`` bytes of weights."""
    if device().type == "cuda":
        found |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "weights_gib": held / GIB}
    return found


def began() -> int:
    """Bytes that are held now, from where the peak is counted."""
    if device().type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# Clips


def clip(dtype: str, tiled: bool, smoke: bool, least: float) -> dict[str, Any]:
    """One clip, as the cache encodes it: the first frame, then four at a time, and tile by tile where ``tiled``.

    The clip (3, F, H, W) is on the CPU, as a decoder leaves it, and the latents come back there.
    """
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLWan(**(TINY_VAE if smoke else {}))
    vae = filled(vae, getattr(torch, dtype))
    if tiled:
        vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
    pixels, held = torch.rand(3, *(TINY_SHAPE if smoke else SHAPE)) * 2 - 1, began()
    with torch.no_grad():
        seconds = seconds_of(lambda: encode.encode_clip(vae, pixels), least)
    return peak({"dtype": dtype, "seconds": seconds, "clips_per_second": 1 / seconds}, held)


# Captions


class Words:
    """In the place of the tokenizer, which is text's own and needs no GPU: a caption's length is the caption itself."""

    def __init__(self, words: int) -> None:
        self._words = words

    def __call__(self, captions: list[str], max_length: int, **how: Any) -> Any:
        """Numbers of words (B, max_length), and which of them are there."""
        from transformers import BatchEncoding

        lengths = torch.tensor([min(int(caption), max_length) for caption in captions])
        mask = (torch.arange(max_length) < lengths[:, None]).long()
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(2, self._words, mask.shape, generator=draw) * mask
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def text_encoder(smoke: bool) -> encode.TextEncoder:
    """UMT5 in bfloat16 on a GPU, as in a run; in float32 on the CPU."""
    settings = TINY_TEXT if smoke else XXL
    with init_empty_weights(include_buffers=False):
        model = UMT5EncoderModel(UMT5Config(**settings))
    model.set_input_embeddings(model.get_input_embeddings())
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    words: Any = Words(settings["vocab_size"])
    tokenizer: PreTrainedTokenizerBase = words
    return encode.TextEncoder(tokenizer, filled(model, dtype), TEXT_TOKENS)


def captions(smoke: bool, least: float) -> dict[str, Any]:
    """Captions one at a time, by the function that fills the cache."""
    encoder, held = text_encoder(smoke), began()
    with torch.no_grad():
        seconds = seconds_of(lambda: encode.encode_caption(encoder, str(CAPTION)), least)
    return peak(_rate(encoder, seconds, 1, CAPTION), held)


def batches(number: int, tokens: int, smoke: bool, least: float) -> dict[str, Any]:
    """``number`` captions at once, of ``tokens`` tokens each: all padded to 512, or none where all are as long."""
    encoder, held = text_encoder(smoke), began()
    where = encoder.model.device
    ids = torch.randint(2, 64, (number, tokens), device=where)
    mask = torch.ones_like(ids)
    mask[:, CAPTION:] = 0

    def work() -> Tensor:
        states: Tensor = encoder.model(ids, mask).last_hidden_state[:, :CAPTION]
        return states.cpu()

    with torch.no_grad():
        seconds = seconds_of(work, least)
    return peak(_rate(encoder, seconds, number, tokens), held)


def _rate(encoder: encode.TextEncoder, seconds: float, number: int, tokens: int) -> dict[str, Any]:
    return {
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "captions": number,
        "tokens_each": tokens,
        "captions_per_second": number / seconds,
    }


# Rows


def rows(smoke: bool) -> list[Row]:
    """Clips in both precisions, whole frames and tiles; captions one by one and in batches, padded and not."""
    least, number = (1e-3, 2) if smoke else (1.0, BATCH)
    found = [
        Row(
            f"VAE, {dtype}, {'tiles' if tiled else 'whole frames'}",
            clip,
            (dtype, tiled, smoke, least),
            needs=25,
            goal={"seconds": 0.60, "peak_gib": 4.0} if dtype == "bfloat16" and not tiled else {},
        )
        for dtype in ("bfloat16", "float32")
        for tiled in (False, True)
    ]
    return [
        *found,
        Row("UMT5, one by one, as the cache does it", captions, (smoke, least), needs=30),
        Row(f"UMT5, {number} at once, padded to {TEXT_TOKENS}", batches, (number, TEXT_TOKENS, smoke, least), needs=30),
        Row("UMT5, one by one, unpadded", batches, (1, CAPTION, smoke, least), needs=30),
        Row(
            f"UMT5, {number} at once, unpadded",
            batches,
            (number, CAPTION, smoke, least),
            needs=30,
            goal={"captions_per_second": 250},
        ),
    ]
