"""Image to video: trained as diffusers runs it, learns, and is loaded and rendered by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor

from tuner import flow
from tuner.builtin.lora import LoraPlugin
from tuner.errors import PluginError
from tuner.materialise import materialise
from tuner.model import Batch, EncodeBatch, Model, SampleRequest
from tuner.run import Run
from tuner_wan import WanPlugin, conditions

FLAVOURS = ("i2v-14b-2.1", "flf2v-14b-2.1", "i2v-14b-2.2-high", "ti2v-5b-2.2")
PROMPT, NEGATIVE = "A red circle moving downwards", "色调艳丽，过曝"
Load = Callable[..., tuple[Run, Model]]


@pytest.fixture
def load(flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run], tmp_path: Path) -> Load:
    """The model of a flavour with its weights, in float32."""

    def make(flavour: str, family: WanPlugin = plugin, **keys: Any) -> tuple[Run, Model]:
        base = str(flavours(flavour))
        core = {"model_flavour": flavour, "output_dir": tmp_path / "out"} | keys
        run = new_run(family, pretrained_model_name_or_path=base, **core)
        model = family.load_model(run)
        for network in model.networks.values():
            materialise(network, device=run.device)
        return run, model

    return make


def clips(count: int, frames: int = 9, seed: int = 0) -> Tensor:
    """(B, 3, F, 32, 64) in [-1, 1], of 8 bits."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, frames, 32, 64), generator=draw) / 127.5 - 1


@torch.no_grad()
def encoded(plugin: WanPlugin, model: Model, pixels: Tensor) -> list[dict[str, Tensor]]:
    """What the cache would hold of each clip."""
    items = plugin.encode_batch(model, EncodeBatch("video", pixels=pixels))
    if "conditioning" in model.spec.encoders:
        images = plugin.encode_batch(model, EncodeBatch("conditioning", pixels=pixels))
        items = [item | image for item, image in zip(items, images, strict=True)]
    return items


def make_batch(plugin: WanPlugin, model: Model, sigmas: Tensor, frames: int = 9) -> Batch:
    items = encoded(plugin, model, clips(len(sigmas), frames))
    video = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    latents = video.pop("latents")
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    noisy, target = flow.mix(latents, noise, sigmas)
    with torch.no_grad():
        texts = plugin.encode_batch(model, EncodeBatch("text", captions=(PROMPT, "a blue square")[: len(sigmas)]))
    states = torch.nn.utils.rnn.pad_sequence([each["states"] for each in texts], batch_first=True)
    ids = tuple(f"clip-{index}" for index in range(len(sigmas)))
    return Batch(latents, {"states": states}, video, ids, tuple(range(len(ids))), sigmas, noise, noisy, target)


def by_hand(flavour: str, batch: Batch) -> dict[str, Tensor | None]:
    """Arguments of diffusers' forward, written out."""
    latents, video = batch.noisy, batch.video
    size, frames = latents.shape[0], latents.shape[2]
    times = batch.sigmas * 1000
    hidden, image = latents, None
    if flavour == "ti2v-5b-2.2":
        hidden = latents.clone()
        hidden[:, :, 0] = video["first_frame"][:, :, 0]
        per_frame = latents.shape[3] // 2 * (latents.shape[4] // 2)
        times = times[:, None].repeat(1, frames * per_frame)
        times[:, :per_frame] = 0
    else:
        mask = torch.zeros(size, 4, *latents.shape[2:])
        mask[:, :, 0] = 1
        if flavour == "flf2v-14b-2.1":
            mask[:, 3, -1] = 1
        hidden = torch.cat([latents, mask, video["condition"]], dim=1)
    if "image_states" in video:
        image = video["image_states"].reshape(-1, 257, 16)
    text = torch.zeros(size, 512, 16)
    text[:, : batch.text["states"].shape[1]] = batch.text["states"]
    return {
        "hidden_states": hidden,
        "timestep": times,
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": image,
    }


def reference_of(base: Path, model: Model) -> WanTransformer3DModel:
    """diffusers' own network, its weights copied from ours, for equal storage offsets."""
    reference = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            assert torch.equal(parameter, model.network.module.get_parameter(name))
            parameter.data = parameter.data.clone()
    return reference


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_forward_is_diffusers_bit_for_bit(
    flavour: str, load: Load, flavours: Callable[[str], Path], plugin: WanPlugin
) -> None:
    _, model = load(flavour)
    batch = make_batch(plugin, model, torch.tensor([0.93, 0.95]))
    with torch.no_grad():
        expected = reference_of(flavours(flavour), model)(**by_hand(flavour, batch)).sample
        found = model.predict(batch)
    assert torch.equal(found, expected)
    assert found.shape == batch.latents.shape
    for name, tensor in batch.video.items():
        batch.video[name] = tensor + 1
        with torch.no_grad():
            assert not torch.equal(model.predict(batch), expected), f"{name} must matter"
        batch.video[name] = tensor


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fifty_steps_learn_and_diffusers_loads_the_result(
    flavour: str, load: Load, flavours: Callable[[str], Path], plugin: WanPlugin, tmp_path: Path
) -> None:
    run, model = load(flavour)
    batch = make_batch(plugin, model, torch.tensor([0.93, 0.95]))
    lora = LoraPlugin("lora", LoraPlugin.Config(lora_rank=4, lora_format="diffusers"))
    (transform,) = lora.model_transforms(run=run, model=model)
    model.network.adapter = adapter = transform.apply(model.network)
    assert adapter is not None
    parameters = [parameter for group in adapter.groups for parameter in group.parameters.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = plugin.compute_loss(run, model, batch).per_sample.mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

    lora.save(run=run, model=model, directory=tmp_path)[0]()
    pipeline = WanImageToVideoPipeline.from_pretrained(flavours(flavour))
    pipeline.register_to_config(boundary_ratio=None, expand_timesteps=flavour == "ti2v-5b-2.2")
    before = rendered(pipeline, flavour)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    after = rendered(pipeline, flavour)
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    model.network.module.eval()
    torch.testing.assert_close(model.sample(request(plugin, model)), after, rtol=1e-3, atol=1e-3)


def picture(frame: Tensor) -> Image.Image:
    return Image.fromarray(((frame + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def rendered(pipeline: WanImageToVideoPipeline, flavour: str, **changes: Any) -> Tensor:
    """Latents that diffusers makes from the first (and last) frame of the first clip."""
    pixels = clips(1)
    last = {"last_image": picture(pixels[0, :, -1])} if flavour == "flf2v-14b-2.1" else {}
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0} | last | changes
    latents: Tensor = pipeline(
        picture(pixels[0, :, 0]), PROMPT, NEGATIVE, width=64, height=32, num_frames=9, output_type="latent",
        generator=torch.Generator().manual_seed(11), **settings,
    ).frames  # fmt: skip
    return latents


def request(plugin: WanPlugin, model: Model, **changes: Any) -> SampleRequest:
    (item,) = encoded(plugin, model, clips(1))
    with torch.no_grad():
        prompt, negative = plugin.encode_batch(model, EncodeBatch("text", captions=(PROMPT, NEGATIVE)))
    settings: dict[str, Any] = {"steps": 3, "guidance": 5.0, "flow_shift": None} | changes
    images = {name: tensor for name, tensor in item.items() if name != "latents"}
    return SampleRequest(
        prompt=prompt, negative=negative, width=64, height=32, frames=9, seed=11, scheduler="unipc", images=images,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rendering_equals_diffusers_pipeline(
    flavour: str, load: Load, flavours: Callable[[str], Path], plugin: WanPlugin
) -> None:
    _, model = load(flavour)
    model.network.module.eval()
    pipeline = WanImageToVideoPipeline.from_pretrained(flavours(flavour))
    pipeline.register_to_config(boundary_ratio=None, expand_timesteps=flavour == "ti2v-5b-2.2")
    pipeline.transformer = reference_of(flavours(flavour), model)
    asked = request(plugin, model)
    held = list(model._held)
    latents = model.sample(asked)
    assert torch.equal(latents, rendered(pipeline, flavour))
    assert held == list(model._held) == [], "neither VAE nor CLIP is loaded"
    other = {name: tensor.flip(-1) for name, tensor in asked.images.items()}
    assert not torch.equal(model.sample(replace(asked, images=other)), latents)
    with pytest.raises(PluginError, match="validation_images"):
        model.sample(replace(asked, images={}))


def test_both_experts_render_from_an_image(load: Load, flavours: Callable[[str], Path], plugin: WanPlugin) -> None:
    _, model = load("i2v-14b-2.2-both")
    for network in model.networks.values():
        network.module.eval()
    pipeline = WanImageToVideoPipeline.from_pretrained(flavours("i2v-14b-2.2-both"))
    with torch.no_grad():
        for module in (pipeline.transformer, pipeline.transformer_2):
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
    latents = model.sample(request(plugin, model, steps=6, guidance_2=2.0))
    expected = rendered(pipeline, "i2v-14b-2.2-both", num_inference_steps=6, guidance_scale_2=2.0)
    assert torch.equal(latents, expected)


def test_a_lora_of_text_to_video_fits_image_to_video(load: Load, plugin: WanPlugin, tmp_path: Path) -> None:
    """The targets are the same matrices; only the patch embedding has another shape, and no LoRA adapts that."""
    run, model = load("t2v-480p-14b-2.1")
    lora = LoraPlugin("lora", LoraPlugin.Config(lora_rank=4, lora_format="diffusers"))
    (transform,) = lora.model_transforms(run=run, model=model)
    model.network.adapter = transform.apply(model.network)
    state = model.network.adapter.state()
    for name, tensor in state.items():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    run_image, image = load("i2v-14b-2.2-high")
    (transform,) = lora.model_transforms(run=run_image, model=image)
    image.network.adapter = transform.apply(image.network)
    batch = make_batch(plugin, image, torch.tensor([0.93]))
    with torch.no_grad():
        before = image.predict(batch)
        image.network.adapter.load(state)
        assert not torch.equal(image.predict(batch), before)


# --- whole runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, and a picture for each."""
    from tuner.testing.clips import render_clip

    folder = tmp_path_factory.mktemp("material")
    (folder / "clips").mkdir()
    (folder / "first").mkdir()
    for index in range(2):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=64, height=32, frames=9, fps=16, seed=index)
        drawn = torch.Generator().manual_seed(index)
        colours = torch.randint(0, 256, (48, 96, 3), generator=drawn, dtype=torch.uint8)
        Image.fromarray(colours.numpy()).save(folder / "first" / f"clip {index}.png")
    return folder


@pytest.fixture
def job(material: Path, flavours: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Run the job of a flavour; returns the output folder."""

    def run(flavour: str, dataset: dict[str, Any], extra: list[dict[str, Any]], **keys: Any) -> Path:
        from tuner import pipeline
        from tuner.assembly import assemble

        clips = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(material / "clips"),
            "caption_strategy": "filename",
            "resolution": 45,
            "video": {"num_frames": 9},
        }
        config = {
            "model_family": "wan",
            "model_flavour": flavour,
            "pretrained_model_name_or_path": str(flavours(flavour)),
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "max_train_steps": 2,
            "lora_rank": 2,
            "mixed_precision": "no",
            "validation_prompt": "clip 1",
            "validation_num_inference_steps": 2,
            "data_backend_config": [
                clips | dataset,
                {"id": "text", "dataset_type": "text_embeds", "default": True},
                *extra,
            ],
            **keys,
        }
        pipeline.run(assemble(config, plugins=["wan", "tread"]))
        return tmp_path / "out"

    return run


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_run_with_paired_frames_and_embeddings(
    job: Callable[..., Path], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames come from the paired pictures, embeddings lie in their own dataset's folder, prompts get pictures."""
    from safetensors.torch import load_file

    seen: list[Batch] = []
    original = WanPlugin.compute_loss

    def spy(self: WanPlugin, run: Run, model: Model, batch: Batch) -> Any:
        seen.append(batch)
        return original(self, run, model, batch)

    spy.tuner_impl = original.tuner_impl  # type: ignore[attr-defined]
    monkeypatch.setattr(WanPlugin, "compute_loss", spy)
    starts = Path(shutil.copytree(material / "first", tmp_path / "starts"))
    dataset = {"conditioning_data": "starts", "conditioning_image_embeds": "images"}
    extra = [
        {
            "id": "starts",
            "dataset_type": "conditioning",
            "conditioning_type": "first_frame",
            "instance_data_dir": str(starts),
        },
        {"id": "images", "dataset_type": "conditioning_image_embeds", "cache_dir": str(tmp_path / "embeds")},
    ]
    output = job("i2v-14b-2.1", dataset, extra)
    assert len(entries(tmp_path / "embeds")) == 2
    assert {tuple(load_file(file)) for file in entries(tmp_path / "embeds")} == {("image_states",)}
    latents = [load_file(file) for file in entries(tmp_path / "cache" / "vae")]
    assert {frozenset(each) for each in latents} == {frozenset({"latents", "condition"})}
    assert len(latents) == 2, "the validation clip of the trained size is encoded already"
    assert all(set(batch.video) == {"condition", "image_states"} for batch in seen)
    record = json.loads((output / "validation/step-2/validation.json").read_text())
    assert record["prompts"][0]["image"] == "clip 1.mp4", "the clip with the prompt for a caption"
    assert (output / "validation/step-2/validation.mp4").is_file()

    before = {path: path.stat().st_mtime_ns for path in entries(tmp_path)}
    Image.new("RGB", (96, 48)).save(starts / "clip 0.png")
    job("i2v-14b-2.1", dataset, extra, output_dir=str(tmp_path / "again"))
    new = [path for path in entries(tmp_path) if path not in before and "again" not in path.parts]
    assert [path.parts[len(tmp_path.parts)] for path in new] == ["cache", "embeds"], "another picture, another entry"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_prompts_start_from_the_users_pictures(
    job: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At another size and length than is trained; a run that takes no embeddings says that their dataset is unused."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("cat", "zebra"):
        Image.new("RGB", (80, 60), "red" if name == "cat" else "blue").save(pictures / f"{name}.png")
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"dog": "a dog", "cat": "a cat", "cow": "a cow"}))
    images = {"id": "images", "dataset_type": "conditioning_image_embeds", "cache_dir": str(tmp_path / "embeds")}
    output = job(
        "i2v-14b-2.2-high", {"conditioning_image_embeds": "images"}, [images], validation_prompt=None,
        user_prompt_library=str(library), validation_images=str(pictures), validation_num_video_frames=13,
        validation_resolution="48x32",
    )  # fmt: skip
    record = json.loads((output / "validation/step-2/validation.json").read_text())
    chosen = {prompt["nickname"]: prompt["image"] for prompt in record["prompts"]}
    assert chosen == {"dog": "zebra.png", "cat": "cat.png", "cow": "zebra.png"}
    assert not (tmp_path / "embeds").exists()
    assert all(prompt["files"] for prompt in record["prompts"])


def test_first_frames_of_a_model_between_two_frames(job: Callable[..., Path], tmp_path: Path) -> None:
    """``<name>-last`` is the last frame; without it the run is refused before any weight is read."""
    from tuner.errors import ConfigError

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 32), "red").save(pictures / "validation.png")
    with pytest.raises(ConfigError, match=r"validation-last\.png"):
        job("flf2v-14b-2.1", {}, [], validation_images=str(pictures))
    Image.new("RGB", (64, 32), "blue").save(pictures / "validation-last.png")
    output = job("flf2v-14b-2.1", {}, [], validation_images=str(pictures))
    assert (output / "validation/step-2/validation.mp4").is_file()


def test_conditions_of_a_short_clip_reach_as_far_as_the_rendered_one() -> None:
    """What is rendered at another length has the condition of that length."""
    first = torch.ones(3, 1, 2, 2)
    given = conditions.given_clip(torch.zeros(3, 13, 2, 2), first, None)
    assert given.shape[1] == 13
    assert torch.equal(given[:, :1], first)
    assert not given[:, 1:].any()
