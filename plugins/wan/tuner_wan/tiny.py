"""A tiny, randomly initialised Wan of any flavour, in the real diffusers directory layout.

Everything that works on it works on the real model the same way: real classes, real file names, real
tokenizer class. It knows nothing, so what it renders is noise. The same arguments give the same bytes.

    python -m tuner_wan.tiny PATH --flavour i2v-14b-2.1 --layers 40
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import ModelError
from tuner.files import TEMPORARY, sync_file, sync_folder
from tuner_wan.flavours import DEFAULT_FLAVOUR, FLAVOURS, Flavour

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5EncoderModel

WORDS = (
    "a an and the of in on over to from with into near very simple short video clip animation animated scene style "
    "background moving moves still fast slow left right upwards downwards diagonally up down "
    "red orange yellow green blue purple white black grey bright dark "
    "circle square triangle shape ball box cat dog person woman man child boat mouse house street rain cake kitchen"
)
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-:;()<>_"
    "，。、！？的一不是在有人这个上下大小中国我你他她们来到时和也都子里后前见看着红橙黄绿蓝紫白黑灰色圆方三角形"
    "只两拟化猫咪狗身穿舒适拳击装备戴鲜艳手套聚光灯照射舞台激烈对战坐窗外面雨移动左右向背景简单画"
    "调过曝静态细节模糊清字幕风格作品止整体发最差质量低压缩残留丑陋缺多余指得好部脸畸毁容肢融合杂乱条腿很倒走"
)
"""The tokenizer knows the words whole and everything else by character; what it does not know is ``<unk>``."""
TEXT_WIDTH = 16
IMAGE_WIDTH = 16
IMAGE_TOKENS = 257
"""Of the image encoder; 257 as in the real one."""


def build_tiny_t2v(
    path: Path, *, layers: int = 2, heads: int = 2, head_dim: int = 12, ffn_dim: int = 32, seed: int = 0
) -> Path:
    """Write a tiny Wan 2.1 T2V to the folder ``path``: :func:`build_tiny` for the default flavour."""
    return build_tiny(path, layers=layers, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim, seed=seed)


def build_tiny(
    path: Path,
    flavour: str = DEFAULT_FLAVOUR,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 12,
    ffn_dim: int = 32,
    seed: int = 0,
) -> Path:
    """Write a tiny model of the structure of ``flavour`` to the folder ``path`` and return it.

    The denoisers have ``layers`` blocks of width ``heads * head_dim`` (``head_dim`` even, at least 6) and the
    flavour's own channels; encoders and VAE are as small as their classes allow, with Wan's own strides, latent
    statistics, 512 text tokens and 257 image tokens. Takes well under a second after the imports and under two
    megabytes. The folder appears whole or not at all. Raises ModelError rather than overwrite anything.
    """
    if path.exists():
        raise ModelError(
            f"will not overwrite {str(path)!r}", remedy="choose another folder, or move this one away yourself"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        pipeline = tiny_pipeline(flavour, layers=layers, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim, seed=seed)
        pipeline.save_pretrained(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def tiny_pipeline(
    flavour: str = DEFAULT_FLAVOUR,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 12,
    ffn_dim: int = 32,
    seed: int = 0,
) -> DiffusionPipeline:
    """The pipeline that :func:`build_tiny` saves. Leaves torch's global generator as it was."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    facts = FLAVOURS[flavour]
    tokenizer = tiny_tokenizer()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=facts.flow_shift
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(len(tokenizer)),
            "vae": _vae(facts),
            "transformer": _transformer(facts, layers, heads, head_dim, ffn_dim),
            "scheduler": scheduler,
        }
        if facts.experts == 2:
            parts |= {
                "transformer_2": _transformer(facts, layers, heads, head_dim, ffn_dim),
                "boundary_ratio": facts.boundary,
            }
        if facts.image_context:
            parts |= _image_encoder()
    if facts.condition == "clean_first_frame":
        parts["expand_timesteps"] = True
    from_image = facts.condition in ("first_frame", "first_and_last_frame")
    return WanImageToVideoPipeline(**parts) if from_image else WanPipeline(**parts)


def tiny_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer of a hand-made vocabulary: training one is not deterministic."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    spellings = {spelling for word in WORDS.split() for spelling in (word, word.capitalize())}
    words = [(f"▁{word}", -4.0) for word in sorted(spellings)]
    characters = [(character, -8.0) for character in sorted(set(CHARACTERS))]
    return T5Tokenizer(vocab=[*special, *words, *characters], extra_ids=0, model_max_length=512)


def _transformer(facts: Flavour, layers: int, heads: int, head_dim: int, ffn_dim: int) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    image: dict[str, int] = {}
    if facts.image_context:
        image = {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": heads * head_dim}
    if facts.condition == "first_and_last_frame":
        image["pos_embed_seq_len"] = 2 * IMAGE_TOKENS
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=facts.in_channels,
        out_channels=facts.latent_channels,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=ffn_dim,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
        **image,
    )


def _vae(facts: Flavour) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    if facts.latent_channels == 16:
        return AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    channels = range(facts.latent_channels)
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=facts.latent_channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.01 * channel for channel in channels],
        latents_std=[0.5 + 0.01 * channel for channel in channels],
    )


def _image_encoder() -> dict[str, Any]:
    """CLIP with the real number of tokens: 16 x 16 patches and one for the class."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=4,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}


def _text_encoder(vocabulary: int) -> UMT5EncoderModel:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry of ``python -m tuner_wan.tiny``."""
    parser = argparse.ArgumentParser(description="Write a tiny, randomly initialised Wan in the diffusers layout.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--flavour", default=DEFAULT_FLAVOUR, choices=FLAVOURS)
    for name, default in (("layers", 2), ("heads", 2), ("head-dim", 12), ("ffn-dim", 32), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    print(build_tiny(options.pop("path"), **options))


if __name__ == "__main__":
    main()
