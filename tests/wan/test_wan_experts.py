"""The two experts of Wan 2.2: each on its own noise levels, both in one run, both in validation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats

from tuner import flow, rng
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.materialise import materialise
from tuner.model import EncodeBatch, SampleRequest
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner_wan import WanPlugin

NewRun = Callable[..., Run]
Flavours = Callable[[str], Path]
DRAWS = 25_000


# --- noise levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_range", [(0.875, 1.0), (0.0, 0.875), (0.9, 1.0), (0.0, 0.9)], ids=str)
@pytest.mark.parametrize(
    "keys",
    [
        {"flow_schedule_shift": 5.0},
        {"flow_schedule_shift": 3.0, "flow_use_uniform_schedule": True},
        {"flow_use_beta_schedule": True},
    ],
    ids=["logit-normal", "uniform", "beta"],
)
def test_no_draw_leaves_the_experts_range_and_the_density_is_the_truncated_one(
    keys: dict[str, Any], sigma_range: tuple[float, float]
) -> None:
    """Kolmogorov and Smirnov against the whole density's own distribution function, cut to the range."""
    core = CoreConfig(**keys)
    draws = DRAWS if sigma_range[0] == 0.875 or sigma_range[1] == 0.875 else DRAWS // 5
    draws = draws if "flow_schedule_shift" in keys and len(keys) == 1 else DRAWS // 12
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(
        [flow.draw_sigma(core, generator, 1000, sigma_range) for _ in range(draws)], dtype=torch.float32
    )
    sigmas = flow._inside(drawn, sigma_range).double().numpy()
    low, high = sigma_range
    assert sigmas.min() >= low
    assert sigmas.max() <= 1.0 if high == 1.0 else sigmas.max() < high
    shift = core.flow_schedule_shift or 1.0

    def whole(sigma: Any) -> Any:
        unshifted = sigma / (shift - (shift - 1) * sigma)
        if core.flow_use_beta_schedule:
            return stats.beta(2, 2).cdf(unshifted)
        if core.flow_use_uniform_schedule:
            return unshifted
        with np.errstate(divide="ignore"):
            return stats.norm.cdf(np.log(unshifted / (1 - unshifted)))

    bottom, top = whole(np.float64(low)), whole(np.float64(high))
    test = stats.kstest(sigmas, lambda sigma: (whole(sigma) - bottom) / (top - bottom))
    assert test.pvalue > 1e-3


def test_rounding_never_takes_a_level_over_the_boundary() -> None:
    edge = torch.tensor([0.9, 0.9 - 1e-12, 0.9 + 1e-12], dtype=torch.float64).to(torch.float32)
    assert (flow._inside(edge, (0.0, 0.9)).double() < 0.9).all()
    assert (flow._inside(edge, (0.9, 1.0)).double() >= 0.9).all()


def test_custom_timesteps_must_be_the_experts_own(flavours: Flavours, plugin: WanPlugin) -> None:
    def networks(flavour: str) -> Any:
        core = CoreConfig(pretrained_model_name_or_path=str(flavours(flavour)), model_flavour=flavour)
        return plugin.describe_model(Run(core, {})).networks

    high, both = networks("t2v-14b-2.2-high"), networks("t2v-14b-2.2-both")
    with pytest.raises(ConfigError, match=r"holds 300, and high_noise is trained on 875 to 1000"):
        flow.check(CoreConfig(flow_custom_timesteps=[900, 300]), high)
    with pytest.raises(ConfigError, match="low_noise is trained on 0 to 875"):
        flow.check(CoreConfig(flow_custom_timesteps=[900]), both)
    split = CoreConfig(flow_custom_timesteps=[900, 300])
    flow.check(split, both)
    for network, time in zip(both, (0.9, 0.3), strict=True):
        drawn = {flow.draw_sigma(split, rng.generator(0, "s", step, 0), 9, network.sigma_range) for step in range(20)}
        assert drawn == {time}


# --- validation -------------------------------------------------------------------------------------------


@pytest.fixture
def pair(flavours: Flavours) -> Path:
    return flavours("t2v-14b-2.2-high")


def request(plugin: WanPlugin, model: Any, **changes: Any) -> SampleRequest:
    prompt, negative = plugin.encode_batch(model, EncodeBatch("text", captions=("a red ball", "bad")))
    plain = SampleRequest(prompt, negative, 48, 32, 9, 6, 4.0, 11, "unipc", None)
    return replace(plain, **changes)


def rendered(base: Path, **changes: Any) -> torch.Tensor:
    """What diffusers itself makes of the same files."""
    settings = {"prompt": "a red ball", "negative_prompt": "bad", "width": 48, "height": 32, "num_frames": 9}
    pipeline = WanPipeline.from_pretrained(base)
    with torch.no_grad():
        for module in (pipeline.transformer, pipeline.transformer_2):
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
    settings |= {"num_inference_steps": 6, "guidance_scale": 4.0} | changes
    result: torch.Tensor = pipeline(
        **settings, generator=torch.Generator().manual_seed(11), output_type="latent"
    ).frames
    return result


def loaded(plugin: WanPlugin, new_run: NewRun, base: Path, flavour: str) -> Any:
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(base), model_flavour=flavour))
    for network in model.networks.values():
        materialise(network, device=torch.device("cpu"))
        network.module.eval()
    return model


@pytest.mark.parametrize("guidance_2", [None, 2.0])
def test_both_experts_render_as_diffusers_does(
    guidance_2: float | None, pair: Path, plugin: WanPlugin, new_run: NewRun
) -> None:
    model = loaded(plugin, new_run, pair, "t2v-14b-2.2-both")
    calls: list[str] = []
    for name, network in model.networks.items():
        network.module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    latents = model.sample(request(plugin, model, guidance_2=guidance_2))
    assert torch.equal(latents, rendered(pair, guidance_scale_2=guidance_2))
    order = [name for index, name in enumerate(calls) if index == 0 or calls[index - 1] != name]
    assert order == ["transformer", "transformer_2"], "exchanged once, high noise first"


@pytest.mark.parametrize("trained", ["high", "low"])
def test_the_other_stage_is_loaded_for_validation_and_freed(trained: str, pair: Path, new_run: NewRun) -> None:
    plugin = WanPlugin("wan", WanPlugin.Config(wan_validation_load_other_stage=True))
    model = loaded(plugin, new_run, pair, f"t2v-14b-2.2-{trained}")
    assert len(model.networks) == 1
    latents = model.sample(request(plugin, model))
    assert torch.equal(latents, rendered(pair))
    assert not model._held


def test_without_it_one_expert_renders_alone(pair: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    model = loaded(plugin, new_run, pair, "t2v-14b-2.2-low")
    assert "other_expert" not in model.components
    assert not torch.equal(model.sample(request(plugin, model)), rendered(pair))


# --- both in one run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expert-clips")
    for index in range(2):
        render_clip(folder / f"clip {index}.mp4", width=48, height=32, frames=5, fps=16, seed=index)
    return folder


@pytest.fixture
def job(pair: Path, clips: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the pair; returns the output folder."""

    def run(name: str, **keys: Any) -> Path:
        from tuner import pipeline
        from tuner.assembly import assemble

        config = {
            "model_family": "wan",
            "model_flavour": "t2v-14b-2.2-both",
            "pretrained_model_name_or_path": str(pair),
            "output_dir": str(tmp_path / name),
            "cache_dir": str(tmp_path / "cache"),
            "wan_expert_switch_steps": 2,
            "max_train_steps": 7,
            "checkpoint_step_interval": 0,
            "learning_rate": 1e-2,
            "lr_scheduler": "cosine",
            "lora_rank": 2,
            "mixed_precision": "no",
            "data_backend_config": [
                {
                    "id": "clips",
                    "dataset_type": "video",
                    "instance_data_dir": str(clips),
                    "caption_strategy": "filename",
                    "resolution": 32,
                    "video": {"num_frames": 5},
                },
                {"id": "text", "dataset_type": "text_embeds", "default": True},
            ],
            **keys,
        }
        pipeline.run(assemble(config, plugins=["wan"]))
        return tmp_path / name

    return run


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_experts_take_turns_each_on_its_own_noise(job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[float, float], float]] = []
    original = flow.draw

    def spy(*arguments: Any, **keys: Any) -> Any:
        sigmas, noise = original(*arguments, **keys)
        seen.extend((keys["sigma_range"], float(each)) for each in sigmas)
        return sigmas, noise

    monkeypatch.setattr(flow, "draw", spy)
    output = job("turns")
    turns = [
        "transformer",
        "transformer",
        "transformer_2",
        "transformer_2",
        "transformer",
        "transformer",
        "transformer_2",
    ]
    assert [line["network"] for line in lines(output)] == turns
    drawn = seen[: len(turns)]  # one more batch is made ahead
    assert [sigma_range[0] for sigma_range, _ in drawn] == [0.875 if turn == "transformer" else 0.0 for turn in turns]
    assert all(low <= sigma <= high for (low, high), sigma in seen)
    rates = {name: [line["learning_rate"] for line in lines(output) if line["network"] == name] for name in set(turns)}
    for name, own in rates.items():
        cosine = [1e-2 * (1 + np.cos(np.pi * step / len(own))) / 2 for step in range(len(own))]
        assert np.allclose(own, cosine), f"the curve of {name} is that of a run of its own"


def test_an_expert_moves_only_in_its_own_turns(job: Callable[..., Path]) -> None:
    output = job("apart", checkpoint_step_interval=1)
    states = {
        name: [load_file(output / f"checkpoint-{step}" / f"adapter.{name}.safetensors") for step in range(1, 8)]
        for name in ("transformer", "transformer_2")
    }
    for line in lines(output)[1:]:
        step = line["step"]
        for name, saved in states.items():
            before, after = saved[step - 2], saved[step - 1]
            moved = any(not torch.equal(before[key], after[key]) for key in before)
            assert moved == (name == line["network"]), (step, name)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_stopped_in_or_between_turns_goes_on_bit_equal(stop: int, job: Callable[..., Path]) -> None:
    whole = job("whole", lr_scheduler="constant")
    job("parts", max_train_steps=stop, lr_scheduler="constant")
    parts = job("parts", resume_from_checkpoint="latest", lr_scheduler="constant")
    for name in ("transformer", "transformer_2"):
        for kind in ("adapter", "optimizer"):
            file = f"checkpoint-7/{kind}.{name}.safetensors"
            expected, found = load_file(whole / file), load_file(parts / file)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_pair_is_saved_and_loads_into_both_transformers(job: Callable[..., Path], pair: Path) -> None:
    folder = job("saved") / "checkpoint-7"
    files = {label: folder / f"pytorch_lora_weights.{label}.safetensors" for label in ("high_noise", "low_noise")}
    for label, file in files.items():
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert (metadata["tuner.expert"], metadata["tuner.boundary"]) == (label, "0.875")
    before = rendered(pair)
    pipeline = WanPipeline.from_pretrained(pair)
    pipeline.load_lora_weights(folder, weight_name=files["high_noise"].name, adapter_name="high")
    pipeline.load_lora_weights(
        folder, weight_name=files["low_noise"].name, adapter_name="low", load_into_transformer_2=True
    )
    for module, file in ((pipeline.transformer, "high_noise"), (pipeline.transformer_2, "low_noise")):
        layers = [name for name, _ in module.named_parameters() if "lora_A" in name]
        assert len(layers) == len([key for key in load_file(files[file]) if key.endswith("lora_A.weight")])
    after = pipeline(
        "a red ball", "bad", width=48, height=32, num_frames=9, num_inference_steps=6, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11), output_type="latent",
    ).frames  # fmt: skip
    assert not torch.equal(before, after)
