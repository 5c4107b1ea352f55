"""The offload keys: what is refused and how it is said, and what the placement refuses of a network."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError, PluginError
from tuner.model import Stage, Transform
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner_offload import OffloadConfig, OffloadPlugin


def plugin(**keys) -> OffloadPlugin:
    return OffloadPlugin("offload", OffloadConfig(**keys))


def run(**keys) -> Run:
    return Run(CoreConfig(**keys), plugins={})


def spec(blocks: int) -> ModelSpec:
    network = NetworkSpec("transformer", blocks, dim=8, heads=1, ffn_dim=8, text_dim=8, text_tokens=8, in_channels=4)
    return ModelSpec("toy", "toy", "none", (network,), LatentGeometry(4, 4, 8), 16, 16.0, ("to_q",))


@pytest.mark.parametrize(
    ("keys", "core", "said"),
    [
        ({"enable_model_cpu_offload": True}, {}, "exclude each other"),
        ({"group_offload_type": "leaf_level"}, {"model_type": "full"}, "leaf_level"),
        ({}, {"gradient_checkpointing": False}, "set gradient_checkpointing to true"),
        ({}, {"gradient_checkpointing_interval": 2}, "gradient_checkpointing_interval is 2"),
    ],
)
def test_what_group_offload_refuses(keys, core, said):
    with pytest.raises(ConfigError) as error:
        plugin(enable_group_offload=True, **keys).configure(run(**core))
    assert said in str(error.value)
    assert "to do:" in str(error.value) or "allowed:" in str(error.value)


def test_several_faults_come_in_one_message():
    with pytest.raises(ConfigError) as error:
        plugin(enable_group_offload=True, enable_model_cpu_offload=True).configure(run(gradient_checkpointing=False))
    assert "exclude each other" in str(error.value)
    assert "gradient_checkpointing" in str(error.value)


def test_switched_off_it_refuses_and_does_nothing():
    off = plugin(group_offload_type="leaf_level")
    off.configure(run(model_type="full", gradient_checkpointing=False))
    off.check_model(run(), spec(1))
    assert not off.is_active(CoreConfig())
    assert list(off.model_transforms(run(), None)) == []


@pytest.mark.parametrize(("blocks", "size", "fits"), [(30, 14, True), (30, 15, False), (3, 1, True), (2, 1, False)])
def test_groups_must_leave_something_to_offload(blocks, size, fits):
    on = plugin(enable_group_offload=True, group_offload_blocks_per_group=size)
    if fits:
        on.check_model(run(), spec(blocks))
        return
    with pytest.raises(ConfigError, match=f"group_offload_blocks_per_group {size}.*all {blocks} blocks"):
        on.check_model(run(), spec(blocks))


def test_the_plugin_places_the_network():
    (place,) = plugin(enable_group_offload=True).model_transforms(run(), None)
    assert (place.stage, place.claims) == (Stage.PLACE, frozenset({"placement"}))
    assert place.sink is not None


def test_a_trained_base_weight_stays_where_it_is_when_placed_afterwards(toy):
    def unfreeze(network):
        network.stack.blocks[1].norm.weight.requires_grad_(True)

    streamed = toy(offload=True, while_reading=False, extra=(Transform(Stage.REWRITE, "free", frozenset(), unfreeze),))
    weight = streamed.network.stack.blocks[1].norm.weight
    streamed.loss(0).backward()
    assert streamed.network.stack.blocks[1].norm.weight is weight
    assert weight.grad is not None


def test_a_replaced_weight_is_refused(toy):
    def swap(network):
        network.stack.blocks[2].norm = nn.LayerNorm(24)

    with pytest.raises(PluginError, match=r"blocks\.2\.norm\.weight.*was replaced"):
        toy(offload=True, extra=(Transform(Stage.REWRITE, "swap", frozenset(), swap),))


def test_weights_of_an_unknown_class_are_refused(toy):
    class Packed(torch.Tensor):
        """A weight that only its own library can take apart."""

    def pack(network):
        layer = network.stack.blocks[1].to_q if hasattr(network.stack.blocks[1], "to_q") else None
        owner = layer or next(each for each in network.stack.blocks[1].modules() if isinstance(each, nn.Linear))
        owner._parameters["weight"] = nn.Parameter(owner.weight.data.as_subclass(Packed), requires_grad=False)

    with pytest.raises(ConfigError, match=r"class Packed.*\n.*blocks\.1\..*weight"):
        toy(offload=True, while_reading=False, extra=(Transform(Stage.REWRITE, "pack", frozenset(), pack),))


def test_a_stream_without_streams_is_said(toy, caplog):
    with caplog.at_level("INFO", logger="tuner"):
        toy(offload=True, use_stream=True)
    assert "group_offload_use_stream has no effect on cpu" in caplog.text
    assert "6 groups" in caplog.text


def test_the_entry_module_imports_nothing_heavy():
    heavy = "torch", "diffusers", "transformers", "numpy"
    code = f"import sys, tuner_offload; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_masters_keep_each_dtype(toy):
    streamed = toy(offload=True, dtype=torch.bfloat16)
    for _, name, parameter in streamed.frozen():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
