"""Kernels that plugins bring: run by the denoiser alone, trained through an exact backward, never without one."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from tuner.attention import Attention, AttentionBackend, choose
from tuner.attention_switch import set_backend, validation_backend
from tuner.errors import ConfigError, TrainingError
from tuner.train import guards
from tuner_attention.exact_backward import exact, with_exact_backward
from tuner_wan.tiny import tiny_pipeline


def eight_bits(tensor: Tensor) -> Tensor:
    """What quantising each head's rows to int8 leaves of a tensor."""
    scale = tensor.abs().amax((1, 3), keepdim=True) / 127
    return (tensor / scale).round() * scale


@torch.no_grad()
def forward_only(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Like SageAttention: queries and keys in eight bits, nothing for backward, and the keys altered in place."""
    key -= key.mean(1, keepdim=True)
    return exact(eight_bits(query), eight_bits(key), value)


def careful(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return forward_only(query, key.clone(), value)


SAGE_LIKE = AttentionBackend(kernel=careful, training=with_exact_backward(careful))


def rows(*tokens: int, heads: int = 3, width: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, each, heads, width, generator=draw, dtype=torch.float64, requires_grad=True) for each in tokens
    ]


def test_the_output_is_the_kernels_and_the_gradients_are_those_of_exact_attention() -> None:
    ours, theirs = rows(9, 7, 7), rows(9, 7, 7)
    grow = torch.randn(2, 9, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = with_exact_backward(careful)(*ours)
    assert torch.equal(out, careful(*theirs))
    assert not torch.allclose(out, exact(*theirs), atol=1e-6)
    out.backward(grow)
    # The oracle is written out, not torch's own kernel.
    query, key, value = (each.transpose(1, 2) for each in theirs)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
    (weights @ value).transpose(1, 2).backward(grow)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.fixture
def network():
    from tuner.blocks import install
    from tuner.model import Network
    from tuner.spec import NetworkSpec
    from tuner_wan.stack import WanStack

    torch.set_num_threads(1)
    module = tiny_pipeline("i2v-14b-2.1").transformer
    stack = WanStack(module)
    return Network(
        spec=NetworkSpec("transformer", 2, 24, 2, 32, 16, 512, 16),
        module=module,
        stack=stack,
        weights=lambda: iter(()),
        dtype_of=lambda name: torch.float32,
        trampoline=install(module, stack),
        attention_processors=lambda: module.attn_processors.values(),
    )


def predict(network) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    config = network.module.config
    latents = torch.randn(1, config.in_channels, 3, 8, 8, generator=draw)
    text = torch.randn(1, 512, config.text_dim, generator=draw)
    image = torch.randn(1, 9, config.image_dim, generator=draw)
    return network.module(latents, torch.tensor([300]), text, image, return_dict=False)[0]


@torch.no_grad()
def test_every_attention_of_the_denoiser_uses_it_image_context_too_and_nothing_else_does(network) -> None:
    calls: list[tuple[int, int]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((query.shape[1], key.shape[1]))
        return exact(query, key, value)

    before = dict(_AttentionBackendRegistry._backends)
    plain = predict(network)
    with validation_backend(network, AttentionBackend(kernel=counted)):
        torch.testing.assert_close(predict(network), plain, rtol=1e-5, atol=1e-5)
    # Two blocks: self-attention, the image, the text.
    assert calls == [(48, 48), (48, 9), (48, 512)] * 2
    calls.clear()
    assert torch.equal(predict(network), plain)
    assert calls == []
    assert before.items() <= _AttentionBackendRegistry._backends.items(), "nobody else's kernel was replaced"
    assert "tuner" not in " ".join(each.value for each in AttentionBackendName)


def test_a_copy_of_the_network_keeps_its_kernel(network) -> None:
    set_backend(network, SAGE_LIKE)
    copied = copy.deepcopy(network.module)
    assert [each._attention_backend for each in copied.attn_processors.values()] == [
        each._attention_backend for each in network.attention_processors()
    ]


def trained(network):
    """The network with LoRA, after one backward."""
    from tuner.builtin.lora.adapter import LoraSettings, attach

    network.adapter = attach(
        network, LoraSettings(4, 4.0, 0.0, "gaussian", ("to_q", "to_k", "to_v", "to_out.0")), torch.device("cpu")
    )
    for parameter in network.adapter.groups[0].parameters.values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    predict(network).square().mean().backward()
    return network


def test_training_through_a_kernel_without_a_backward_is_caught(network) -> None:
    set_backend(network, AttentionBackend(kernel=careful, trains=True))
    with pytest.raises(TrainingError, match="got no gradient"):
        guards.check_gradient_coverage(trained(network))


def test_training_through_its_exact_backward_reaches_every_matrix(network) -> None:
    set_backend(network, AttentionBackend(kernel=SAGE_LIKE.training, trains=True))
    guards.check_gradient_coverage(trained(network))


EXACT = AttentionBackend(dispatcher="_native_cudnn", trains=True)
FLASH = AttentionBackend(dispatcher="flash", trains=True)
OFFERED = {"auto": EXACT, "flash": FLASH, "sage": SAGE_LIKE, "flex": AttentionBackend("flex"), "absent": None}


@pytest.mark.parametrize(
    ("name", "usage", "expected"),
    [
        ("auto", None, Attention(EXACT, EXACT)),
        ("diffusers", "training", Attention(EXACT, EXACT)),
        ("absent", None, Attention(EXACT, EXACT)),
        ("flash", None, Attention(FLASH, FLASH)),
        ("flash", "training", Attention(FLASH, EXACT)),
        ("flash", "inference", Attention(EXACT, FLASH)),
        ("sage", None, Attention(EXACT, SAGE_LIKE)),
        ("sage", "both", Attention(AttentionBackend(kernel=SAGE_LIKE.training, trains=True), SAGE_LIKE)),
    ],
)
def test_where_a_kernel_is_used(name: str, usage: str | None, expected: Attention) -> None:
    assert choose(name, usage, OFFERED) == expected  # type: ignore[arg-type]


def test_training_with_a_kernel_that_has_no_backward_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="'flex' has no backward"):
        choose("flex", "both", OFFERED)
