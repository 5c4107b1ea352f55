"""Weights tensor by tensor, sinks, stages and claims."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tuner import transforms
from tuner.blocks import BlockStack, Stream, install
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, ModelError, PluginError
from tuner.materialise import materialise
from tuner.model import Adapter, Network, Stage, Transform
from tuner.spec import NetworkSpec
from tuner.train import guards

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.norm(self.linear(x)) + self.table


class Stack(BlockStack):
    def embed(self, x):
        return Stream(x)

    def block(self, block, stream):
        return stream

    def unembed(self, stream):
        return stream.tokens


def network(weights=None) -> Network:
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = Net()
    source = weights or Net().state_dict()
    return Network(
        spec=NetworkSpec("net", 0, 4, 1, 4, 4, 4, 4),
        module=module,
        stack=(stack := Stack(module, [])),
        weights=lambda: iter(source.items()),
        dtype_of=lambda name: torch.float32 if "norm" in name else torch.bfloat16,
        trampoline=install(module, stack),
    )


def run() -> SimpleNamespace:
    return SimpleNamespace(config=CoreConfig(), device=CPU, log=logging.getLogger("test"))


def test_a_network_gets_its_weights_dtypes_and_buffers():
    source = Net().state_dict()
    net = network(source)
    materialise(net, device=CPU)
    assert not any(each.is_meta for each in [*net.module.parameters(), *net.module.buffers()])
    assert net.module.linear.weight.dtype == torch.bfloat16
    assert torch.equal(net.module.linear.weight, source["linear.weight"].bfloat16())
    assert torch.equal(net.module.norm.weight, source["norm.weight"])
    assert net.module.table.tolist() == [0, 1, 2]
    assert not any(each.requires_grad for each in net.module.parameters())
    assert net.module.linear.weight.data_ptr() % 64 == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("norm.bias"), ["lack 1 of 4", "norm.bias"]),
        (lambda weights: weights.update({"linear.wieght": torch.zeros(1)}), ["linear.wieght", "'linear.weight'"]),
        (lambda weights: weights.update({"linear.bias": torch.zeros(7)}), ["linear.bias", "(7,)", "(3,)"]),
    ],
)
def test_weights_that_do_not_fit_are_one_error_with_the_key(change, words):
    weights = dict(Net().state_dict())
    change(weights)
    with pytest.raises(ModelError) as caught:
        materialise(network(weights), device=CPU)
    assert all(word in str(caught.value) for word in words)


def test_a_sink_takes_tensors_in_their_final_dtype_before_anything_else():
    taken = {}

    class Taker:
        def take(self, module, name, tensor):
            if not name.startswith("linear"):
                return False
            taken[name] = tensor
            return True

    net = network()
    materialise(net, device=CPU, sinks=[Taker()])
    assert {name: tensor.dtype for name, tensor in taken.items()} == dict.fromkeys(
        ["linear.weight", "linear.bias"], torch.bfloat16
    )
    assert net.module.linear.weight.is_meta
    assert not net.module.norm.weight.is_meta


def adapter(net: Network) -> Adapter:
    return Adapter("test", (), state=dict, load=lambda state: None)


def edit(stage: Stage, name: str, order: list[str], claims=()) -> Transform:
    def apply(net: Network):
        order.append(name)
        return adapter(net) if stage is Stage.ADAPT else None

    return Transform(stage, name, frozenset(claims), apply)


def test_stages_decide_the_order_not_the_plugins():
    order: list[str] = []
    edits = [edit(Stage.PLACE, "a", order), edit(Stage.ADAPT, "z", order), edit(Stage.REWRITE, "m", order)]
    transforms.prepare(run(), network(), collect(edits))
    assert order == ["z", "m", "a"]


def collect(edits: list[Transform]) -> list[Transform]:
    model = SimpleNamespace(networks={"net": network()})
    manager = SimpleNamespace(collect=lambda hook, **_: [("p", edits)], registry=lambda hook, run: {})
    return transforms.collect(run(), model, manager)


def test_two_claims_on_one_thing_name_both():
    edits = [edit(Stage.ADAPT, "lora", [], ["adapter"]), edit(Stage.ADAPT, "lycoris", [], ["adapter"])]
    with pytest.raises(PluginError, match=r"'lora' and 'lycoris'.*adapter"):
        collect(edits)


def test_a_network_that_nothing_trains_is_refused():
    with pytest.raises(ConfigError, match="model_type 'lora'"):
        collect([edit(Stage.PLACE, "offload", [])])


def test_what_a_transform_draws_does_not_depend_on_others():
    drawn = {}

    def draw(name):
        def apply(net):
            drawn.setdefault(name, []).append(torch.rand(1).item())
            return adapter(net)

        return Transform(Stage.ADAPT, name, frozenset(), apply)

    transforms.prepare(run(), network(), [draw("a")])
    transforms.prepare(run(), network(), [draw("b"), draw("a")])
    assert drawn["a"][0] == drawn["a"][1]
    assert drawn["a"][0] != drawn["b"][0]


def test_parameters_without_gradient_are_listed():
    from tuner.errors import TrainingError
    from tuner.model import ParameterGroup

    net = network()
    with_gradient, without = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with_gradient.grad = torch.zeros(1)
    net.adapter = Adapter(
        "lora",
        (ParameterGroup("lora", {"to_q.A": without, "to_o.A": with_gradient}),),
        state=dict,
        load=lambda state: None,
    )
    with pytest.raises(TrainingError, match=r"1 of 2.*(\n.*)?to_q\.A"):
        guards.check_gradient_coverage(net)
    without.grad = torch.zeros(1)
    guards.check_gradient_coverage(net)
