"""Attention kernels are switched on the denoiser's own processors, for validation, and restored exactly."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from tuner.attention import AttentionBackend
from tuner.attention_switch import set_backend, validation_backend
from tuner.blocks import StepContext, install
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.model import Network
from tuner.run import Run
from tuner.spec import NetworkSpec
from tuner_attention import FlexPlugin
from tuner_wan.stack import WanStack
from tuner_wan.tiny import tiny_pipeline

FLEX = AttentionBackendName.FLEX
NATIVE = AttentionBackendName.NATIVE


@pytest.fixture(scope="module")
def pipeline():
    torch.set_num_threads(1)
    return tiny_pipeline()


@pytest.fixture
def network(pipeline) -> Network:
    module: WanTransformer3DModel = pipeline.transformer
    stack = WanStack(module)
    found = Network(
        spec=NetworkSpec("transformer", 2, 24, 2, 32, 16, 512, 16),
        module=module,
        stack=stack,
        weights=lambda: iter(()),
        dtype_of=lambda name: torch.float32,
        trampoline=install(module, stack),
        attention_processors=lambda: module.attn_processors.values(),
    )
    yield found
    set_backend(found, None)


@pytest.fixture
def used(monkeypatch):
    """The kernels that attention was computed with, as the dispatcher chose them."""
    calls: list[AttentionBackendName] = []
    for kernel in (FLEX, NATIVE):
        original = _AttentionBackendRegistry._backends[kernel]

        def spy(*args, kernel=kernel, original=original, **kwargs):
            calls.append(kernel)
            return original(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, kernel, spy)
    return calls


def chosen(network: Network) -> list[AttentionBackendName | None]:
    return [each._attention_backend for each in network.attention_processors()]


def forward(network: Network) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 8, 8, generator=draw), torch.randn(1, 7, 16, generator=draw)
    return network.module(latents, torch.tensor([300]), text, return_dict=False)[0]


def flex() -> AttentionBackend:
    run = Run(CoreConfig(attention_mechanism="flex"), plugins={})
    return FlexPlugin("flex", FlexPlugin.Config()).attention_backends(run)["flex"]


@torch.no_grad()
def test_flex_renders_what_the_exact_kernel_renders(network, used):
    exact = forward(network)
    assert set(used) == {NATIVE}
    used.clear()
    with validation_backend(network, flex()):
        found = forward(network)
    assert used == [FLEX] * 4, "self and cross-attention of two blocks"
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_everything_is_restored(network, used):
    processors = list(network.attention_processors())
    processors[1]._attention_backend = NATIVE
    before, default = chosen(network), _AttentionBackendRegistry._active_backend
    with validation_backend(network, flex()):
        assert chosen(network) == [FLEX] * 4
        assert _AttentionBackendRegistry._active_backend is default
    assert chosen(network) == before == [None, NATIVE, None, None]
    assert list(network.attention_processors()) == processors
    assert _AttentionBackendRegistry._active_backend is default


def test_restored_after_a_failed_render(network):
    with pytest.raises(ZeroDivisionError), validation_backend(network, flex()):
        raise ZeroDivisionError
    assert chosen(network) == [None] * 4


@torch.no_grad()
def test_the_vae_keeps_its_kernel(network, pipeline, used, monkeypatch):
    plain = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or plain(*a, **k)
    )
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = pipeline.vae.decode(latents).sample
    calls.clear()
    with validation_backend(network, flex()):
        found = pipeline.vae.decode(latents).sample
    assert torch.equal(found, expected)
    assert calls, "the VAE has attention, and it is not flex's"
    assert used == []


def test_training_gradients_do_not_notice_a_validation_in_between(network, used):
    network.trampoline.context = StepContext(checkpointing=True)
    network.module.train()

    def gradients():
        network.module.zero_grad()
        forward(network).square().mean().backward()
        return [each.grad.clone() for each in network.module.parameters()]

    expected = gradients()
    with torch.no_grad(), validation_backend(network, flex()):
        forward(network)
    used.clear()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected, strict=True))
    assert set(used) == {NATIVE}


def test_no_backend_is_the_default_for_as_long_as_it_lasts(network):
    set_backend(network, flex())
    with validation_backend(network, None):
        assert chosen(network) == [None] * 4
    assert chosen(network) == [FLEX] * 4


def test_set_and_unset(network, used):
    set_backend(network, flex())
    assert chosen(network) == [FLEX] * 4
    set_backend(network, None)
    assert chosen(network) == [None] * 4


def test_an_unknown_kernel_is_named_with_its_nearest(network):
    with pytest.raises(ConfigError, match="'felx'") as error:
        set_backend(network, AttentionBackend("felx"))
    assert "did you mean 'flex'?" in str(error.value)
    assert chosen(network) == [None] * 4


def test_a_kernel_this_machine_lacks_says_what_to_install(network):
    with (
        pytest.raises(ConfigError, match=r"install `sageattention>="),
        validation_backend(network, AttentionBackend("sage")),
    ):
        pass
    assert chosen(network) == [None] * 4


def test_a_network_without_switchable_attention_is_refused(network):
    network.attention_processors = tuple
    with pytest.raises(ConfigError, match="no switchable attention"):
        set_backend(network, flex())
    set_backend(network, None)


def test_the_plugin_serves_flex_and_only_for_validation():
    plugin = FlexPlugin("flex", FlexPlugin.Config())
    assert plugin.values == {"attention_mechanism": {"flex"}}
    assert flex() == AttentionBackend(dispatcher="flex", trains=False)
    assert plugin.is_active(CoreConfig(attention_mechanism="flex"))
    assert not plugin.is_active(CoreConfig())


def test_the_entry_module_imports_nothing_heavy():
    heavy = "torch", "diffusers", "transformers", "numpy"
    code = (
        "import sys, tuner_attention as a; from tuner.config.keys import CoreConfig; from tuner.run import Run\n"
        "a.FlexPlugin('flex', a.FlexPlugin.Config()).attention_backends(Run(CoreConfig(), plugins={}))\n"
        "import tuner.attention_switch\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_flex_on_cuda(network):
    network.module.to("cuda")
    latents, text = torch.randn(1, 16, 3, 8, 8, device="cuda"), torch.randn(1, 7, 16, device="cuda")

    def predict():
        return network.module(latents, torch.tensor([300], device="cuda"), text, return_dict=False)[0]

    exact = predict()
    with validation_backend(network, flex()):
        torch.testing.assert_close(predict(), exact, rtol=1e-3, atol=1e-3)
    network.module.to("cpu")
