"""Checkpointing policies on Wan's own classes, with LoRA and dropout, as a training step runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tuner.blocks import RouteRequest, StepContext, TokenRoute, install
from tuner.builtin.checkpointing.offload import Offload
from tuner.builtin.checkpointing.selective import Selective
from tuner.builtin.lora.adapter import leave_casts_to_autocast
from tuner.checkpointing import ATTENTION_OPERATORS, Checkpointing
from tuner.errors import ConfigError
from tuner.testing.clips import render_clip
from tuner.testing.live_bytes import LiveBytes
from tuner.testing.opened import opened
from tuner.train.step import train_step
from tuner_chunked_ff import chunk
from tuner_wan import lean
from tuner_wan.loading import parameter_dtype
from tuner_wan.stack import WanStack

BLOCKS, DIM, HEADS, TOKENS = 4, 24, 2, 36
STREAMED = {"enable_group_offload": True, "group_offload_blocks_per_group": 1}
KINDS = ("t2v", "ti2v", "i2v")
POLICIES: dict[str, Callable[[], Checkpointing]] = {
    "full": Checkpointing,
    "selective": Selective,
    "offload": lambda: Offload(torch.device("cpu")),
    "every second selective": lambda: Selective(2),
}


def make_network(kind: str, *, lora: bool = True) -> WanTransformer3DModel:
    """A tiny denoiser, its matrices in bfloat16 where it is trained through LoRA with dropout."""
    torch.manual_seed(1)
    image: dict[str, Any] = {"image_dim": 20, "added_kv_proj_dim": DIM} if kind == "i2v" else {}
    network = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM // HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=BLOCKS,
        rope_max_seq_len=16,
        **image,
    ).train()
    if lora:
        kept = frozenset(network._keep_in_fp32_modules)
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, dtype=torch.bfloat16, kept=kept))
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        network.add_adapter(LoraConfig(r=4, lora_dropout=0.25, target_modules=targets, init_lora_weights=False))
        for parameter in network.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        assert any(isinstance(module, BaseTunerLayer) for module in network.modules())
    return network


def make_inputs(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 3, 8, 6, generator=draw).to(dtype),
        "timestep": torch.rand(2, TOKENS, generator=draw) * 1000 if kind == "ti2v" else torch.tensor([100.25, 700.5]),
        # diffusers finds the image context by subtracting 512
        "encoder_hidden_states": torch.randn(2, 512 if kind == "i2v" else 11, 16, generator=draw).to(dtype),
    }
    if kind == "i2v":
        inputs["encoder_hidden_states_image"] = torch.randn(2, 5, 20, generator=draw).to(dtype)
    return inputs


def routed(request: RouteRequest) -> list[TokenRoute]:
    return [TokenRoute(1, 3, torch.arange(1, TOKENS, 2).expand(2, -1))]


def learn(network: WanTransformer3DModel, inputs: dict[str, Any], policy: Checkpointing | None) -> dict[str, Tensor]:
    """Losses and gradients of two forwards, the second one routed, inside one autocast and before one backward."""
    trampoline = install(network, WanStack(network))
    network.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=inputs["hidden_states"].dtype == torch.bfloat16):
        for router in (None, routed):
            trampoline.context = StepContext(checkpointing=policy, router=router)
            losses.append(network(**inputs).sample.float().square().mean())
    trampoline.context = StepContext()
    torch.stack(losses).sum().backward()
    found = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return {"losses": torch.stack(losses).detach(), **found}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_changes(kind: str, lora: bool) -> None:
    """With LoRA and dropout on a bfloat16 base under autocast, and training all weights in float32."""
    network = make_network(kind, lora=lora)
    inputs = make_inputs(kind, torch.bfloat16 if lora else torch.float32)
    plain = learn(network, inputs, None)
    trained = [name for name, each in network.named_parameters() if each.requires_grad]
    assert plain.keys() == {"losses", *trained}
    for name, make in POLICIES.items():
        kept = learn(network, inputs, make())
        assert kept.keys() == plain.keys()
        assert not [each for each in plain if not torch.equal(plain[each], kept[each])], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_keep_less_change_no_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In eight pieces, the routed tokens in four."""
    monkeypatch.setattr(lean, "PIECE_TOKENS", 5)
    network, inputs = make_network(kind), make_inputs(kind, dtype)
    network.to(dtype) if dtype == torch.float32 else leave_casts_to_autocast(network)
    plain = learn(network, inputs, None)
    for block in network.blocks:
        lean.install(block)
    for make in (lambda: None, *POLICIES.values()):
        kept = learn(network, inputs, make())
        assert kept.keys() == plain.keys()
        assert not [each for each in plain if not torch.equal(plain[each], kept[each])]


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_modulation_that_are_trained_get_their_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever adapts them. Each token's modulation is added up in another order."""
    monkeypatch.setattr(lean, "PIECE_TOKENS", 5)
    network, inputs = make_network(kind, lora=False), make_inputs(kind, torch.float32)
    plain = learn(network, inputs, None)
    for block in network.blocks:
        lean.install(block)
    kept = learn(network, inputs, Offload(torch.device("cpu")))
    assert kept.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-5, atol=1e-7)


def test_blocks_whose_weights_are_trained_stay_as_they_are_and_that_is_said(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    for keys in ({}, {"model_type": "full"}):
        with opened(settings | {"wan_lean_blocks": True} | keys) as session:
            found.append(["forward" in vars(block) for block in session.model.network.stack.blocks])
    assert found == [[True] * BLOCKS, [False] * BLOCKS]
    assert any("wan_lean_blocks has no effect" in line for line in caplog.messages)


class Attention(TorchDispatchMode):
    """Notes the numbers of queries and keys of each attention that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ATTENTION_OPERATORS:
            self.seen.append((args[0].shape[-2], args[1].shape[-2]))
        return func(*args, **(kwargs or {}))


def test_only_attention_to_text_and_image_is_computed_twice() -> None:
    network, inputs = make_network("i2v"), make_inputs("i2v", torch.bfloat16)
    install(network, WanStack(network)).context = StepContext(checkpointing=Selective())
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(**inputs).sample.square().mean()
    with Attention() as attention:
        loss.backward()
    assert sorted(attention.seen) == sorted(BLOCKS * [(TOKENS, 5), (TOKENS, 512)])


def held(network: WanTransformer3DModel, inputs: dict[str, Any], policy: Checkpointing | None) -> int:
    install(network, WanStack(network)).context = StepContext(checkpointing=policy)
    with LiveBytes() as live:
        loss = network(**inputs).sample.square().mean()
        bytes_held = live.live
    del loss
    return bytes_held


def test_selective_keeps_one_output_of_attention_more_in_each_block() -> None:
    network, inputs = make_network("t2v", lora=False), make_inputs("t2v", torch.float32)
    full, selective = held(network, inputs, Checkpointing()), held(network, inputs, Selective())
    output, log_sum_exp = 2 * TOKENS * DIM * 4, 2 * HEADS * TOKENS * 4
    assert selective == full + BLOCKS * (output + log_sum_exp)
    assert held(network, inputs, None) > 3 * selective


def test_chunks_of_a_feed_forward_inside_each_policy() -> None:
    """Each chunk is a checkpoint in the checkpointed block."""
    network, inputs = make_network("t2v"), make_inputs("t2v", torch.bfloat16)
    for block in network.blocks:
        chunk.install(block.ffn, 8)
    plain = learn(network, inputs, None)
    for name, make in POLICIES.items():
        kept = learn(network, inputs, make())
        assert not [each for each in plain if not torch.equal(plain[each], kept[each])], name


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    render_clip(tmp_path / "clips/0.mp4", width=64, height=48, frames=5, fps=16, seed=0)
    (tmp_path / "clips/0.txt").write_text("a red ball")
    clips = {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": str(tmp_path / "clips"),
        "resolution": 48,
        "video": {"num_frames": 5},
    }
    return {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(tiny),
        "output_dir": str(tmp_path / "output"),
        "mixed_precision": "no",
        "max_train_steps": 2,
        "data_backend_config": [clips, {"id": "text", "dataset_type": "text_embeds", "default": True}],
    }


def test_the_keys_choose_the_policy_of_a_run(settings: dict[str, Any]) -> None:
    with opened(settings | {"gradient_checkpointing": "offload", "gradient_checkpointing_interval": 3}) as session:
        train_step(session)
        policy = session.model.network.checkpointing
    assert isinstance(policy, Offload)
    assert policy.copied_out == len(policy.pool.free) == 2, "blocks 0 and 3 of four"


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "offload"},
        {"gradient_checkpointing": "offload", "wan_lean_blocks": True},
    ],
)
def test_a_streamed_base_learns_the_same(
    settings: dict[str, Any], keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which weights are copied when differs between a forward and its recomputation."""
    monkeypatch.setattr(lean, "PIECE_TOKENS", 7)
    found = []
    for each in ({"gradient_checkpointing": True}, {**keys, **STREAMED}):
        with opened(settings | each) as session:
            found.append([train_step(session).loss for _ in range(2)])
            found.append(session.model.network.adapter.state())  # type: ignore[union-attr]
    assert found[0] == found[2]
    assert not [name for name, tensor in found[1].items() if not torch.equal(tensor, found[3][name])]


def test_without_the_plugin_its_values_are_refused(settings: dict[str, Any]) -> None:
    with (
        pytest.raises(ConfigError, match="gradient_checkpointing 'selective' is served by no loaded plugin"),
        opened(settings | {"gradient_checkpointing": "selective"}, without=["checkpointing"]),
    ):
        pass


def test_an_interval_without_checkpointing_is_said_to_do_nothing(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(settings | {"gradient_checkpointing": False, "gradient_checkpointing_interval": 2}) as session:
        assert session.model.network.checkpointing is None
    assert "gradient_checkpointing_interval has no effect: gradient_checkpointing is false" in caplog.messages
