"""What the family computes is what diffusers computes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from tuner_ltx import LtxPlugin
from tuner_ltx.model import pack
from tuner_ltx.sampling import make_scheduler
from tuner_ltx.tiny import build_tiny

from tuner.blocks import RouteRequest, StepContext, TokenRoute
from tuner.errors import ConfigError, ModelError
from tuner.model import Model, SampleRequest
from tuner.testing.family import CAPTIONS, FamilyBench

CLIP = (9, 64, 96)
GRID = (2, 2, 3)
SCALE = (8 / 25, 32, 32)
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny(tmp_path_factory.mktemp("base") / "tiny-ltx", layers=LAYERS)


def bench_of(folder: Path) -> FamilyBench:
    plugin = LtxPlugin("ltx", LtxPlugin.Config())
    return FamilyBench(plugin, {"pretrained_model_name_or_path": str(folder)}, CLIP)


@pytest.fixture(scope="module")
def bench(folder: Path) -> FamilyBench:
    return bench_of(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LTXPipeline:
    pipeline = LTXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def inputs() -> dict[str, Any]:
    """Arguments of the transformer's forward for two samples, captions of 3 and 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(128) < torch.tensor([[3], [7]])).float()
    return {
        "hidden_states": torch.randn(2, 12, 128, generator=generator),
        "encoder_hidden_states": torch.randn(2, 128, 16, generator=generator),
        "timestep": torch.tensor([123.4, 890.1]),
        "encoder_attention_mask": mask,
        "num_frames": GRID[0],
        "height": GRID[1],
        "width": GRID[2],
        "rope_interpolation_scale": SCALE,
        "return_dict": False,
    }


def backward(module: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.train().requires_grad_(True).zero_grad(set_to_none=True)
    (output,) = module(**inputs)
    output.square().mean().backward()
    return output.detach(), {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("per_token_times", [False, True])
def test_forward_and_gradients_are_diffusers_own(
    folder: Path, bench: FamilyBench, inputs: dict[str, Any], checkpointing: bool, per_token_times: bool
) -> None:
    if per_token_times:
        inputs["timestep"] = torch.linspace(0, 1000, 24).view(2, 12)
    network = bench.load().network
    network.trampoline.context = StepContext(checkpointing=checkpointing)
    own = LTXVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    ours, theirs = backward(network.module, inputs), backward(own, inputs)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys() == dict(own.named_parameters()).keys()
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


@pytest.mark.parametrize("per_token_times", [False, True])
def test_a_routed_forward_gathers_and_scatters(
    folder: Path, bench: FamilyBench, inputs: dict[str, Any], per_token_times: bool
) -> None:
    """Blocks 1 and 2 see some tokens of each sample; the others pass them by. Against the same, block by block."""
    if per_token_times:
        inputs["timestep"] = torch.linspace(0, 1000, 24).view(2, 12)
    keep = torch.tensor([[0, 2, 3, 7, 11], [1, 2, 5, 6, 8]])

    def router(request: RouteRequest) -> list[TokenRoute]:
        assert request.grid == GRID
        return [TokenRoute(1, 3, keep)]

    network = bench.load().network
    network.module.train()
    network.trampoline.context = StepContext(router=router)
    (ours,) = network.module(**inputs)

    own: Any = LTXVideoTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    waiting: list[torch.Tensor] = []
    rows = torch.arange(2)[:, None]

    def enter(_: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = named["hidden_states"]
        if not waiting:
            waiting.append(tokens)
            named["hidden_states"] = tokens[rows, keep]
        named["image_rotary_emb"] = tuple(each[rows, keep] for each in named["image_rotary_emb"])
        if per_token_times:
            named["temb"] = named["temb"][rows, keep]
        return arguments, named

    def leave(_: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        whole = waiting[0].clone()
        whole[rows, keep] = output
        return whole

    for index in (1, 2):
        own.transformer_blocks[index].register_forward_pre_hook(enter, with_kwargs=True)
    own.transformer_blocks[2].register_forward_hook(leave)
    (naive,) = own(**inputs)
    assert torch.equal(ours, naive)


def test_captions_are_the_pipelines(bench: FamilyBench, pipeline: LTXPipeline) -> None:
    for caption in (*CAPTIONS, ""):
        encoded = bench.encode_captions(bench.hand_over(), (caption,))[0]
        states, mask, _, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        length = int(mask.sum())
        assert len(encoded["mask"]) == length
        # Not bit for bit: kernels round by where in memory the weights were put.
        torch.testing.assert_close(encoded["states"], states[0, :length], rtol=1e-4, atol=1e-5)


def test_latents_are_normalised_as_the_pipeline_undoes_it(folder: Path, bench: FamilyBench) -> None:
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae")
    latents = bench.encode_clips(bench.hand_over(), bench.pixels[:1])[0]["latents"][None]
    undone = LTXPipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    with torch.no_grad():
        torch.testing.assert_close(undone, vae.encode(bench.pixels[:1]).latent_dist.mode(), rtol=1e-5, atol=1e-6)


def request(model: Model, bench: FamilyBench, **changes: Any) -> SampleRequest:
    prompt, negative = bench.encode_captions(model, ("a red circle moves", ""))
    settings: dict[str, Any] = {"steps": 2, "guidance": 3.0, "seed": 5, "scheduler": "euler", "flow_shift": None}
    settings |= changes
    return SampleRequest(prompt=prompt, negative=negative, width=CLIP[2], height=CLIP[1], frames=CLIP[0], **settings)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_rendered_clip_is_the_pipelines(bench: FamilyBench, pipeline: LTXPipeline, guidance: float) -> None:
    model = bench.load()
    model.network.module.eval()
    frames = model.decode(model.sample(request(model, bench, guidance=guidance)))
    theirs = pipeline(
        "a red circle moves",
        negative_prompt="",
        width=CLIP[2],
        height=CLIP[1],
        num_frames=CLIP[0],
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]
    expected = theirs.permute(0, 2, 3, 1).mul(255)
    torch.testing.assert_close(frames.float(), expected, rtol=0, atol=0.51)


def test_a_shift_replaces_the_models_own(bench: FamilyBench) -> None:
    model = bench.load()
    own, shifted = (model.sample(request(model, bench, flow_shift=shift)) for shift in (None, 7.0))
    assert not torch.equal(own, shifted)


def test_a_decoder_that_takes_a_time_decodes_as_in_the_pipeline(tmp_path: Path) -> None:
    """The VAE of LTX-Video 0.9.1."""
    bench = bench_of(build_tiny(tmp_path / "timed", timed_decoder=True))
    model, pipeline = bench.load(), LTXPipeline.from_pretrained(tmp_path / "timed")
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, *bench.spec.latents.shape(*CLIP), generator=torch.Generator().manual_seed(0))
    sizes = {"num_frames": CLIP[0], "height": CLIP[1], "width": CLIP[2]}
    # With steps that change nothing the pipeline only decodes.
    pipeline.scheduler.step = lambda velocity, time, sample, return_dict: (sample,)
    theirs = pipeline("", latents=pack(latents), num_inference_steps=2, output_type="pt", **sizes).frames[0]
    expected = theirs.permute(0, 2, 3, 1).mul(255)
    torch.testing.assert_close(model.decode(latents).float(), expected, rtol=0, atol=0.51)


def test_names_of_lora_layers_are_those_of_ltx_own_code(bench: FamilyBench) -> None:
    """Against the table with which diffusers reads LTX's own files, the other way round."""
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    layers = [name for name, module in bench.load().network.module.named_modules() if type(module) is torch.nn.Linear]
    named = {f"{bench.spec.original_name(name)}.weight": torch.zeros(1) for name in layers}
    assert {f"{name}.weight" for name in layers} == set(convert_ltx_transformer_checkpoint_to_diffusers(named))


def test_a_sampler_that_the_pipeline_cannot_use_is_refused(bench: FamilyBench) -> None:
    """At the start already, where the user named it."""
    with pytest.raises(ConfigError, match="unipc"):
        make_scheduler("unipc", {}, None)
    bench.run.explicit = frozenset({"validation_noise_scheduler"})
    with pytest.raises(ConfigError, match="unipc"):
        bench.hook.check_model(run=bench.run, spec=bench.spec)


@pytest.mark.parametrize(
    ("file", "before", "after", "problem"),
    [
        ("transformer/config.json", "LTXVideoTransformer3DModel", "WanTransformer3DModel", "WanTransformer3DModel"),
        ("transformer/config.json", '"in_channels": 128', '"in_channels": 16', "takes 16 channels, the VAE makes 128"),
        ("model_index.json", "LTXPipeline", "LTXConditionPipeline", "LTXConditionPipeline"),
        ("vae/config.json", "}", "", "cannot read vae/config.json"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, folder: Path, file: str, before: str, after: str, problem: str
) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed")) / file
    text = changed.read_text(encoding="utf-8")
    assert before in text
    changed.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        bench_of(tmp_path / "changed")
