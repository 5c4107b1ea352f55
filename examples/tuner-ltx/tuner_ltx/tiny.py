"""A tiny, randomly initialised LTX-Video in the diffusers layout: real classes, strides and channels.

python -m tuner_ltx.tiny PATH
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import ModelError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline
    from transformers import T5EncoderModel, T5Tokenizer

WORDS = "a an and the of red blue green circle square shape cat walks moves word"
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-一只猫"
TEXT_WIDTH = 16


def build_tiny(
    path: Path, *, layers: int = 4, heads: int = 2, head_dim: int = 16, timed_decoder: bool = False, seed: int = 0
) -> Path:
    """Write a tiny model to the folder ``path`` and return it. Raises ModelError rather than overwrite anything."""
    if path.exists():
        raise ModelError(f"will not overwrite {str(path)!r}", remedy="choose another folder")
    pipeline = tiny_pipeline(layers=layers, heads=heads, head_dim=head_dim, timed_decoder=timed_decoder, seed=seed)
    pipeline.save_pretrained(path)
    return path


def tiny_pipeline(
    *, layers: int = 4, heads: int = 2, head_dim: int = 16, timed_decoder: bool = False, seed: int = 0
) -> LTXPipeline:
    """The pipeline that :func:`build_tiny` saves; with ``timed_decoder`` its VAE takes a time, as that of 0.9.1.

    Leaves torch's global generator as it was.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LTXPipeline(
            transformer=LTXVideoTransformer3DModel(
                num_attention_heads=heads,
                attention_head_dim=head_dim,
                cross_attention_dim=heads * head_dim,
                num_layers=layers,
                caption_channels=TEXT_WIDTH,
            ),
            vae=_vae(timed_decoder),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
            ),
        )


def _vae(timed_decoder: bool) -> AutoencoderKLLTXVideo:
    import torch
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        timestep_conditioning=timed_decoder,
    )
    vae.latents_mean.copy_(torch.linspace(-0.1, 0.1, 128))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 128))
    return vae


def _tokenizer() -> T5Tokenizer:
    """Knows the words whole, the characters one by one, and everything else as ``<unk>``."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    words = [(f"▁{word}", -4.0) for word in sorted(WORDS.split())]
    characters = [(character, -8.0) for character in sorted(set(CHARACTERS))]
    return T5Tokenizer(vocab=[*special, *words, *characters], extra_ids=0, model_max_length=128)


def _text_encoder(vocabulary: int) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


if __name__ == "__main__":
    print(build_tiny(Path(sys.argv[1])))
