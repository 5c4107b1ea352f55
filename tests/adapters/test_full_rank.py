"""Full-rank training: groups, state, and weights that load back."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_model
from torch import nn

from tuner.builtin.full import FullPlugin
from tuner.builtin.full.adapter import attach, export
from tuner.errors import CheckpointError, ConfigError
from tuner.plugin import PluginConfig


@pytest.fixture
def plugin():
    return FullPlugin("full", PluginConfig())


def test_every_parameter_is_trained_and_only_matrices_decay(make_network):
    network = make_network()
    adapter = attach(network)
    groups = {group.name: group for group in adapter.groups}
    named = dict(network.module.named_parameters())

    together = {**groups["matrices"].parameters, **groups["norms and biases"].parameters}
    assert together.keys() == named.keys() == adapter.state().keys()
    assert all(each.requires_grad for each in named.values())
    assert groups["matrices"].weight_decay
    assert not groups["norms and biases"].weight_decay
    assert {"patch_embedding.weight", "blocks.0.ffn.net.2.weight"} <= groups["matrices"].parameters.keys()
    assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.norm2.weight", "proj_out.bias"} <= groups[
        "norms and biases"
    ].parameters.keys()


def test_state_round_trip_is_bit_equal_in_the_same_storage(make_network, randomise):
    source = attach(make_network()).state()
    randomise(source)
    adapter = attach(make_network())
    pointers = {name: tensor.data_ptr() for name, tensor in adapter.state().items()}
    adapter.load(source)
    assert all(torch.equal(tensor, source[name]) for name, tensor in adapter.state().items())
    assert {name: tensor.data_ptr() for name, tensor in adapter.state().items()} == pointers
    with pytest.raises(CheckpointError, match=r"proj_out\.bias is missing"):
        adapter.load({name: tensor for name, tensor in source.items() if name != "proj_out.bias"})


def test_the_saved_folder_loads_in_diffusers(
    plugin, make_run, make_network, make_model, randomise, tmp_path, wan_inputs
):
    run, network = make_run(model_type="full"), make_network()
    model = make_model(network)
    (transform,) = plugin.model_transforms(run, model)
    network.adapter = transform.apply(network)
    randomise(network.adapter.state())

    written = plugin.save(run, model, tmp_path)

    folder = tmp_path / "transformer"
    assert sorted(written) == [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    loaded = WanTransformer3DModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**wan_inputs).sample, network.module(**wan_inputs).sample)


def test_another_modules_weights_are_written_too(make_network, tmp_path):
    network = make_network()
    network.module = nn.Linear(3, 2)
    (path,) = export(network, tmp_path / "net")
    other = nn.Linear(3, 2)
    load_model(other, path)
    assert torch.equal(other.weight, network.module.weight)


def test_a_quantised_base_is_refused(plugin, make_run):
    with pytest.raises(ConfigError, match="'int8-quanto' cannot be trained"):
        plugin.configure(make_run(model_type="full", base_model_precision="int8-quanto"))


def test_bf16_weights_are_warned_about(plugin, make_run, caplog):
    with caplog.at_level(logging.WARNING):
        plugin.configure(make_run(model_type="full", base_model_default_dtype="fp32"))
        plugin.configure(make_run())
        assert not caplog.records
        plugin.configure(make_run(model_type="full"))
    assert "base_model_default_dtype: fp32" in caplog.text


def test_nothing_happens_when_a_lora_is_trained(plugin, make_run, make_network, make_model, tmp_path):
    run, model = make_run(), make_model(make_network())
    assert list(plugin.model_transforms(run, model)) == []
    assert list(plugin.save(run, model, tmp_path)) == []
