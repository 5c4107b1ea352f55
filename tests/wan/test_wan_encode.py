"""What is cached is what diffusers' pipeline would have computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from tuner.errors import PluginError
from tuner.model import EncodeBatch, Model
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.encode import denormalise, normalise, pad_states

GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = (
    "A yellow square moving upwards over a white background.",
    "两只拟人化的猫咪身穿舒适的拳击装备，戴着鲜艳的手套，在聚光灯照射的舞台上激烈对战",
    "  two\tspaces \n and   &amp;amp; entities, mojibake Ã©, emoji 🐱 ",
    "word " * 700,
    "",
)


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(tiny)


@pytest.mark.parametrize("caption", CAPTIONS, ids=["english", "chinese", "untidy", "too-long", "empty"])
def test_text_equals_the_pipelines_after_zero_padding(
    caption: str, loaded: tuple[Run, Model], plugin: WanPlugin, pipeline: WanPipeline
) -> None:
    _, model = loaded
    (encoded,) = plugin.encode_batch(model, EncodeBatch("text", captions=(caption,)))
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    states = encoded["states"]
    assert torch.equal(pad_states(states.unsqueeze(0), 512), expected)
    assert 1 <= len(states) <= 512
    assert states.untyped_storage().nbytes() == states.numel() * states.element_size(), "no padding is kept"


def test_the_empty_prompt_is_one_token_long_and_a_long_one_is_cut(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    _, model = loaded
    encoded = plugin.encode_batch(model, EncodeBatch("text", captions=("", "word " * 700)))
    assert [len(each["states"]) for each in encoded] == [1, 512]


def test_the_companions_of_a_batch_change_no_bit(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    _, model = loaded
    together = plugin.encode_batch(model, EncodeBatch("text", captions=CAPTIONS))
    alone = [plugin.encode_batch(model, EncodeBatch("text", captions=(caption,)))[0] for caption in CAPTIONS]
    assert all(torch.equal(a["states"], b["states"]) for a, b in zip(together, alone, strict=True))
    clips = torch.rand(3, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = plugin.encode_batch(model, EncodeBatch("video", pixels=clips))
    alone = [plugin.encode_batch(model, EncodeBatch("video", pixels=clip[None]))[0] for clip in clips]
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_video_latents_are_the_normalised_mode(
    frames: int, loaded: tuple[Run, Model], plugin: WanPlugin, pipeline: WanPipeline
) -> None:
    run, model = loaded
    clip = torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    (encoded,) = plugin.encode_batch(model, EncodeBatch("video", pixels=clip))
    vae = pipeline.vae
    with torch.no_grad():
        mode = vae.encode(clip).latent_dist.mode()[0]
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(encoded["latents"], (mode - mean) / std, rtol=0, atol=0)
    assert encoded["latents"].dtype == torch.float32
    assert encoded["latents"].shape == run.spec.latents.shape(frames, 32, 48)


def test_normalisation_equals_the_reference_figures() -> None:
    golden = json.loads((GOLDEN / "latent_normalise.json").read_text())
    config = AutoencoderKLWan(base_dim=4, num_res_blocks=1).config
    assert config.latents_mean == golden["mean"]
    latents = torch.tensor(golden["mu"]).view(1, 16, 1, 1, 1)
    normalised = normalise(latents, config)
    torch.testing.assert_close(normalised.flatten(), torch.tensor(golden["normalised"]))
    torch.testing.assert_close(denormalise(normalised, config), latents)


def test_autocast_around_does_not_reach_the_encoders(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    _, model = loaded
    batch = EncodeBatch("video", pixels=torch.rand(1, 3, 5, 32, 32))
    expected = plugin.encode_batch(model, batch)[0]["latents"]
    latents = torch.randn(1, 16, 2, 4, 4)
    frames = model.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plugin.encode_batch(model, batch)[0]["latents"], expected)
        assert torch.equal(model.decode(latents), frames)


def test_encodings_have_not_changed_without_a_new_version(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    """When this fails on purpose: bump TEXT_VERSION or VIDEO_VERSION, so that no cache holds the old kind."""
    _, model = loaded
    golden = json.loads((GOLDEN / "encoding.json").read_text())
    (text,) = plugin.encode_batch(model, EncodeBatch("text", captions=("A red circle，红色圆形",)))
    ramp = torch.linspace(-1, 1, 3 * 5 * 16 * 16).view(1, 3, 5, 16, 16)
    (video,) = plugin.encode_batch(model, EncodeBatch("video", pixels=ramp))
    for component, tensor in (("text_encoder", text["states"]), ("vae", video["latents"])):
        expected = golden[component]
        assert model.components[component].version == expected["version"]
        assert list(tensor.shape) == expected["shape"]
        torch.testing.assert_close(
            tensor.flatten()[:: expected["stride"]], torch.tensor(expected["values"]), atol=1e-4, rtol=1e-3
        )


def test_other_kinds_are_refused(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    with pytest.raises(PluginError, match="conditioning"):
        plugin.encode_batch(loaded[1], EncodeBatch("conditioning", pixels=torch.zeros(1, 3, 1, 16, 16)))
