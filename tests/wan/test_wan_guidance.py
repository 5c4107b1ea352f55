"""Skip-layer guidance and rescaling equal diffusers' own guider, in every pipeline that renders a Wan model."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from torch import Tensor, nn

from tuner.blocks import StepContext
from tuner.materialise import materialise
from tuner.model import EncodeBatch, LayerSkip, Model, SampleRequest
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.encode import pad_states
from tuner_wan.sampling_guidance import without_blocks

PROMPT, NEGATIVE = "a red ball rolls", "bad"
STEPS = 6
SKIP = LayerSkip((1,), 2.8, 0.01, 0.7)


def request_of(plugin: WanPlugin, model: Model, **changes: Any) -> SampleRequest:
    with torch.no_grad():
        prompt, negative = plugin.encode_batch(model, EncodeBatch("text", captions=(PROMPT, NEGATIVE)))
        images: dict[str, Tensor] = {}
        if model.spec.frames_taken:
            pixels = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
            kinds: tuple[Literal["video", "conditioning"], ...] = ("video", "conditioning")
            given = [plugin.encode_batch(model, EncodeBatch(kind, pixels=pixels))[0] for kind in kinds]
            images = {name: tensor for item in given for name, tensor in item.items() if name != "latents"}
    plain = SampleRequest(prompt, negative, 48, 32, 9, STEPS, 4.0, 11, "unipc", None, images=images, layer_skip=SKIP)
    return replace(plain, **changes)


def guided_by_diffusers(modules: Sequence[nn.Module], scales: Sequence[float], asked: SampleRequest) -> None:
    """Have plain modules answer the prompt with what diffusers' guider makes of its batches, by its own hooks."""
    steps = iter(range(asked.steps))
    skip = asked.layer_skip or LayerSkip((0,), 0.0, 0.0, 0.0)
    for module, scale in zip(modules, scales, strict=True):
        guider = SkipLayerGuidance(
            guidance_scale=scale,
            skip_layer_guidance_scale=skip.scale,
            skip_layer_guidance_start=skip.start,
            skip_layer_guidance_stop=skip.stop,
            skip_layer_config=LayerSkipConfig(indices=list(skip.layers), fqn="blocks"),
            guidance_rescale=asked.rescale,
        )
        negative = pad_states(asked.negative["states"].unsqueeze(0), 512)
        module.forward = _guided(module, module.forward, guider, negative, steps, asked.steps)


def _guided(module: nn.Module, plain: Callable[..., Any], guider: Any, negative: Tensor, steps: Any, count: int) -> Any:
    def forward(*, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Any:
        guider.set_state(next(steps), count, timestep)
        batches = guider.prepare_inputs({"encoder_hidden_states": (encoder_hidden_states, negative)})
        for batch in batches:
            guider.prepare_models(module)
            states = batch.encoder_hidden_states
            batch.noise_pred = plain(
                hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=states, **rest
            )[0]
            guider.cleanup_models(module)
        return (guider(batches)[0],)

    return forward


def by_diffusers(
    base: Path, asked: SampleRequest, model: Model, *, scales: Sequence[float], images: bool = False
) -> Tensor:
    """What a plain pipeline without guidance of its own renders of modules that the guider guides."""
    kind = WanImageToVideoPipeline if images else WanPipeline
    pipeline = kind.from_pretrained(base)
    modules = [pipeline.transformer] if len(scales) == 1 else [pipeline.transformer, pipeline.transformer_2]
    with torch.no_grad():
        for parameter in (each for module in modules for each in module.parameters()):
            parameter.data = parameter.data.clone()
    if len(scales) == 1:
        pipeline.register_to_config(boundary_ratio=None)
    guided_by_diffusers(modules, scales, asked)
    given: dict[str, Any] = {}
    if images:
        from tuner_wan.sampling_image import make_pipeline

        ours = make_pipeline(model.spec, asked, {"scheduler": pipeline.scheduler, "transformer": modules[0]})
        # The condition is a given here: how it is made of a picture is tested elsewhere.
        pipeline.prepare_latents, pipeline.encode_image = ours.prepare_latents, ours.encode_image
        given["image"] = torch.zeros(1, 3, 32, 48)
    found: Tensor = pipeline(
        prompt=PROMPT, width=48, height=32, num_frames=9, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(11), output_type="latent", **given,
    ).frames  # fmt: skip
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_skip": LayerSkip((0, 2), 1.5, 0.0, 1.0)},
        {"rescale": 0.7},
        {"rescale": 0.4, "layer_skip": None},
        {"scheduler": "euler"},
    ],
    ids=["window", "two layers", "rescaled", "rescaled alone", "euler"],
)
def test_it_equals_diffusers_guider(
    changes: dict[str, Any], tiny: Path, loaded: tuple[Run, Model], plugin: WanPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded[1]
    asked = request_of(plugin, model, **changes)
    if asked.scheduler == "euler":
        from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

        euler = FlowMatchEulerDiscreteScheduler()
        euler.set_shift(3.0)
        monkeypatch.setattr(UniPCMultistepScheduler, "from_pretrained", lambda *_, **__: euler)
    expected = by_diffusers(tiny, asked, model, scales=[asked.guidance])
    monkeypatch.undo()
    ours = model.sample(asked)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, model.sample(replace(asked, layer_skip=None, rescale=0.0))), "it must matter"


def test_without_the_negative_prompt_it_leads_away_from_the_smaller_network(
    tiny: Path, loaded: tuple[Run, Model], plugin: WanPlugin
) -> None:
    model = loaded[1]
    asked = request_of(plugin, model, guidance=1.0)
    pipeline = WanPipeline.from_pretrained(tiny)
    module = pipeline.transformer
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    plain, steps = module.forward, iter(range(STEPS))

    def forward(**arguments: Any) -> Any:
        cond = plain(**arguments)[0]
        if not 0 < next(steps) < int(0.7 * STEPS):
            return (cond,)
        _apply_layer_skip_hook(module, LayerSkipConfig(indices=[1], fqn="blocks"), name="skip")
        skipped = plain(**arguments)[0]
        HookRegistry.check_if_exists_or_initialize(module).remove_hook("skip", recurse=True)
        # SkipLayerGuidance.forward without guidance. The guider as a whole takes the negative prompt for the skipped
        # prediction there, and skips nothing, which is a mistake in diffusers.
        return (skipped + 2.8 * (cond - skipped),)

    module.forward = forward
    found = pipeline(
        prompt=PROMPT, width=48, height=32, num_frames=9, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(11), output_type="latent",
    ).frames  # fmt: skip
    assert torch.equal(model.sample(asked), found)


def test_of_a_model_that_starts_from_a_picture(
    flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    base = flavours("i2v-14b-2.1")
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(base)))
    materialise(model.network, device=torch.device("cpu"))
    asked = request_of(plugin, model)
    ours = model.sample(asked)
    assert torch.equal(ours, by_diffusers(base, asked, model, scales=[4.0], images=True))
    assert not torch.equal(ours, model.sample(replace(asked, layer_skip=None)))


@pytest.mark.parametrize("trained", ["both", "high"])
def test_of_both_experts_each_with_its_scale(
    trained: str, flavours: Callable[[str], Path], new_run: Callable[..., Run]
) -> None:
    base = flavours("t2v-14b-2.2-high")
    plugin = WanPlugin("wan", WanPlugin.Config(wan_validation_load_other_stage=True))
    flavour = f"t2v-14b-2.2-{trained}"
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(base), model_flavour=flavour))
    for network in model.networks.values():
        materialise(network, device=torch.device("cpu"))
    asked = request_of(plugin, model, guidance_2=2.5, layer_skip=replace(SKIP, stop=1.0))
    assert torch.equal(model.sample(asked), by_diffusers(base, asked, model, scales=[4.0, 2.5]))


def test_no_trace_is_left_and_each_step_is_told(loaded: tuple[Run, Model], plugin: WanPlugin) -> None:
    model = loaded[1]
    module = model.network.module
    context, attributes = model.network.trampoline.context, set(vars(module))
    told: list[int] = []
    model.sample(request_of(plugin, model, on_prediction=lambda step, _: told.append(step)))
    assert told == list(range(1, STEPS + 1))
    assert model.network.trampoline.context is context
    assert set(vars(module)) == attributes
    assert not module._forward_hooks


def test_blocks_are_left_out_and_come_back(tiny: Path) -> None:
    plain = WanPipeline.from_pretrained(tiny).transformer
    blocks = list(plain.blocks)
    with without_blocks(plain, frozenset({1, 3})):
        assert [id(each) for each in plain.blocks] == [id(blocks[0]), id(blocks[2])]
    assert list(plain.blocks) == blocks


@pytest.mark.parametrize(
    ("flavour", "keys", "words"),
    [
        (
            "t2v-480p-1.3b-2.1",
            {"validation_noise_scheduler": "euler", "validation_num_inference_steps": 20},
            "20 steps",
        ),
        ("t2v-480p-1.3b-2.1", {"validation_num_inference_steps": 20}, None),
        ("t2v-480p-1.3b-2.1", {"validation_guidance": 7.5}, "validation_guidance is 7.5: Wan renders well from 3 to 6"),
        ("t2v-480p-1.3b-2.1", {"validation_guidance": 5.2}, None),
        ("t2v-14b-2.2-both", {"validation_guidance_2": 1.0}, "validation_guidance_2 is 1:"),
        ("t2v-14b-2.2-high", {"validation_guidance_2": 4.0}, "one expert renders alone"),
        ("t2v-14b-2.2-both", {}, None),
    ],
)
def test_what_spoils_clips_is_said(
    flavour: str, keys: dict[str, Any], words: str | None, flavours: Callable[[str], Path], plugin: WanPlugin,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from tuner.config.keys import CoreConfig

    core = CoreConfig(pretrained_model_name_or_path=str(flavours(flavour)), model_flavour=flavour, **keys)
    run = Run(core, {}, explicit=frozenset(keys))
    plugin.check_model(run, plugin.describe_model(run))
    assert [each for each in caplog.messages if "validation_" in each or "renders with" in each] == caplog.messages
    assert [words in each for each in caplog.messages if words] == ([] if words is None else [True])
    assert len(caplog.messages) == (words is not None)


def test_blocks_that_stream_may_be_left_out(tiny: Path, new_run: Callable[..., Run], plugin: WanPlugin) -> None:
    """The block driver asks for no weights of a block that is skipped, and the rest come in their order."""
    run = new_run(plugin, pretrained_model_name_or_path=str(tiny))
    model = plugin.load_model(run)
    materialise(model.network, device=run.device)
    entered: list[list[int]] = []

    class Recorder:
        streamed: Set[int] = frozenset()

        def begin(self, differentiated: bool) -> None:
            entered.append([])

        def enter(self, index: int) -> None:
            entered[-1].append(index)

        def leave(self, index: int) -> None: ...

        def backward_done(self, index: int) -> None: ...

        def end(self, differentiated: bool) -> None: ...

    model.network.trampoline.context = StepContext(residency=Recorder())
    model.sample(request_of(plugin, model, layer_skip=LayerSkip((1,), 2.8, 0.0, 1.0)))
    skipped = [each for each in entered if each != [0, 1, 2, 3]]
    assert skipped == [[0, 2, 3]] * (STEPS - 1)
