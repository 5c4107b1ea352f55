"""What a denoiser is given of its frames is what diffusers' WanImageToVideoPipeline makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tuner.builtin.encoding.encodings import image_key, video_key
from tuner.data.samples import Bucket, Companion, Framing, Sample, View
from tuner.errors import PluginError
from tuner.model import EncodeBatch, Model
from tuner.run import Run
from tuner_wan import WanPlugin, conditions

GOLDEN = Path(__file__).parent / "golden"
FLAVOURS = ("i2v-14b-2.1", "flf2v-14b-2.1", "i2v-14b-2.2-high", "ti2v-5b-2.2")
WITH_CLIP = ("i2v-14b-2.1", "flf2v-14b-2.1")
Load = Callable[[str], tuple[Model, WanImageToVideoPipeline]]


@pytest.fixture
def load(flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]) -> Load:
    """The model of a flavour without its denoiser's weights, and diffusers' pipeline from the same files."""

    def make(flavour: str) -> tuple[Model, WanImageToVideoPipeline]:
        base = flavours(flavour)
        run = new_run(plugin, pretrained_model_name_or_path=str(base), model_flavour=flavour)
        pipeline = WanImageToVideoPipeline.from_pretrained(base)
        pipeline.register_to_config(expand_timesteps=flavour == "ti2v-5b-2.2")
        return plugin.load_model(run), pipeline

    return make


def clip(frames: int, seed: int = 0) -> Tensor:
    """(1, 3, F, 32, 64) in [-1, 1], of 8 bits."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, frames, 32, 64), generator=draw) / 127.5 - 1


def picture(frame: Tensor) -> Image.Image:
    return Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def prepared(pipeline: WanImageToVideoPipeline, first: Tensor, last: Tensor | None, frames: int) -> Tensor:
    """The condition (1, C, F', h, w) that the pipeline makes of frames (1, 3, H, W)."""
    prepared: Tensor = pipeline.prepare_latents(
        first, 1, pipeline.vae.config.z_dim, 32, 64, frames, torch.float32, torch.device("cpu"),
        torch.Generator().manual_seed(0), None, last,
    )[1]  # fmt: skip
    return prepared


@torch.no_grad()
def encoded(plugin: WanPlugin, model: Model, kind: str, **what: object) -> dict[str, Tensor]:
    (item,) = plugin.encode_batch(model, EncodeBatch(kind, **what))  # type: ignore[arg-type]
    return item


@pytest.mark.parametrize("frames", [5, 13])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_condition_equals_prepare_latents(flavour: str, frames: int, load: Load, plugin: WanPlugin) -> None:
    model, pipeline = load(flavour)
    pixels = clip(frames)
    last = pixels[:, :, -1] if flavour == "flf2v-14b-2.1" else None
    expected = prepared(pipeline, pixels[:, :, 0], last, frames)
    item = encoded(plugin, model, "video", pixels=pixels)
    if flavour == "ti2v-5b-2.2":
        assert item.keys() == {"latents", "first_frame"}
        assert torch.equal(item["first_frame"].unsqueeze(0), expected)
        assert item["first_frame"].shape[1] == 1
    else:
        assert item.keys() == {"latents", "condition"}
        found = conditions.with_mask(item["condition"].unsqueeze(0), model.spec.condition, 4)
        assert found.shape[1] == model.spec.networks[0].in_channels - model.spec.latents.channels == 20
        assert torch.equal(found, expected)


@pytest.mark.parametrize("flavour", WITH_CLIP)
def test_embeddings_equal_the_pipelines(flavour: str, load: Load, plugin: WanPlugin) -> None:
    model, pipeline = load(flavour)
    pixels = clip(5)
    shown = [picture(pixels[0, :, 0])] + ([picture(pixels[0, :, -1])] if flavour.startswith("flf") else [])
    with torch.no_grad():
        expected = pipeline.encode_image(shown, torch.device("cpu"))
    states = encoded(plugin, model, "conditioning", pixels=pixels)["image_states"]
    assert states.shape == (len(shown), 257, 16)
    assert torch.equal(states, expected)


def test_given_frames_stand_in_the_place_of_the_clips_own(load: Load, plugin: WanPlugin) -> None:
    model, pipeline = load("flf2v-14b-2.1")
    own, other = clip(5), clip(5, seed=1)
    frames = {"first_frame": other[:, :, :1], "last_frame": other[:, :, 2:3]}
    item = encoded(plugin, model, "video", pixels=own, frames=frames)
    expected = prepared(pipeline, other[:, :, 0], other[:, :, 2], 5)
    assert torch.equal(item["condition"], expected[0, 4:])
    assert torch.equal(item["latents"], encoded(plugin, model, "video", pixels=own)["latents"])
    half = encoded(plugin, model, "conditioning", pixels=own, frames={"last_frame": other[:, :, 2:3]})["image_states"]
    with torch.no_grad():
        expected = pipeline.encode_image([picture(own[0, :, 0]), picture(other[0, :, 2])], torch.device("cpu"))
    assert torch.equal(half, expected)


def test_the_companions_of_a_batch_change_no_bit(load: Load, plugin: WanPlugin) -> None:
    model, _ = load("flf2v-14b-2.1")
    clips = torch.cat([clip(5), clip(5, seed=1)])
    for kind in ("video", "conditioning"):
        with torch.no_grad():
            together = plugin.encode_batch(model, EncodeBatch(kind, pixels=clips))  # type: ignore[arg-type]
        alone = [encoded(plugin, model, kind, pixels=each[None]) for each in clips]
        for one, other in zip(together, alone, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_text_to_video_encodes_latents_alone(load: Load, plugin: WanPlugin, loaded: tuple[Run, Model]) -> None:
    assert encoded(plugin, loaded[1], "video", pixels=clip(5)).keys() == {"latents"}
    with pytest.raises(PluginError, match="conditioning"):
        plugin.encode_batch(load("i2v-14b-2.2-high")[0], EncodeBatch("conditioning", pixels=clip(5)))


def test_one_frame_has_no_last_frame(load: Load, plugin: WanPlugin) -> None:
    with pytest.raises(PluginError, match="one frame"):
        plugin.encode_batch(load("flf2v-14b-2.1")[0], EncodeBatch("video", pixels=clip(1)))


@given(frames=st.integers(1, 30), last=st.booleans())
def test_the_mask_is_the_pipelines_formula(frames: int, last: bool) -> None:
    """Over pixel frames, the first one repeated, folded to four channels (as ``prepare_latents`` writes it)."""
    pixel_frames = 4 * (frames - 1) + 1
    mask = torch.ones(1, 1, pixel_frames, 2, 3)
    mask[:, :, list(range(1, pixel_frames - 1 if last else pixel_frames))] = 0
    repeated = torch.repeat_interleave(mask[:, :, :1], dim=2, repeats=4)
    folded = torch.cat([repeated, mask[:, :, 1:]], dim=2).view(1, -1, 4, 2, 3).transpose(1, 2)
    condition = "first_and_last_frame" if last else "first_frame"
    assert torch.equal(conditions.frame_mask(condition, frames, 4).expand(4, frames, 2, 3), folded[0])


def test_what_is_given_is_part_of_an_entrys_name() -> None:
    """An entry for text to video has no condition, and another picture makes another one."""
    from tuner.builtin.encoding.encodings import _given
    from tuner.spec import LatentGeometry, ModelSpec

    spec = ModelSpec("wan", "f", "b", (), LatentGeometry(16, 4, 8), 16, 16.0, ())
    view = View(Framing(64, 32, 0, 0))
    sample = Sample("d/c.mp4", "d", Path("c.mp4"), "hash", ("c",), 64, 32, 5, 16.0, Bucket(5, 32, 64), (view,), Path())
    paired = replace(sample, companions=(Companion("first_frame", Path("a.png"), "one"),))
    other = replace(sample, companions=(Companion("first_frame", Path("a.png"), "two"),))
    image = replace(spec, condition="first_frame")
    both = replace(spec, condition="first_and_last_frame")
    assert video_key(sample, view, "e", _given(sample, spec)) == video_key(sample, view, "e")
    cases = [(sample, spec), (sample, image), (sample, both), (paired, image), (other, image)]
    assert len({video_key(each, view, "e", _given(each, about)) for each, about in cases}) == 5
    assert _given(paired, spec) == [], "a picture that is not used changes nothing"
    masked = replace(sample, companions=(Companion("mask", Path("m.png"), "one"),))
    assert _given(masked, image) == _given(sample, image)
    roles = ("first_frame",)
    assert len({image_key(each, view, "e", roles) for each in (sample, paired, other)}) == 3
    still = replace(view, still=True)
    assert image_key(sample, still, "e", roles) != image_key(sample, view, "e", roles)


def test_encodings_have_not_changed_without_a_new_version(load: Load, plugin: WanPlugin) -> None:
    """When this fails on purpose: bump VIDEO_VERSION or IMAGE_VERSION, so that no cache holds the old kind."""
    golden = json.loads((GOLDEN / "encoding_images.json").read_text())
    model, _ = load("flf2v-14b-2.1")
    for component, kind, name in (("vae", "video", "condition"), ("image_encoder", "conditioning", "image_states")):
        tensor = encoded(plugin, model, kind, pixels=clip(5))[name]
        expected = golden[component]
        assert model.components[component].version == expected["version"]
        assert list(tensor.shape) == expected["shape"]
        found = tensor.flatten()[:: expected["stride"]]
        torch.testing.assert_close(found, torch.tensor(expected["values"]), atol=1e-4, rtol=1e-3)
