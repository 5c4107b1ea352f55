"""The memory model against counted bytes: networks of real widths, on fake tensors, trained as a run does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from tuner import flow, pipeline
from tuner.assembly import Assembly, assemble, new_run
from tuner.blocks import RouteRequest, StepContext, TokenRoute, install
from tuner.builtin.checkpointing.offload import Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.builtin.lora.adapter import LoraSettings
from tuner.builtin.planner.memory import CONTEXT, predict
from tuner.checkpointing import Checkpointing
from tuner.data.samples import Bucket
from tuner.model import Batch, Network
from tuner.run import Run
from tuner.spec import ModelSpec
from tuner.testing.peak import fakes, step_bytes, without_storage
from tuner.workload import Workload
from tuner_chunked_ff.chunk import install as install_chunks
from tuner_offload.schedule import RING_GROUPS, streamed_blocks
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
CHUNKED = {"enable_chunked_feed_forward": True}
TREAD = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}}


@dataclass
class Case:
    """A config of which a step on one shape is counted. Networks have their own widths and fewer blocks."""

    flavour: str
    shape: tuple[int, int, int]
    samples: int = 1
    blocks: int = 4
    keys: Mapping[str, Any] = ()  # type: ignore[assignment]

    def settings(self, folder: Path) -> dict[str, Any]:
        return {
            "model_family": "wan",
            "model_flavour": self.flavour,
            "output_dir": str(folder),
            "max_train_steps": 1,
            "train_batch_size": self.samples,
            "lora_rank": 16,
            **dict(self.keys),
        }


def described(case: Case, folder: Path) -> tuple[Assembly, Run, ModelSpec, Workload]:
    """The workload as the loaded plugins estimate it, of a network with the case's number of blocks."""
    assembly = assemble(case.settings(folder))
    run = new_run(assembly)
    spec = pipeline.describe(run, assembly.manager)
    network = replace(spec.networks[0], blocks=case.blocks)
    assert run.estimate is not None
    workload = run.estimate(network, Bucket(*case.shape), case.samples)
    return assembly, run, replace(spec, networks=(network,)), workload


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
    kept, width = set(module._keep_in_fp32_modules), torch.bfloat16 if workload.activation_bytes == 2 else torch.float32
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else width)
    module.requires_grad_(workload.trained == "network")
    if workload.trained == "adapter":
        module.add_adapter(LoraSettings(rank, 16.0, 0.0, "default", tuple(targets)).peft(), "default")
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
    return module.train()  # type: ignore[no-any-return]


def installed(module: nn.Module, spec: ModelSpec, workload: Workload) -> Network:
    """``module``, made of fakes, as the block driver runs it, with its feed-forwards in chunks."""
    stack = WanStack(without_storage(module))
    for block in stack.blocks if workload.feed_forward_tokens else ():
        install_chunks(block.ffn, workload.feed_forward_tokens or 0)  # type: ignore[arg-type]
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    return Network(spec.networks[0], module, stack, lambda: iter(()), dtypes.__getitem__, install(module, stack))


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


def counted(spec: ModelSpec, run: Run, workload: Workload, targets: Sequence[str]) -> float:
    """Bytes that the device would hold at the peak: weights, optimizer state, and what a step adds to them."""
    module = build(spec, workload, 16, targets)
    with fakes():
        network = installed(module, spec, workload)
        network.trampoline.context = context(workload)

        def loss() -> Tensor:
            batch = batch_of(spec, workload)
            return flow.loss(run.config, velocity(network, batch, spec), batch).per_sample.sum()

        step = step_bytes(network.module, loss, torch.bfloat16 if workload.activation_bytes == 2 else None)
    trained = sum(each.numel() for each in network.module.parameters() if each.requires_grad)
    return weights(network, workload) + trained * workload.optimizer_bytes + step


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
    "1.3B, two clips, chunked": Case(SMALL, (33, 480, 832), 2, keys=CHUNKED),
    "1.3B, routes": Case(SMALL, CLIP, blocks=5, keys=TREAD),
    "1.3B, routes, none": Case(SMALL, (33, 480, 832), blocks=5, keys={**TREAD, "gradient_checkpointing": False}),
    "14B, selective": Case(LARGE, CLIP, keys={"gradient_checkpointing": "selective"}),
    "14B, offload, streamed, chunked": Case(
        LARGE, CLIP, keys={"gradient_checkpointing": "offload", **STREAMED, **CHUNKED}
    ),
    "14B, one picture, streamed": Case(LARGE, PICTURE, keys={**STREAMED, "group_offload_resident_blocks": 1}),
    "14B, every second block": Case(LARGE, (33, 480, 832), keys={"gradient_checkpointing_interval": 2}),
    "5B, a time for each token": Case(TI2V, (81, 704, 1280)),
    "5B, pictures": Case(TI2V, (1, 704, 1280), 2, keys={"gradient_checkpointing": "offload"}),
    "14B I2V 2.1": Case(I2V, (33, 480, 832)),
    "14B I2V 2.2, 720p": Case(I2V_22, (81, 720, 1280), keys={"gradient_checkpointing": "offload", **CHUNKED}),
    "1.3B, all weights": Case(SMALL, (33, 480, 832), keys={"model_type": "full"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_predicted_peak_is_the_counted_one_within_five_percent(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, run, spec, workload = described(case, tmp_path)
    truth = counted(spec, run, workload, spec.adapter_targets)
    found = predict(workload)
    guess = found.on_device - CONTEXT
    assert guess == pytest.approx(truth, rel=0.05)
