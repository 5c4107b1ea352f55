"""Wan 2.2 5B: the first latent frame goes in clean, at time 0, is always kept, and counts nothing in the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from tuner import flow
from tuner.data.report import DataReport
from tuner.data.samples import Bucket, Framing, Prepared, Sample, View
from tuner.errors import DataError
from tuner.materialise import materialise
from tuner.model import Batch, EncodeBatch, Model
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec
from tuner_wan import WanPlugin, conditions
from tuner_wan.pictures import check_pictures

FLAVOUR = "ti2v-5b-2.2"
Load = Callable[..., tuple[WanPlugin, Run, Model]]


@pytest.fixture
def load(flavours: Callable[[str], Path], new_run: Callable[..., Run]) -> Load:
    """The plugin with these keys of its own, a run and the model with its weights."""

    def make(**own: Any) -> tuple[WanPlugin, Run, Model]:
        plugin = WanPlugin("wan", WanPlugin.Config(**own))
        run = new_run(plugin, pretrained_model_name_or_path=str(flavours(FLAVOUR)), model_flavour=FLAVOUR)
        model = plugin.load_model(run)
        materialise(model.network, device=run.device)
        return plugin, run, model

    return make


def make_batch(model: Model, frames: int = 3, **changes: Any) -> Batch:
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 48, frames, 4, 6, generator=draw)
    noise = torch.randn(latents.shape, generator=draw)
    sigmas = torch.tensor([0.3, 0.8])
    noisy, target = flow.mix(latents, noise, sigmas)
    video = {} if model.spec.condition == "none" else {"first_frame": torch.randn(2, 48, 1, 4, 6, generator=draw)}
    states = {"states": torch.randn(2, 7, 16, generator=draw)}
    batch = Batch(latents, states, video, ("a", "b"), (0, 1), sigmas, noise, noisy, target)
    return replace(batch, **changes)


def reference(model: Model, base: Path, **inputs: Tensor) -> Tensor:
    network = WanTransformer3DModel.from_pretrained(base, subfolder="transformer")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
        return network(**inputs).sample


def padded(batch: Batch) -> Tensor:
    text = torch.zeros(2, 512, 16)
    text[:, :7] = batch.text["states"]
    return text


def test_the_loss_is_the_mean_over_the_other_frames(load: Load) -> None:
    plugin, run, model = load()
    batch = make_batch(model)
    prediction = model.predict(batch)
    expected = (prediction - batch.target)[:, :, 1:].square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(plugin.compute_loss(run, model, batch).per_sample, expected)
    changed = replace(batch, target=batch.target.clone())
    changed.target[:, :, 0] += 5
    torch.testing.assert_close(plugin.compute_loss(run, model, changed).per_sample, expected)


def test_a_mask_weighs_the_other_frames(load: Load) -> None:
    plugin, run, model = load()
    mask = torch.rand(2, 1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    batch = make_batch(model, mask=mask)
    squared = (model.predict(batch) - batch.target)[:, :, 1:].square()
    weights = mask[:, :, 1:]
    expected = (weights * squared).sum((1, 2, 3, 4)) / (48 * weights.sum((1, 2, 3, 4)))
    torch.testing.assert_close(plugin.compute_loss(run, model, batch).per_sample, expected)
    mask[0, :, 1:] = 0  # bright in the given frame alone
    losses = plugin.compute_loss(run, model, batch).per_sample
    assert losses[0] == 0
    assert losses[1].isfinite()


def test_no_gradient_comes_from_the_noise_of_the_first_frame(load: Load) -> None:
    _, _, model = load()
    batch = make_batch(model)
    with torch.no_grad():
        expected = model.predict(batch)
        batch.noisy[:, :, 0] += 100
        assert torch.equal(model.predict(batch), expected)


def test_from_text_alone_it_is_a_plain_denoiser(load: Load, flavours: Callable[[str], Path]) -> None:
    plugin, run, model = load(wan_condition="none")
    (item,) = plugin.encode_batch(model, EncodeBatch("video", pixels=torch.zeros(1, 3, 5, 32, 32)))
    assert item.keys() == {"latents"}
    batch = make_batch(model)
    with torch.no_grad():
        found = model.predict(batch)
    expected = reference(
        model,
        flavours(FLAVOUR),
        hidden_states=batch.noisy,
        timestep=batch.sigmas * 1000,
        encoder_hidden_states=padded(batch),
    )
    assert torch.equal(found, expected)
    assert model.forced_tokens((3, 4, 6)) is None
    losses = plugin.compute_loss(run, model, batch).per_sample
    torch.testing.assert_close(losses, (expected - batch.target).square().mean(dim=(1, 2, 3, 4)))


def test_one_time_per_clip_on_request(load: Load, flavours: Callable[[str], Path]) -> None:
    _, _, model = load(wan_force_2_1_time_embedding=True)
    batch = make_batch(model)
    hidden = torch.cat([batch.video["first_frame"], batch.noisy[:, :, 1:]], dim=2)
    expected = reference(
        model,
        flavours(FLAVOUR),
        hidden_states=hidden,
        timestep=batch.sigmas * 1000,
        encoder_hidden_states=padded(batch),
    )
    with torch.no_grad():
        assert torch.equal(model.predict(batch), expected)


def test_its_keys_are_said_to_do_nothing_elsewhere(
    flavours: Callable[[str], Path], new_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    plugin = WanPlugin("wan", WanPlugin.Config(wan_force_2_1_time_embedding=True, wan_condition="none"))
    for flavour, said in ((FLAVOUR, False), ("i2v-14b-2.1", True)):
        caplog.clear()
        run = new_run(plugin, pretrained_model_name_or_path=str(flavours(flavour)), model_flavour=flavour)
        with caplog.at_level(logging.WARNING):
            plugin.check_model(run, run.spec)
        for key in ("wan_force_2_1_time_embedding", "wan_condition"):
            assert (f"{key} does nothing" in caplog.text) == said


def test_a_picture_is_trained_from_its_text(load: Load, flavours: Callable[[str], Path]) -> None:
    plugin, run, model = load()
    batch = make_batch(model, frames=1)
    expected = reference(
        model,
        flavours(FLAVOUR),
        hidden_states=batch.noisy,
        timestep=batch.sigmas * 1000,
        encoder_hidden_states=padded(batch),
    )
    losses = plugin.compute_loss(run, model, batch).per_sample
    torch.testing.assert_close(losses, (expected - batch.target).square().mean(dim=(1, 2, 3, 4)))


def test_tokens_of_the_first_frame_are_kept_and_at_time_0(load: Load) -> None:
    _, _, model = load()
    forced = model.forced_tokens((3, 4, 6))
    assert forced is not None
    assert forced.tolist() == [True] * 6 + [False] * 12
    times = conditions.token_times(
        model.spec, model.network.spec, torch.tensor([300.0, 800.0]), torch.zeros(2, 48, 3, 4, 6)
    )
    assert times.tolist() == [[0.0] * 6 + [300.0] * 12, [0.0] * 6 + [800.0] * 12]
    assert model.forced_tokens((1, 4, 6)) is None


def test_a_run_routes_no_token_of_the_first_frame(
    flavours: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TREAD dropping most tokens, the first frame's stay, and there are at least as many as those."""
    from tuner import pipeline
    from tuner.assembly import assemble
    from tuner.testing.clips import render_clip
    from tuner_tread import routing

    clips = tmp_path / "clips"
    clips.mkdir()
    render_clip(clips / "a.mp4", width=64, height=64, frames=9, fps=24, seed=0)
    seen: list[tuple[Any, list[Any]]] = []
    original = routing.draw_routes

    def spy(run: Any, request: Any, *rest: Any) -> Any:
        routes = original(run, request, *rest)
        seen.append((request, routes))
        return routes

    monkeypatch.setattr(routing, "draw_routes", spy)
    config = {
        "model_family": "wan",
        "model_flavour": FLAVOUR,
        "pretrained_model_name_or_path": str(flavours(FLAVOUR)),
        "output_dir": str(tmp_path / "out"),
        "max_train_steps": 2,
        "lora_rank": 2,
        "mixed_precision": "no",
        "tread_config": {"routes": [{"selection_ratio": 0.9, "start_layer_idx": 0, "end_layer_idx": 1}]},
        "data_backend_config": [
            {
                "id": "clips", "dataset_type": "video", "instance_data_dir": str(clips), "caption_strategy": "filename",
                "resolution": 64, "video": {"num_frames": 9},
            },
            {"id": "text", "dataset_type": "text_embeds", "default": True},
        ],
    }  # fmt: skip
    pipeline.run(assemble(config, plugins=["wan", "tread"]))
    assert len(seen) == 2
    for request, routes in seen:
        assert request.keep_at_least == 4  # 2 x 2 tokens of 64x64 pixels
        assert all(set(range(4)) <= set(route.keep[0].tolist()) for route in routes)


def prepared(frames: int, condition: str) -> tuple[ModelSpec, Prepared]:
    view, bucket = View(Framing(64, 32, 0, 0)), Bucket(frames, 32, 64)
    pictures = Sample("d/p.png", "d", Path("p.png"), "h", ("c",), 64, 32, 1, 0, bucket, (view,), Path())
    clip = replace(pictures, sample_id="d/c.mp4", bucket=Bucket(9, 32, 64))
    spec = ModelSpec("wan", "the flavour", "b", (), LatentGeometry(16, 4, 8), 16, 16.0, (), condition=condition)

    def decode(path: Path, view: View, bucket: Bucket) -> Tensor:
        raise NotImplementedError

    return spec, Prepared((pictures, clip), {}, Path(), DataReport(()), decode)


@pytest.mark.parametrize(
    ("condition", "words"),
    [("none", None), ("clean_first_frame", "text alone"), ("first_frame", "only learns to copy")],
)
def test_what_pictures_teach_is_said(condition: str, words: str | None) -> None:
    lines = list(check_pictures(*prepared(1, condition)))
    assert len(lines) == (words is not None)
    assert words is None or (words in lines[0] and lines[0].startswith("1 of 2 samples"))
    assert not list(check_pictures(*prepared(5, condition)))


def test_pictures_between_two_frames_are_refused() -> None:
    with pytest.raises(DataError, match="first and a last frame"):
        list(check_pictures(*prepared(1, "first_and_last_frame")))
