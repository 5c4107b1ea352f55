"""Chunked feed-forward: the same gradients, and fewer bytes kept for backward."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention import FeedForward
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tuner.blocks import StepContext
from tuner.blocks import install as install_driver
from tuner.config.keys import CoreConfig
from tuner.errors import PluginError
from tuner.model import Network, Stage
from tuner.run import Run
from tuner.spec import NetworkSpec
from tuner.testing.live_bytes import LiveBytes
from tuner.testing.toy.describe import ToyDimensions
from tuner.testing.toy.networks import ToyTransformer
from tuner.testing.toy.stack import ToyStack
from tuner_chunked_ff import ChunkedFeedForwardConfig, ChunkedFeedForwardPlugin
from tuner_chunked_ff.chunk import install, remove, transform

TOKENS, DIM, INNER = 40, 16, 64
BYTES = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def feed_forward(dropout: float = 0.0) -> FeedForward:
    """As a Wan block has it."""
    torch.manual_seed(0)
    return FeedForward(DIM, inner_dim=INNER, activation_fn="gelu-approximate", dropout=dropout)


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, DIM, generator=generator).to(dtype).requires_grad_()


def outcome(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters; nothing is left behind on either."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    output = module(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def kept_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``run``, each storage once, parameters not counted."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # keeps every graph, so that no storage is freed and counted under another's address
    assert alive.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("chunk", [1, 7, 8, 20, 39])
def test_output_and_gradients_are_equal_in_float64(chunk: int) -> None:
    module = feed_forward().double()
    expected = outcome(module, tokens(dtype=torch.float64))
    install(module, chunk)
    for ours, theirs in zip(outcome(module, tokens(dtype=torch.float64)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_equal_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    module = feed_forward().to(dtype)
    expected = outcome(module, tokens(dtype=dtype))
    install(module, 16)
    for ours, theirs in zip(outcome(module, tokens(dtype=dtype)), expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("chunk", [TOKENS, 10 * TOKENS])
def test_a_chunk_that_holds_all_tokens_changes_no_bit(chunk: int) -> None:
    module = feed_forward()
    expected = outcome(module, tokens())
    install(module, chunk)
    assert all(torch.equal(*pair) for pair in zip(outcome(module, tokens()), expected, strict=True))


def test_no_pass_sees_more_tokens_than_a_chunk_and_none_is_a_sliver() -> None:
    module = feed_forward()
    sizes: list[int] = []
    module.net[0].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    install(module, 13)
    with torch.no_grad():
        module(tokens())
    assert sizes == [10, 10, 10, 10]


def test_bytes_kept_for_backward_fall_to_those_of_the_input() -> None:
    """Plain: input, and twice the wide intermediate. Chunked and recomputed: the input."""
    module, x = feed_forward(), tokens()
    one = x.numel() * BYTES

    def chunked_only() -> Tensor:
        return torch.cat([module(chunk) for chunk in x.split(8, dim=1)], dim=1)

    assert kept_bytes(module, lambda: module(x)) == one + 2 * one * INNER // DIM
    assert kept_bytes(module, chunked_only) == one + 2 * one * INNER // DIM, "chunks alone save nothing"
    install(module, 8)
    assert kept_bytes(module, lambda: module(x)) == one


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "in a checkpointed block"])
def test_the_peak_of_a_step_falls(outer: bool) -> None:
    """Also where the whole block is recomputed, as by default: there the wide tensors live during recomputation."""
    peaks = []
    for chunk in (None, 32):
        module = FeedForward(DIM, inner_dim=8 * DIM, activation_fn="gelu-approximate")
        if chunk:
            install(module, chunk)
        x = torch.randn(1, 512, DIM, requires_grad=True)
        with LiveBytes() as bytes_held:
            output = checkpoint(module, x, use_reentrant=False) if outer else module(x)
            output.sum().backward()
        peaks.append(bytes_held.peak)
    assert peaks[1] < peaks[0] / 3


def test_dropout_is_drawn_once_per_chunk() -> None:
    """Recomputation sees the masks of the forward."""
    module, plain = feed_forward(dropout=0.5), feed_forward(dropout=0.5)
    install(module, 8)
    x = tokens().detach()

    def chunked(x: Tensor) -> Tensor:
        return torch.cat([plain(chunk) for chunk in x.split(8, dim=1)], dim=1)

    found = []
    for call in (chunked, module):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        output = call(leaf)
        output.square().sum().backward()
        found.append((output, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_deep_copy_runs_its_own_weights() -> None:
    module, x = feed_forward(), tokens()
    names = list(module.state_dict())
    install(module, 8)
    before = module(x)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(copied(x), before)
    assert type(copied) is FeedForward
    assert list(copied.state_dict()) == names


def test_removing_it_gives_the_plain_layer_back() -> None:
    module = feed_forward()
    attributes, expected = set(vars(module)), outcome(module, tokens())
    install(module, 8)
    remove(module)
    assert set(vars(module)) == attributes
    assert all(torch.equal(*pair) for pair in zip(outcome(module, tokens()), expected, strict=True))


def test_a_layer_that_another_plugin_rewrote_is_refused() -> None:
    module = feed_forward()
    install(module, 8)
    with pytest.raises(PluginError, match=r"'blocks.0.ffn' has already been rewritten"):
        install(module, 8, "blocks.0.ffn")


# The real network


def wan() -> WanTransformer3DModel:
    """A tiny Wan 2.1 T2V with LoRA on attention and feed-forward."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model.train()


def wan_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([100, 700]),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator),
        "return_dict": False,
    }


def network_of(module: nn.Module, suffix: str) -> Network:
    """What a family hands over, as far as a rewrite reads it."""
    spec = NetworkSpec("transformer", 2, 24, 2, 96, 16, 7, 4)
    layers = {name: each for name, each in module.named_modules() if name.endswith(suffix)}
    unused: Any = None
    return Network(spec, module, unused, unused, unused, unused, feed_forwards=layers)


def lora_gradients(model: nn.Module, losses: int = 1) -> dict[str, Tensor]:
    sum(model(**wan_inputs())[0].square().mean() * (index + 1) for index in range(losses)).backward()  # type: ignore[union-attr]
    found = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    model.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("losses", [1, 2])
def test_wan_trains_with_equal_gradients(checkpointing: bool, losses: int) -> None:
    model = wan()
    names = list(model.state_dict())
    expected = lora_gradients(model, losses)
    if checkpointing:
        model.enable_gradient_checkpointing()
    transform(16).apply(network_of(model, ".ffn"))
    assert list(model.state_dict()) == names
    found = lora_gradients(model, losses)
    assert len(found) == 2 * 2 * (4 + 4 + 2)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_wan_keeps_fewer_bytes() -> None:
    """What one block no longer keeps: both wide intermediates of 48 tokens, for the LoRA of the second matrix."""
    model = wan()
    plain = kept_bytes(model, lambda: model(**wan_inputs())[0])
    transform(16).apply(network_of(model, ".ffn"))
    chunked = kept_bytes(model, lambda: model(**wan_inputs())[0])
    wide = 2 * 48 * 96 * BYTES
    assert plain - chunked >= 2 * 2 * wide


def test_it_works_inside_a_checkpointed_block_of_any_family() -> None:
    """The toy family through the block driver: gradients stay."""
    torch.manual_seed(0)
    net = ToyTransformer(ToyDimensions(blocks=3))
    inputs = (torch.randn(1, 12, 3, 8, 8), torch.tensor([300.0]), torch.randn(1, 8, 16))
    install_driver(net, ToyStack(net)).context = StepContext(checkpointing=True)

    def gradients() -> list[Tensor]:
        net.zero_grad()
        net(*inputs).square().mean().backward()
        return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]

    expected = gradients()
    transform(8).apply(network_of(net, ".feed_forward"))
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


# The plugin


def plugin(**keys: Any) -> ChunkedFeedForwardPlugin:
    return ChunkedFeedForwardPlugin("chunked_ff", ChunkedFeedForwardConfig(**keys))


def run_with(*explicit: str) -> Run:
    return Run(CoreConfig(), {}, explicit=frozenset(explicit))


def test_the_size_counts_1024_tokens() -> None:
    asked = plugin(enable_chunked_feed_forward=True, feed_forward_chunk_size=1)
    (edit,) = asked.model_transforms(run=run_with(), model=None)  # type: ignore[arg-type]
    assert (edit.stage, edit.claims, edit.networks) == (Stage.REWRITE, frozenset({"feed_forward"}), None)
    module = feed_forward()
    sizes: list[int] = []
    module.net[0].register_forward_pre_hook(lambda _, arguments: sizes.append(arguments[0].shape[1]))
    edit.apply(network_of(nn.ModuleDict({"ffn": module}), "ffn"))
    with torch.no_grad():
        module(tokens(1024))
        module(tokens(1025))
        module(tokens(4096))
    assert sizes == [1024, 513, 512, 1024, 1024, 1024, 1024]


def test_switched_off_it_edits_nothing() -> None:
    assert list(plugin().model_transforms(run=run_with(), model=None)) == []  # type: ignore[arg-type]
    assert not plugin().is_active(CoreConfig())
    assert plugin(enable_chunked_feed_forward=True).is_active(CoreConfig())


def test_the_planner_is_told_of_the_chunks_and_of_the_lever() -> None:
    (lever,) = ChunkedFeedForwardPlugin.levers
    chunked = plugin(**lever, feed_forward_chunk_size=3)
    assert chunked.is_active(CoreConfig())
    nothing: Any = None
    assert chunked.estimate(run=run_with(), spec=nothing, workload=nothing) == {"feed_forward_tokens": 3 * 1024}
    assert plugin().estimate(run=run_with(), spec=nothing, workload=nothing) == {}


def test_a_size_without_the_switch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tuner"):
        plugin(enable_chunked_feed_forward=True, feed_forward_chunk_size=4).configure(
            run=run_with("feed_forward_chunk_size")
        )
        plugin().configure(run=run_with())
        assert not caplog.messages
        plugin(feed_forward_chunk_size=4).configure(run=run_with("feed_forward_chunk_size"))
    assert caplog.messages == ["feed_forward_chunk_size has no effect without enable_chunked_feed_forward"]


def test_a_network_without_feed_forwards_is_an_error() -> None:
    with pytest.raises(PluginError, match="'transformer' has no feed-forward modules"):
        transform(16).apply(network_of(nn.Linear(2, 2), ".ffn"))


def test_leaving_the_plugin_out_would_change_memory() -> None:
    extra = ChunkedFeedForwardConfig.model_fields["enable_chunked_feed_forward"].json_schema_extra
    assert extra["tuner"]["effect"] == "memory"  # type: ignore[index]
    extra = ChunkedFeedForwardConfig.model_fields["feed_forward_chunk_size"].json_schema_extra
    assert extra["tuner"]["environment"] == "WAN_FEED_FORWARD_CHUNK_SIZE"  # type: ignore[index]


def test_the_entry_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, tuner_chunked_ff; heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
