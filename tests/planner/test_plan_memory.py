"""The memory model against counted bytes: networks of real widths, on fake tensors, trained as a run does."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import tuner_kernels
from tuner import flow, pipeline
from tuner.assembly import assemble, new_run
from tuner.blocks import RouteRequest, StepContext, TokenRoute, install
from tuner.builtin.checkpointing.offload import Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.builtin.lora.adapter import LoraSettings, leave_casts_to_autocast
from tuner.builtin.planner.memory import CONTEXT, predict
from tuner.builtin.planner.memory_phases import rendering
from tuner.checkpointing import Checkpointing
from tuner.data.samples import Bucket
from tuner.model import Batch, Network
from tuner.run import Run
from tuner.spec import ModelSpec
from tuner.testing.peak import fakes, inference_bytes, step_bytes, without_storage
from tuner.workload import Workload
from tuner_chunked_ff.chunk import install as install_chunks
from tuner_kernels import block as fused
from tuner_offload.schedule import RING_GROUPS, streamed_blocks
from tuner_wan import costs, lean
from tuner_wan.stack import WanStack
from tuner_wan.training import predict as velocity

SMALL, LARGE, TI2V, I2V, I2V_22 = (
    "t2v-480p-1.3b-2.1",
    "t2v-480p-14b-2.1",
    "ti2v-5b-2.2",
    "i2v-14b-2.1",
    "i2v-14b-2.2-high",
)
CLIP, PICTURE = (81, 480, 832), (1, 480, 832)
STREAMED = {"enable_group_offload": True, "group_offload_use_stream": True}
CHUNKED = {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 8}
LEAN = {"wan_lean_blocks": True}
FUSED = {"fused_blocks": True}
EVERYWHERE = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TREAD = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}}


@dataclass
class Case:
    """A config of which a step on one shape is counted. Networks have their own widths and fewer blocks."""

    flavour: str
    shape: tuple[int, int, int]
    samples: int = 1
    blocks: int = 3
    keys: Mapping[str, Any] = field(default_factory=dict)
    kernels: bool = False
    """whether there is Triton"""

    def settings(self, folder: Path) -> dict[str, Any]:
        return {
            "model_family": "wan",
            "model_flavour": self.flavour,
            "output_dir": str(folder),
            "max_train_steps": 1,
            "train_batch_size": self.samples,
            "lora_rank": 16,
            **self.keys,
        }


def described(case: Case, folder: Path) -> tuple[Run, ModelSpec, Workload]:
    """The workload as the loaded plugins estimate it, of a network with the case's number of blocks."""
    assembly = assemble(case.settings(folder))
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    network = replace(spec.networks[0], blocks=case.blocks)
    assert run.estimate is not None
    with mock.patch.object(tuner_kernels, "find_spec", return_value=case.kernels or None):
        workload = run.estimate(network, Bucket(*case.shape), case.samples)
    return run, replace(spec, networks=(network,)), workload


def build(spec: ModelSpec, workload: Workload, rank: int, targets: Sequence[str]) -> nn.Module:
    """The module that a run trains, on the meta device: weights in their types, LoRA."""
    facts = spec.networks[0]
    image = {"image_dim": 1280, "added_kv_proj_dim": facts.dim} if facts.image_tokens else {}
    with torch.device("meta"):
        module: Any = WanTransformer3DModel(
            num_attention_heads=facts.heads,
            attention_head_dim=facts.dim // facts.heads,
            in_channels=facts.in_channels,
            out_channels=spec.latents.channels,
            ffn_dim=facts.ffn_dim,
            num_layers=facts.blocks,
            **image,
        )
    kept, width = set(module._keep_in_fp32_modules), torch.bfloat16 if workload.weight_bytes == 2 else torch.float32
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else width)
    module.requires_grad_(workload.trained == "network")
    if workload.trained == "adapter":
        module.add_adapter(LoraSettings(rank, 16.0, 0.0, "default", tuple(targets)).peft(), "default")
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        leave_casts_to_autocast(module)
    return module.train()  # type: ignore[no-any-return]


def installed(module: nn.Module, spec: ModelSpec, workload: Workload) -> Network:
    """``module`` as the block driver runs it, checkpointed and routed, with its feed-forwards in chunks."""
    stack = WanStack(module)
    for block in stack.blocks if workload.feed_forward_tokens else ():
        install_chunks(block.ffn, workload.feed_forward_tokens or 0)  # type: ignore[arg-type]
    for block in stack.blocks if workload.activations else ():
        (lean if workload.activations is costs.lean else fused).install(block)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    network = Network(spec.networks[0], module, stack, lambda: iter(()), dtypes.__getitem__, install(module, stack))
    network.trampoline.context = context(workload)
    return network


def context(workload: Workload) -> StepContext:
    """Checkpointing and routes as ``workload`` has them."""
    policies: dict[str, Callable[[int], Checkpointing | None]] = {
        "none": lambda _: None,
        "full": Checkpointing,
        "selective": Selective,
        "offload": lambda interval: Offload(torch.device("cpu"), interval),
    }
    tokens = workload.block_tokens
    inside = [index for index, each in enumerate(tokens) if each < workload.tokens]

    def routes(request: RouteRequest) -> list[TokenRoute]:
        keep = torch.zeros(workload.samples, tokens[inside[0]], dtype=torch.int64)
        return [TokenRoute(inside[0], inside[-1] + 1, keep)]

    policy = policies[workload.checkpointing](workload.checkpointing_interval)
    return StepContext(checkpointing=policy, router=routes if inside else None)


def batch_of(spec: ModelSpec, workload: Workload) -> Batch:
    """A batch as the core makes it."""
    network, samples = spec.networks[0], workload.samples
    shape = (samples, *spec.latents.shape(*workload.shape))
    latents, noise, sigmas = torch.empty(shape), torch.empty(shape), torch.empty(samples)
    noisy, target = flow.mix(latents, noise, sigmas)
    width = torch.bfloat16 if workload.activation_bytes == 2 else torch.float32
    video = {
        "condition": torch.empty(shape, dtype=width),
        "first_frame": torch.empty((*shape[:2], 1, *shape[3:]), dtype=width),
        "image_states": torch.empty(samples, 1, network.image_tokens, 1280, dtype=width),
    }
    text = {"states": torch.empty(samples, network.text_tokens, network.text_dim, dtype=width)}
    names = tuple(map(str, range(samples)))
    return Batch(latents, text, video, names, tuple(range(samples)), sigmas, noise, noisy, target)


def kernels(wanted: bool) -> Any:
    """The context in which fused blocks run on fakes: kernels, where wanted, hold what goes in and what comes out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # is in no package
        return importlib.import_module("rows.blocks").kernels(wanted)


def counted(case: Case, spec: ModelSpec, run: Run, workload: Workload) -> float:
    """Bytes that the device would hold at the peak: weights, optimizer state, and what a step adds to them."""
    module = build(spec, workload, 16, case.keys.get("lora_target_modules", spec.adapter_targets))
    with fakes(), kernels(case.kernels):
        network = installed(without_storage(module), spec, workload)
        step = step_bytes(module, lambda: loss_of(spec, run, workload, network), autocast(workload))
    trained = sum(each.numel() for each in network.module.parameters() if each.requires_grad)
    return weights(network, workload) + trained * workload.optimizer_bytes + step


def loss_of(spec: ModelSpec, run: Run, workload: Workload, network: Network) -> Tensor:
    batch = batch_of(spec, workload)
    return flow.loss(run.config, velocity(network, batch, spec), batch).per_sample.sum()


def autocast(workload: Workload) -> torch.dtype | None:
    return torch.bfloat16 if workload.activation_bytes == 2 else None


def weights(network: Network, workload: Workload) -> int:
    """Bytes of the parameters on the device, ring buffers in the place of the blocks that stream."""
    blocks = list(network.stack.blocks)
    resident = workload.resident_blocks
    if resident is None or resident >= len(blocks):
        return nbytes(network.module)
    streamed = streamed_blocks(len(blocks), resident - RING_GROUPS)
    frozen = [nbytes(blocks[index], trained=False) for index in streamed]
    return nbytes(network.module) - sum(frozen) + RING_GROUPS * max(frozen)


def nbytes(module: nn.Module, *, trained: bool = True) -> int:
    return sum(each.nbytes for each in module.parameters() if trained or not each.requires_grad)


CASES = {
    "1.3B, none": Case(SMALL, CLIP, keys={"gradient_checkpointing": False}),
    "1.3B, full": Case(SMALL, CLIP, keys={"gradient_checkpointing": True}),
    "1.3B, two clips, chunked": Case(SMALL, (33, 480, 832), 2, blocks=2, keys=CHUNKED),
    "1.3B, routes": Case(SMALL, CLIP, blocks=4, keys=TREAD),
    "1.3B, routes, none": Case(SMALL, (33, 480, 832), blocks=4, keys={**TREAD, "gradient_checkpointing": False}),
    "14B, selective": Case(LARGE, CLIP, blocks=2, keys={"gradient_checkpointing": "selective"}),
    "14B, offload, streamed, chunked": Case(
        LARGE, CLIP, blocks=2, keys={"gradient_checkpointing": "offload", **STREAMED, **CHUNKED}
    ),
    "14B, one picture, streamed": Case(LARGE, PICTURE, blocks=4, keys={**STREAMED, "group_offload_resident_blocks": 1}),
    "14B, every second block": Case(LARGE, (33, 480, 832), blocks=4, keys={"gradient_checkpointing_interval": 2}),
    "1.3B, lean, full": Case(SMALL, CLIP, blocks=2, keys={**LEAN, **CHUNKED}),
    "14B, lean, offload, streamed, chunked": Case(
        LARGE, CLIP, blocks=2, keys={"gradient_checkpointing": "offload", **LEAN, **STREAMED, **CHUNKED}
    ),
    "5B, lean, offload": Case(TI2V, (121, 704, 1280), blocks=2, keys={"gradient_checkpointing": "offload", **LEAN}),
    "14B I2V 2.1, lean, every second block": Case(
        I2V, (49, 480, 832), blocks=2, keys={"gradient_checkpointing_interval": 2, **LEAN}
    ),
    "5B, a time for each token": Case(TI2V, (81, 704, 1280)),
    "5B, pictures": Case(TI2V, (1, 704, 1280), 2, keys={"gradient_checkpointing": "offload"}),
    "14B I2V 2.1": Case(I2V, (33, 480, 832), blocks=2),
    "14B I2V 2.2, 720p": Case(I2V_22, (81, 720, 1280), blocks=2, keys={"gradient_checkpointing": "offload"}),
    "1.3B, fused, full": Case(SMALL, CLIP, blocks=2, keys=FUSED),
    "1.3B, fused, full, kernels": Case(SMALL, CLIP, blocks=2, keys=FUSED, kernels=True),
    "1.3B, fused, none, kernels": Case(
        SMALL, (33, 480, 832), blocks=2, keys={**FUSED, "gradient_checkpointing": False}, kernels=True
    ),
    "1.3B, fused, routes, kernels": Case(SMALL, CLIP, blocks=4, keys={**FUSED, **TREAD}, kernels=True),
    "1.3B, fused, LoRA everywhere": Case(SMALL, CLIP, blocks=2, keys={**FUSED, "lora_target_modules": EVERYWHERE}),
    "14B, fused, selective": Case(LARGE, CLIP, blocks=2, keys={**FUSED, "gradient_checkpointing": "selective"}),
    "14B, fused, offload, streamed, kernels": Case(
        LARGE, CLIP, blocks=2, keys={"gradient_checkpointing": "offload", **FUSED, **STREAMED}, kernels=True
    ),
    "14B, fused, every second block, two clips, chunked, kernels": Case(
        LARGE,
        (33, 480, 832),
        2,
        blocks=2,
        keys={"gradient_checkpointing_interval": 2, **FUSED, **CHUNKED},
        kernels=True,
    ),
    "14B, fused, offload, streamed, chunked": Case(
        LARGE, CLIP, blocks=2, keys={"gradient_checkpointing": "offload", **FUSED, **STREAMED, **CHUNKED}
    ),
    "5B, fused, a time for each token, kernels": Case(TI2V, (81, 704, 1280), blocks=2, keys=FUSED, kernels=True),
    "14B I2V 2.1, fused": Case(I2V, (33, 480, 832), blocks=2, keys=FUSED),
    "1.3B, all weights": Case(SMALL, (33, 480, 832), keys={"model_type": "full"}),
    "1.3B, all weights, in float32": Case(
        SMALL, (33, 480, 832), 1, blocks=2, keys={"model_type": "full", "base_model_default_dtype": "fp32"}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_the_counted_one_within_five_percent(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run, spec, workload = described(case, tmp_path)
    truth = counted(case, spec, run, workload)
    guess = predict(workload).on_device - CONTEXT
    assert guess == pytest.approx(truth, rel=0.05)


def test_lean_blocks_hold_a_third_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step of 14B holds beside its weights, and what it would hold with diffusers' own blocks."""
    run, spec, workload = described(CASES["14B, lean, offload, streamed, chunked"], tmp_path)

    def beside_weights() -> float:
        module = build(spec, workload, 16, spec.adapter_targets)
        with fakes():
            network = installed(without_storage(module), spec, workload)
            return step_bytes(module, lambda: loss_of(spec, run, workload, network), torch.bfloat16)

    small = beside_weights()
    monkeypatch.setattr(lean, "PIECE_TOKENS", 10**6)
    assert small < 0.67 * beside_weights()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["1.3B, none", "1.3B, full", "14B, selective", "1.3B, fused, full, kernels"])
def test_the_predicted_peak_is_the_measured_one_within_ten_percent(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run, spec, workload = described(case, tmp_path)
    module = build(spec, workload, 16, spec.adapter_targets).to_empty(device="cuda")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.01)
    network = installed(module, spec, workload)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        value = loss_of(spec, run, workload, network)
    torch.autograd.backward(value)
    found = predict(workload)
    without = CONTEXT + found.device["optimizer state"]
    assert found.on_device - without == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.mark.parametrize(
    ("flavour", "shape", "keys"),
    [
        (SMALL, CLIP, {}),
        (SMALL, CLIP, CHUNKED),
        (SMALL, CLIP, FUSED),
        (LARGE, PICTURE, {}),
        (LARGE, PICTURE, FUSED),
        (I2V, CLIP, {}),
        (TI2V, (81, 704, 1280), {}),
    ],
)
def test_rendering_holds_what_a_forward_without_gradients_does(
    flavour: str, shape: tuple[int, int, int], keys: Mapping[str, Any], tmp_path: Path
) -> None:
    _, spec, workload = described(Case(flavour, shape, blocks=2, keys=keys), tmp_path)
    module = build(spec, workload, 16, spec.adapter_targets)
    with fakes(), kernels(False):
        network = installed(without_storage(module).eval(), spec, workload)
        truth = inference_bytes(
            network.module, lambda: velocity(network, batch_of(spec, workload), spec), autocast(workload)
        )
    found = rendering(workload).device
    assert found["block at work"] + found["around the blocks"] == pytest.approx(truth, rel=0.05)


def test_the_optimizer_makes_its_state_when_the_first_backward_is_over(tmp_path: Path) -> None:
    """By hand: beside weights and gradients of all blocks it is more than what the backward held, or it is not."""
    clip = predict(described(Case(LARGE, CLIP), tmp_path)[2], first=True)
    assert "optimizer state" not in clip.device
    _, _, full = described(Case(SMALL, PICTURE, blocks=30, keys={"model_type": "full"}), tmp_path)
    first, later = predict(full, first=True), predict(full)
    assert first.device["optimizer state"] == later.device["optimizer state"]
    assert first.device["gradients"] == pytest.approx(2 * 30 * 46.44e6, rel=0.01)
    assert first.on_device < later.on_device


def test_gradients_and_optimizer_of_streamed_weights_are_on_the_host(tmp_path: Path) -> None:
    full = Case(SMALL, PICTURE, blocks=30, keys={"model_type": "full"})
    _, _, resident = described(full, tmp_path)
    _, _, streamed = described(replace(full, keys={**full.keys, **STREAMED}), tmp_path)
    here, away = predict(resident), predict(streamed)
    assert away.on_device < here.on_device / 2
    assert away.host["optimizer state"] == pytest.approx(
        here.device["optimizer state"] - away.device["optimizer state"]
    )
    assert predict(replace(streamed, offloaded_to="disk")).host.get("base weights") is None


def test_gradients_are_added_up_over_micro_batches_or_released(tmp_path: Path) -> None:
    """By hand: bfloat16 gradients of bfloat16 weights."""
    full = Case(SMALL, PICTURE, blocks=30, keys={"model_type": "full"})
    _, _, once = described(full, tmp_path)
    _, _, twice = described(replace(full, keys={**full.keys, "gradient_accumulation_steps": 2}), tmp_path)
    released = {"gradient_release": True, "max_grad_norm": 0.0}
    _, _, none = described(replace(full, keys={**full.keys, **released}), tmp_path)
    blocks = 2 * 30 * 46.44e6
    assert predict(twice).device["gradients"] == pytest.approx(blocks, rel=0.01)
    assert predict(once).on_device <= predict(twice).on_device
    assert predict(once).on_device - predict(none).on_device > blocks / 2
    assert "gradients" not in predict(none).device


def test_quantised_weights_take_their_bytes_and_room_for_one_matrix(tmp_path: Path) -> None:
    _, _, workload = described(Case(LARGE, CLIP), tmp_path)
    plain, eight = predict(workload).device, predict(replace(workload, weight_bytes=1.0)).device
    matrices = sum(each.inputs * each.outputs for each in workload.network.matrices) * workload.network.blocks
    assert plain["base weights"] - eight["base weights"] == pytest.approx(matrices)
    assert eight["dequantised weight"] == 5120 * 13824 * 2


def test_a_family_that_says_nothing_of_its_blocks_has_the_usual_ones(tmp_path: Path) -> None:
    _, _, workload = described(Case(LARGE, CLIP), tmp_path)
    unknown = replace(workload, network=replace(workload.network, activations=None))
    assert predict(unknown).on_device == pytest.approx(predict(workload).on_device, rel=0.01)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from tuner.assembly import assemble, new_run; from tuner import pipeline;"
        "from tuner.builtin.planner.memory_phases import phases; from tuner.data.samples import Bucket;"
        f"assembly = assemble({Case(LARGE, CLIP).settings(tmp_path)!r}); run = new_run(assembly);"
        "spec = pipeline.describe(run, assembly.manager);"
        "found = list(phases(spec, run.estimate(spec.networks[0], Bucket(81, 480, 832), 1)));"
        "assert found[-1].memory.on_device > 50e9; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
