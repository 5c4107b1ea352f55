"""Every backend that runs on a CPU: bytes, error, gradients, LoRA, and what is said where one cannot run."""

from __future__ import annotations

import weakref
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import tuner_quantization
from tuner.blocks import StepContext
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.materialise import materialise
from tuner.model import Network
from tuner.run import Run
from tuner.selection import Catalog
from tuner_quantization import BitsandbytesPlugin, Fp8ScaledPlugin, QuantisationPlugin, QuantoPlugin, TorchaoPlugin
from tuner_quantization.layers import LinearSink, stored_bytes
from tuner_quantization.stored import StoredLinear
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny_t2v

CPU = torch.device("cpu")
PLUGINS = (Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin, BitsandbytesPlugin)
OWNERS = {value: plugin for plugin in PLUGINS for value in plugin.precisions}
HERE = sorted(value for value, plugin in OWNERS.items() if not plugin.precisions[value].cuda)
ERROR = {"int8": 0.01, "fp8": 0.03, "int4": 0.11, "nf4": 0.11}
"""Relative error of a weight drawn from a normal distribution, at most."""
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def plugin(precision: str) -> QuantisationPlugin:
    return OWNERS[precision](precision, OWNERS[precision].Config())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    return build_tiny_t2v(tmp_path_factory.mktemp("backends") / "tiny", layers=2, heads=2, head_dim=64, ffn_dim=512)


@pytest.fixture
def unread(base, monkeypatch):
    """A factory of runs and networks that have no weights yet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(**core: Any) -> tuple[Run, Network]:
        run = Run(CoreConfig(pretrained_model_name_or_path=str(base), **core), plugins={})
        wan = WanPlugin("wan", WanPlugin.Config())
        run.spec = wan.describe_model(run)
        run.place(CPU, torch.float32 if core.get("mixed_precision") == "no" else torch.bfloat16)
        return run, wan.load_model(run).network

    return make


@pytest.fixture
def quantised(unread):
    """A factory of networks with their weights, in a precision or as they are."""

    def make(precision: str | None, **core: Any) -> tuple[Network, LinearSink | None]:
        run, network = unread(**core)
        sink = None if precision is None else plugin(precision).quantizers(run)[precision](network)
        materialise(network, device=CPU, sinks=[sink] if sink else [])
        network.module.requires_grad_(False)
        return network, sink

    return make


def forward(network: Network, *, autocast: bool = True) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 16, 3, 8, 8, generator=draw), torch.randn(2, 6, 16, generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return network.module(latents, torch.tensor([100, 700]), text, return_dict=False)[0].float()


def written_out(layer: nn.Linear) -> Tensor:
    """The weight that a quantised layer computes with."""
    if isinstance(layer, StoredLinear):
        return layer.dequantise(torch.float32)
    return layer.weight.dequantize().float()


@pytest.mark.parametrize("precision", HERE)
def test_weights_are_as_small_as_their_precision_and_as_near_as_it_allows(quantised, precision) -> None:
    network, sink = quantised(precision)
    plain, _ = quantised(None)
    attentions = {f"{each}.to_{part}" for each in ("attn1", "attn2") for part in ("q", "k", "v", "out.0")}
    expected = {f"blocks.{index}.{name}" for index in range(2) for name in attentions | {"ffn.net.0.proj", "ffn.net.2"}}
    assert set(sink.layers) == expected, "feed-forward layers too; norms, embeddings, modulation and head not"
    weights = 0
    for name, layer in sink.layers.items():
        exact = plain.module.get_submodule(name).weight.float()
        weights += exact.numel()
        error = (written_out(layer) - exact).norm() / exact.norm()
        assert error < ERROR[precision.partition("-")[0]], name
        assert error > 1e-4, name
    theory = plugin(precision).precisions[precision].bytes
    # Scales by output weigh more here than in a real model, whose layers have 1536 inputs and more.
    by_output = 0.04 if precision.startswith(("int8", "fp8")) else 0.01
    assert sink.bytes_stored <= (1.05 * theory + by_output) * weights
    assert sink.bytes_read == 2 * weights
    held = sum(stored_bytes(each) for each in network.module.parameters())
    rest = sum(
        each.nbytes for name, each in plain.module.named_parameters() if name.removesuffix(".weight") not in expected
    )
    assert held == sink.bytes_stored + rest, "nothing of the full-precision weights is left"


@pytest.mark.parametrize("precision", HERE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_are_those_on_the_weights_written_out(quantised, precision, checkpointing) -> None:
    def gradients(network: Network) -> dict[str, Tensor]:
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), network.module)
        lora = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
        for index, parameter in enumerate(lora.values()):
            draw = torch.Generator().manual_seed(index)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
        network.trampoline.context = StepContext(checkpointing=checkpointing)
        network.module.train()
        forward(network, autocast=False).square().mean().backward()
        return {name: each.grad for name, each in lora.items()}

    network, sink = quantised(precision, mixed_precision="no")
    plain, _ = quantised(None, mixed_precision="no")
    for name, layer in sink.layers.items():
        plain.module.get_submodule(name).weight.data.copy_(written_out(layer))
    found, expected = gradients(network), gradients(plain)
    assert len(found) == 2 * 2 * 10
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp8-scaled", "nf4-bnb", "int8-bnb", "int4-quanto"])
def test_nothing_of_the_written_out_weight_is_kept_for_backward(precision) -> None:
    layer = StoredLinear(nn.Linear(256, 128), sink_class(precision).codec)
    layer.store(torch.randn(128, 256), CPU)
    kept: list[int] = []
    rows = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda x: x):
        layer(rows)
    assert sum(kept) == sum(layer.get_parameter(name).nbytes for name in layer.codec.names)


def sink_class(precision: str) -> Any:
    from importlib import import_module

    module, _, name = plugin(precision).precisions[precision].sink.partition(":")
    return getattr(import_module(f"tuner_quantization.{module}"), name)


@pytest.mark.parametrize("sigma", [0.05, 0.02, 0.01, 0.005])
def test_scaled_fp8_has_the_same_error_at_every_size_of_weight_and_a_plain_cast_has_not(sigma: float) -> None:
    from tuner_quantization.fp8_scaled import Fp8Scaled

    weight = sigma * torch.randn(256, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codec = Fp8Scaled()
    stored = codec.encode(weight.float())
    back = codec.decode([stored[name] for name in codec.names], (256, 512), torch.float32).double()
    assert (back - weight).norm() / weight.norm() == pytest.approx(0.025, abs=0.001)
    cast = weight.float().to(torch.float8_e4m3fn).double()
    assert (cast - weight).norm() / weight.norm() > {0.05: 0.026, 0.02: 0.03, 0.01: 0.05, 0.005: 0.1}[sigma]


def test_scaled_fp8_is_its_formula_in_float64() -> None:
    """q = round(w / s) in float8, s = max |w| / 448 of 64 inputs; zeros stay zeros and no scale is rounded."""
    from tuner_quantization.fp8_scaled import Fp8Scaled

    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(1))
    weight[2, 64:128] = 0
    stored = Fp8Scaled().encode(weight)
    scale = (weight.double().view(5, 3, 64).abs().amax(2) / 448).clamp_min(1e-12)
    torch.testing.assert_close(stored["weight_scale"].double(), scale, rtol=1e-6, atol=0)
    expected = stored["weight"].double().view(5, 3, 64) * stored["weight_scale"].double().unsqueeze(2)
    found = Fp8Scaled().decode(list(stored.values()), (5, 192), torch.float32)
    torch.testing.assert_close(found.double(), expected.view(5, 192), rtol=1e-7, atol=0)
    assert torch.equal(found[2, 64:128], torch.zeros(64))
    assert Fp8Scaled().encode(torch.randn(4, 100))["weight_scale"].shape == (4, 1)


def test_int4_of_quanto_is_what_quanto_itself_reads() -> None:
    from optimum.quanto import MaxOptimizer, qint4

    from tuner_quantization.quanto import Int4

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    stored = Int4().encode(weight)
    scale, shift = MaxOptimizer()(weight, qint4, 0, 64)
    data = torch.ops.quanto.quantize_affine(weight, bits=4, axis=0, group_size=64, scale=scale, shift=shift)
    expected = (data * scale - shift).view(64, 128)
    assert torch.equal(Int4().decode(list(stored.values()), (64, 128), torch.float32), expected)


@pytest.mark.parametrize("precision", HERE)
def test_one_tensor_at_a_time_is_in_full_precision(unread, precision) -> None:
    run, network = unread()
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watched():
        for name, tensor in network.weights():
            alive.append(sum(each() is not None for each in seen))
            seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    sink = plugin(precision).quantizers(run)[precision](network)
    materialise(replace(network, weights=watched), device=CPU, sinks=[sink])
    assert len(seen) > 30
    assert max(alive) <= 2


def test_quantize_via_says_where() -> None:
    placed: list[torch.device] = []

    class Watching(sink_class("fp8-scaled")):  # type: ignore[misc]
        def fill(self, layer, weight):
            placed.append(weight.device)

    root = nn.ModuleDict({"a": nn.Linear(64, 64, device="meta")})
    Watching(root, [root], device=CPU, via=torch.device("meta"), dtype=torch.float32).take(
        root, "a.weight", torch.ones(64, 64)
    )
    assert [each.type for each in placed] == ["meta"]


# What is said


def run_with(**core: Any) -> Run:
    return Run(CoreConfig(**core), plugins={})


@pytest.mark.parametrize("precision", HERE)
def test_a_missing_package_is_named_with_what_runs_instead(monkeypatch, precision) -> None:
    needs = plugin(precision).needs
    if not needs:
        pytest.skip("needs nothing")
    missing = next(iter(needs)).split(".")[0]
    monkeypatch.setattr(
        tuner_quantization, "find_spec", lambda name: None if name.split(".")[0] == missing else find_spec(name)
    )
    with pytest.raises(ConfigError, match="which is not installed") as caught:
        plugin(precision).configure(run_with(base_model_precision=precision))
    assert f"pip install difftuner[{OWNERS[precision].__name__.removesuffix('Plugin').lower()}]" in str(caught.value)
    assert "what runs here: fp8-scaled" in str(caught.value)
    assert precision not in str(caught.value).split("what runs here")[1]


def test_what_needs_a_device_is_refused_without_one(monkeypatch) -> None:
    monkeypatch.setattr(tuner_quantization, "_cuda", lambda: False)
    monkeypatch.setattr(tuner_quantization, "_installed", lambda name: True)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        plugin("int4-torchao").configure(run_with(base_model_precision="int4-torchao"))


@pytest.mark.parametrize("precision", HERE)
def test_full_rank_training_is_refused(precision) -> None:
    with pytest.raises(ConfigError, match="use `model_type: lora`"):
        plugin(precision).configure(run_with(base_model_precision=precision, model_type="full"))


def test_every_precision_has_one_plugin_for_base_and_text_encoder() -> None:
    catalog = Catalog()
    for value, owner in OWNERS.items():
        for key in ("base_model_precision", "text_encoder_1_precision"):
            [name] = catalog.providers(key, value)
            assert catalog.installed[name].load() is owner


def test_the_estimate_knows_the_bytes_of_a_weight() -> None:
    run = run_with(base_model_precision="nf4-bnb")
    assert plugin("nf4-bnb").estimate(run=run, spec=None, workload=None) == {"weight_bytes": 0.516}
    assert plugin("int8-bnb").estimate(run=run_with(), spec=None, workload=None) == {}
