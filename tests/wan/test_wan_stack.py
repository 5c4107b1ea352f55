"""The driven forward is diffusers' own, bit for bit; with routes it is a gather and scatter by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from peft import LoraConfig
from torch import Tensor

from tuner.blocks import RouteRequest, StepContext, TokenRoute, install, run_stack
from tuner_wan.loading import parameter_dtype
from tuner_wan.stack import WanStack

BLOCKS = 5
IMAGE_DIM = 20
KINDS = ("t2v", "ti2v", "i2v")
GRID = (3, 4, 3)
TOKENS = 36


def make_network(kind: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """A tiny denoiser in the dtypes that loading gives it."""
    torch.manual_seed(1)
    image: dict[str, Any] = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 24} if kind == "i2v" else {}
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=BLOCKS,
        rope_max_seq_len=16,
        **image,
    ).train()
    kept = frozenset(network._keep_in_fp32_modules)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, dtype=dtype, kept=kept))
    if dtype == torch.float64:
        network.to(torch.float64)
    return network


def make_inputs(kind: str, dtype: torch.dtype, batch: int = 2) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    text_tokens = 512 if kind == "i2v" else 11  # diffusers finds the image context by subtracting 512
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, 3, 8, 6, generator=draw).to(dtype),
        "timestep": torch.tensor([100.25, 700.5])[:batch],
        "encoder_hidden_states": torch.randn(batch, text_tokens, 16, generator=draw).to(dtype),
    }
    if kind == "ti2v":
        inputs["timestep"] = torch.rand(batch, TOKENS, generator=draw) * 1000
    if kind == "i2v":
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 5, IMAGE_DIM, generator=draw).to(dtype)
    return inputs


def outcome(network: WanTransformer3DModel, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a forward and the gradients, of every parameter and of the input, of a backward."""
    network.zero_grad(set_to_none=True)
    latents = inputs["hidden_states"].clone().requires_grad_(True)
    (output,) = network(**{**inputs, "hidden_states": latents}, return_dict=False)
    output.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return output.detach(), {**gradients, "input": latents.grad}


def keep_all(request: RouteRequest) -> Sequence[TokenRoute]:
    everything = torch.arange(request.tokens.shape[1]).expand(request.tokens.shape[0], -1)
    return [TokenRoute(1, 4, everything)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_diffusers_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    network, inputs = make_network(kind, dtype), make_inputs(kind, dtype)
    output, gradients = outcome(network, inputs)
    assert len(gradients) == len(list(network.parameters())) + 1, "the reference itself must train every parameter"
    network.enable_gradient_checkpointing()
    references = {False: (output, gradients), True: outcome(network, inputs)}
    network.disable_gradient_checkpointing()

    trampoline = install(network, WanStack(network))
    for checkpointing in (False, True):
        for router in (None, keep_all):
            trampoline.context = StepContext(checkpointing=checkpointing, router=router)
            output, gradients = outcome(network, inputs)
            expected, expected_gradients = references[checkpointing]
            assert torch.equal(output, expected)
            assert gradients.keys() == expected_gradients.keys()
            differing = [name for name in gradients if not torch.equal(gradients[name], expected_gradients[name])]
            assert not differing


def test_equals_diffusers_under_autocast() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, expected_gradients = outcome(network, inputs)
        install(network, WanStack(network)).context = StepContext(checkpointing=True)
        output, gradients = outcome(network, inputs)
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_routed_batch_equals_gather_and_scatter_by_hand(kind: str) -> None:
    network, inputs = make_network(kind, torch.float64), make_inputs(kind, torch.float64)
    stack = WanStack(network)
    draw = torch.Generator().manual_seed(7)
    keep = torch.stack([torch.randperm(TOKENS, generator=draw)[:20].sort().values for _ in range(2)])
    routes = [TokenRoute(1, 3, keep), TokenRoute(3, 4, keep.flip(0))]
    context = StepContext(router=lambda request: routes)
    routed = run_stack(stack, stack.embed(**inputs), context).tokens

    for sample in range(2):
        one = {name: value[sample : sample + 1] for name, value in inputs.items()}
        stream = stack.embed(**one)
        tokens = stream.tokens
        for index, block in enumerate(network.blocks):
            route = next((route for route in routes if route.start <= index < route.stop), None)
            ids = torch.arange(TOKENS) if route is None else route.keep[sample]
            per_token = {name: tensor[:, ids] for name, (tensor, _) in stream.per_token.items()}
            modulation = per_token.get("modulation", stream.shared.get("modulation"))
            changed = block(tokens[:, ids], stream.shared["text"], modulation, (per_token["cos"], per_token["sin"]))
            tokens = tokens.index_copy(1, ids, changed)
        torch.testing.assert_close(routed[sample : sample + 1], tokens, rtol=0, atol=1e-12)


def test_routes_with_and_without_checkpointing_have_equal_gradients_over_two_forwards() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    trampoline = install(network, WanStack(network))
    keeps = [torch.arange(0, TOKENS, 2).expand(2, -1), torch.arange(1, TOKENS, 2).expand(2, -1)]
    found = []
    for checkpointing in (False, True):
        network.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for keep in keeps:

            def router(request: RouteRequest, keep: Tensor = keep) -> Sequence[TokenRoute]:
                return [TokenRoute(1, BLOCKS, keep)]

            trampoline.context = StepContext(checkpointing=checkpointing, router=router)
            total = total + network(**inputs).sample.square().mean()
        trampoline.context = StepContext()
        total.backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_grid_is_frames_by_rows_by_columns_of_tokens() -> None:
    network = make_network("t2v", torch.float32)
    stream = WanStack(network).embed(**make_inputs("t2v", torch.float32))
    assert stream.grid == GRID
    assert stream.tokens.shape == (2, TOKENS, 24)


def test_callers_notice_nothing() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    install(network, WanStack(network))
    assert isinstance(network(**inputs), Transformer2DModelOutput)
    output, *nothing = network(**inputs, return_dict=False)
    assert not nothing
    assert torch.equal(output, network(**inputs).sample)
    positional = network(*inputs.values())
    assert torch.equal(positional.sample, output)
    assert type(network) is WanTransformer3DModel


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_lora_scale_of_attention_kwargs_works_as_in_diffusers(scale: float) -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    kwargs: dict[str, Any] = {"scale": scale}
    with torch.no_grad():
        unscaled = network(**inputs).sample
        expected = network(**inputs, attention_kwargs=dict(kwargs)).sample
        install(network, WanStack(network))
        found = network(**inputs, attention_kwargs=kwargs).sample
        after = network(**inputs).sample
    assert torch.equal(found, expected)
    assert torch.equal(after, unscaled), "the scale must not stay"
    assert torch.equal(found, unscaled) == (scale == 1.0)
    assert kwargs == {"scale": scale}, "the caller's dict is the caller's"


def test_a_deep_copy_runs_the_weights_of_the_copy() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    install(network, WanStack(network))
    duplicate = copy.deepcopy(network)
    with torch.no_grad():
        before = network(**inputs).sample
        assert torch.equal(duplicate(**inputs).sample, before)
        for parameter in duplicate.parameters():
            parameter.add_(0.1)
        changed = duplicate(**inputs).sample
        assert not torch.equal(changed, before)
        assert torch.equal(network(**inputs).sample, before)
        assert torch.equal(WanTransformer3DModel.forward(duplicate, **inputs).sample, changed)


def test_skipping_a_block_equals_a_network_without_it() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    shorter = copy.deepcopy(network)
    del shorter.blocks[2]
    install(network, WanStack(network)).context = StepContext(skip=frozenset({2}))
    with torch.no_grad():
        assert torch.equal(network(**inputs).sample, shorter(**inputs).sample)


def test_a_route_over_dropped_tokens_changes_the_output() -> None:
    network, inputs = make_network("t2v", torch.float32), make_inputs("t2v", torch.float32)
    trampoline = install(network, WanStack(network))
    plain = network(**inputs).sample
    keep = torch.arange(18).expand(2, -1)
    trampoline.context = StepContext(router=lambda request: [TokenRoute(1, 4, keep)])
    assert not torch.equal(network(**inputs).sample, plain)
    with torch.no_grad():
        assert torch.equal(network(**inputs).sample, plain), "never without gradients"
    network.eval()
    assert torch.equal(network(**inputs).sample, plain), "never in evaluation"
