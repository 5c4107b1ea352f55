"""quanto: 8-bit block weights made while reading, and LoRA that trains on them."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from optimum.quanto import QLinear, WeightQBytesTensor, freeze, qint8, qtypes, quantize
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from tuner.blocks import StepContext
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.materialise import materialise
from tuner.model import Network
from tuner.run import Run
from tuner_quantization import QuantoPlugin
from tuner_quantization.quanto import quantise
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny_t2v

CPU = torch.device("cpu")
PRECISIONS = ["fp8-quanto", "int8-quanto"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("quanto") / "tiny"
    return build_tiny_t2v(folder, layers=3, heads=2, head_dim=64, ffn_dim=512)


@pytest.fixture
def make(base, monkeypatch):
    """A factory of materialised Wan networks: in full precision, or with one of the plugin's quantisers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def network(precision: str | None, dtype: torch.dtype = torch.float32, **core) -> Network:
        run = Run(CoreConfig(pretrained_model_name_or_path=str(base), **core), plugins={})
        wan = WanPlugin("wan", WanPlugin.Config())
        run.spec = wan.describe_model(run)
        run.place(CPU, dtype)
        found = wan.load_model(run).network
        sinks = [] if precision is None else [plugin().quantizers(run)[precision](found)]
        materialise(found, device=CPU, sinks=sinks)
        found.module.requires_grad_(False)
        return found

    return network


def plugin() -> QuantoPlugin:
    return QuantoPlugin("quanto", QuantoPlugin.Config())


def forward(network: Network, *, autocast: bool = False, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    latents, text = torch.randn(2, 16, 3, 8, 8, generator=draw), torch.randn(2, 6, 16, generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return network.module(latents, torch.tensor([100, 700]), text, return_dict=False)[0].float()


def block_bytes(network: Network) -> int:
    """Bytes of all block parameters as they are stored."""
    stored = 0
    for block in network.stack.blocks:
        for parameter in block.parameters():
            inner = (parameter._data, parameter._scale) if isinstance(parameter, WeightQBytesTensor) else (parameter,)
            stored += sum(each.nbytes for each in inner)
    return stored


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("dtype", "fraction"), [(torch.float32, 0.3), (torch.bfloat16, 0.55)])
def test_block_weights_shrink(make, precision, dtype, fraction):
    assert block_bytes(make(precision, dtype)) <= fraction * block_bytes(make(None, dtype))


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [
        ("int8-quanto", torch.float32, 0.003),
        ("int8-quanto", torch.bfloat16, 0.015),
        ("fp8-quanto", torch.float32, 0.015),
        ("fp8-quanto", torch.bfloat16, 0.02),
    ],
)
def test_the_forward_stays_close(make, precision, dtype, bound):
    with torch.no_grad():
        exact = forward(make(None))
        found = forward(make(precision, dtype), autocast=dtype == torch.bfloat16)
    error = (found - exact).norm() / exact.norm()
    assert 1e-6 < error < bound


def test_only_the_linear_layers_of_blocks_are_quantised(make):
    network = make("int8-quanto")
    quantised = {name for name, module in network.module.named_modules() if isinstance(module, QLinear)}
    attentions = {f"{each}.to_{part}" for each in ("attn1", "attn2") for part in ("q", "k", "v", "out.0")}
    expected = {f"blocks.{index}.{name}" for index in range(3) for name in attentions | {"ffn.net.0.proj", "ffn.net.2"}}
    assert quantised == expected
    for name, parameter in network.module.named_parameters():
        is_weight = name.removesuffix(".weight") in expected and name.endswith(".weight")
        assert isinstance(parameter, WeightQBytesTensor) == is_weight, name
        assert not parameter.requires_grad
    assert all(not tensor.is_meta for tensor in [*network.module.parameters(), *network.module.buffers()])


def test_float32_weights_are_those_of_quantos_own_quantize_and_freeze(make):
    ours, theirs = make("int8-quanto"), make(None)
    quantize(theirs.module.blocks, weights=qint8)
    freeze(theirs.module.blocks)
    for mine, other in zip(ours.module.blocks.parameters(), theirs.module.blocks.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_layers_named_norm_or_modulation_stay_exact(make, base):
    network = make(None)
    block = network.stack.blocks[0]
    block.adaptive_norm, block.modulation = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    run = Run(CoreConfig(), plugins={})
    run.place(CPU, torch.float32)
    plugin().quantizers(run)["int8-quanto"](network)
    assert type(block.adaptive_norm) is nn.Linear
    assert type(block.modulation[0]) is nn.Linear
    assert type(block.ffn.net[2]) is QLinear


def test_full_precision_weights_are_let_go_one_by_one(make, base):
    """While the weights are read, at most the tensor being read and the one before it are alive."""
    run = Run(CoreConfig(pretrained_model_name_or_path=str(base)), plugins={})
    wan = WanPlugin("wan", WanPlugin.Config())
    run.spec = wan.describe_model(run)
    run.place(CPU, torch.float32)
    network = wan.load_model(run).network
    seen: list[weakref.ref] = []
    alive: list[int] = []

    def watched():
        for name, tensor in network.weights():
            alive.append(sum(each() is not None for each in seen))
            seen.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    sink = plugin().quantizers(run)["int8-quanto"](network)
    materialise(replace(network, weights=watched), device=CPU, sinks=[sink])
    assert len(seen) > 30
    assert max(alive) <= 2


@pytest.mark.parametrize("kind", ["qint8", "qfloat8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_channel_has_its_own_scale(kind, dtype):
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 64, generator=draw) * torch.logspace(-6, 2, 16).unsqueeze(1)
    weight[5] = 0
    quantised = quantise(weight, qtypes[kind], device=CPU, dtype=dtype)
    assert quantised.dtype == dtype
    back = (quantised._data.float() * quantised._scale.float()).double()
    error = (back - weight).abs().amax(1) / weight.double().abs().amax(1).clamp_min(1e-30)
    # half a step of 1/127, or half of fp8's last bit; a rounded scale adds what clamping its maximum costs
    assert (error <= (0.5 / 127 if kind == "qint8" else 2**-4) * (1 + (dtype == torch.bfloat16))).all()
    assert torch.equal(back[5], torch.zeros(64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("precision", "dtype", "core"),
    [
        ("int8-quanto", torch.float32, {}),
        ("fp8-quanto", torch.bfloat16, {}),
        ("int8-quanto", torch.bfloat16, {"base_model_default_dtype": "fp32"}),
    ],
    ids=["fp32", "bf16", "bf16-autocast-on-fp32-base"],
)
def test_lora_trains_on_it(make, precision, dtype, core):
    network = make(precision, dtype, **core)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), network.module)
    lora = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
    assert len(lora) == 3 * 10 * 2
    for parameter in lora.values():
        parameter.data = parameter.data.float()
    network.trampoline.context = StepContext(checkpointing=True)
    network.module.train()
    target = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(lora.values(), lr=3e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (forward(network, autocast=dtype == torch.bfloat16) - target).square().mean()
        loss.backward()
        assert [name for name, each in lora.items() if each.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert all(each.grad.abs().sum() > 0 for each in lora.values())
    assert losses[-1] < 0.9 * losses[0]
    assert sum(after < before for before, after in pairwise(losses)) > 5


def test_gradients_are_those_of_the_dequantised_network(make):
    """LoRA's gradients on 8-bit weights equal those on the same weights written out in float32."""

    def gradients(network):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
        inject_adapter_in_model(config, network.module)
        network.trampoline.context = StepContext(checkpointing=True)
        network.module.train()
        forward(network).square().mean().backward()
        return {name: each.grad for name, each in network.module.named_parameters() if each.requires_grad}

    quantised, plain = make("int8-quanto"), make(None)
    for mine, other in zip(quantised.module.parameters(), plain.module.parameters(), strict=True):
        other.data.copy_(mine.dequantize() if isinstance(mine, WeightQBytesTensor) else mine)
    expected = gradients(plain)
    found = gradients(quantised)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_active_only_when_chosen():
    assert plugin().is_active(CoreConfig(base_model_precision="int8-quanto"))
    assert plugin().is_active(CoreConfig(base_model_precision="fp8-quanto"))
    assert not plugin().is_active(CoreConfig())
    plugin().configure(Run(CoreConfig(model_type="full"), plugins={}))


def test_a_quantised_text_encoder_stands_in_nobodys_way():
    core = CoreConfig(text_encoder_1_precision="int8-quanto", model_type="full")
    assert plugin().is_active(core)
    plugin().configure(Run(core, plugins={}))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_full_rank_training_is_refused(precision):
    core = CoreConfig(base_model_precision=precision, model_type="full")
    with pytest.raises(ConfigError, match="use `model_type: lora`"):
        plugin().configure(Run(core, plugins={}))


def test_the_entry_module_imports_nothing_heavy():
    heavy = "torch", "diffusers", "transformers", "numpy", "optimum.quanto"
    code = (
        "import sys, tuner_quantization as q; from tuner.config.keys import CoreConfig; from tuner.run import Run\n"
        "run = Run(CoreConfig(base_model_precision='int8-quanto'), plugins={})\n"
        "plugin = q.QuantoPlugin('quanto', q.QuantoPlugin.Config()); plugin.configure(run); plugin.quantizers(run)\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["qint8", "qfloat8_e4m3fn"])
def test_quantised_on_cuda(kind):
    layer = nn.Linear(128, 64, bias=False)
    q = QLinear.from_module(nn.Linear(128, 64, bias=False, device="meta"), weights=qtypes[kind])
    weight = quantise(layer.weight.detach(), qtypes[kind], device=torch.device("cuda"), dtype=torch.bfloat16)
    assert type(weight) is WeightQBytesTensor
    q._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = q(x)
    y.sum().backward()
    exact = layer(x.detach().float().cpu())
    assert (y.float().cpu() - exact).norm() / exact.norm() < 0.05
    assert torch.isfinite(x.grad).all()
