"""LyCORIS files: their names, and that other programs compute what was trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tuner import rng
from tuner.builtin import adapter_file, adapter_names
from tuner.builtin.lora import LoraConfig, LoraPlugin
from tuner.errors import CheckpointError, ConfigError
from tuner.model import Stage

wrapper = pytest.importorskip("lycoris.wrapper")
from tuner_lycoris import LycorisConfig, LycorisPlugin, files  # noqa: E402
from tuner_lycoris.adapter import updates  # noqa: E402

FILE = "pytorch_lora_weights.safetensors"
BLOCKS = {"apply_preset": {"target_module": ["WanAttention", "FeedForward"]}}
MODULES = (*(f"{each}_attn.{name}" for each in ("self", "cross") for name in "qkvo"), "ffn.0", "ffn.2")
"""Matrices of a block in Wan's own code."""
TENSORS = {
    "lokr": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 5, "factor": 3}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "whole lokr": ({"algo": "lokr", "linear_dim": 10000, "factor": 4}, {"lokr_w1", "lokr_w2"}),
    "loha": (
        {"algo": "loha", "linear_dim": 4, "linear_alpha": 10},
        {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    ),
    "locon": ({"algo": "locon", "linear_dim": 4, "linear_alpha": 10}, {"lora_A.weight", "lora_B.weight"}),
    "multiplied": (
        {"algo": "lokr", "linear_dim": 10000, "factor": 4, "multiplier": 0.5, "use_scalar": True},
        {"lokr_w1", "lokr_w2"},
    ),
    "full": ({"algo": "full"}, {"diff", "diff_b"}),
}


@pytest.fixture
def trained(make_run, make_network, make_model, randomise):
    """A plugin, run and model whose adapter has been trained."""

    def make(settings, **keys):
        run, network = make_run(lora_type="lycoris", seed=5), make_network()
        run.plugins = {"lora": LoraPlugin("lora", LoraConfig(**keys))}
        plugin = LycorisPlugin("lycoris", LycorisConfig(lycoris_config=BLOCKS | settings))
        plugin.configure(run)
        model = make_model(network)
        (transform,) = plugin.model_transforms(run, model)
        assert (transform.stage, transform.claims) == (Stage.ADAPT, {"adapter"})
        rng.seed_global(0, "test")
        network.adapter = transform.apply(network)
        randomise(network.adapter.state())
        return plugin, run, model

    return make


def saved(trained, folder, settings, **keys):
    plugin, run, model = trained(settings, **keys)
    (write,) = plugin.save(run, model, folder)
    write()
    return folder / FILE, model


@pytest.mark.parametrize("kind", TENSORS)
def test_comfyui_names_are_wans_own(trained, tmp_path, kind):
    settings, names = TENSORS[kind]
    path, _ = saved(trained, tmp_path, settings)
    alpha = set() if kind == "full" else {"alpha"}
    assert set(load_file(path)) == {
        f"diffusion_model.blocks.{block}.{module}.{name}"
        for block in range(2)
        for module in MODULES
        for name in names | alpha
    }


def test_the_values_are_the_trained_ones(trained, tmp_path):
    path, model = saved(trained, tmp_path, TENSORS["loha"][0])
    found, state = load_file(path), model.network.adapter.state()
    assert torch.equal(
        found["diffusion_model.blocks.1.cross_attn.o.hada_w2_b"], state["blocks.1.attn2.to_out.0.hada_w2_b"]
    )
    assert found["diffusion_model.blocks.1.cross_attn.o.alpha"] == 10.0


def test_kohya_names_are_flat(trained):
    _, _, model = trained(TENSORS["lokr"][0])
    tensors, _ = files.export(model.network.module, model.spec, "kohya", {})
    assert {name.partition(".")[0] for name in tensors} == {
        f"lora_unet_blocks_{block}_{module.replace('.', '_')}" for block in range(2) for module in MODULES
    }


@pytest.mark.parametrize("kind", TENSORS)
@torch.no_grad()
def test_the_library_reloads_its_own_names_and_computes_what_we_trained(
    trained, tmp_path, make_network, wan_inputs, kind
):
    path, model = saved(trained, tmp_path, TENSORS[kind][0], lora_format="lycoris")
    live = model.network.module(**wan_inputs).sample
    fresh = make_network().module
    base = fresh(**wan_inputs).sample
    network, tensors = wrapper.create_lycoris_from_weights(1.0, str(path), fresh)
    assert len(network.loras) == 20
    assert {key.partition(".")[0] for key in tensors} == {each.lora_name for each in network.loras}
    network.apply_to()
    torch.testing.assert_close(fresh(**wan_inputs).sample, live, atol=2e-4, rtol=1e-4)
    assert (live - base).abs().max() > 1e-2


@torch.no_grad()
def test_diffusers_loads_locon(trained, tmp_path, tiny_wan, wan_inputs):
    from diffusers import WanPipeline

    path, model = saved(trained, tmp_path, TENSORS["locon"][0])
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    pipeline.load_lora_weights(str(path))
    ours = model.network.module(**wan_inputs).sample
    torch.testing.assert_close(pipeline.transformer(**wan_inputs).sample, ours, atol=2e-4, rtol=1e-4)


def test_whole_lokr_has_an_alpha_that_no_reader_can_misread(trained, tmp_path):
    path, _ = saved(trained, tmp_path, TENSORS["whole lokr"][0] | {"linear_alpha": 7})
    assert {float(each) for name, each in load_file(path).items() if name.endswith("alpha")} == {1.0}


def test_metadata_says_what_it_is_and_nothing_of_the_machine(trained, tmp_path):
    path, _ = saved(trained, tmp_path, TENSORS["lokr"][0])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "tuner.algo": "lokr",
        "tuner.base_model": "tiny",
        "tuner.family": "wan",
        "tuner.format": "comfyui",
        "tuner.network": "transformer",
        "ss_network_dim": "2",
        "ss_network_alpha": "5",
        "modelspec.title": "out",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["tuner.lycoris_config"])["factor"] == 3
    assert str(tmp_path) not in "".join(metadata.values())


def test_the_same_training_gives_the_same_bytes(trained, tmp_path):
    first, second = (saved(trained, tmp_path / each, TENSORS["lokr"][0])[0] for each in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_name_table_that_does_not_fit_is_refused_before_anything_is_written(trained, tmp_path):
    plugin, run, model = trained(TENSORS["lokr"][0])
    model.spec = replace(model.spec, rename=(("attn1.to_q", "q"), ("attn1.to_k", "q")))
    with pytest.raises(CheckpointError, match="are both called"):
        plugin.save(run, model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_make_another_matrix_are_refused(trained, tmp_path, kind):
    plugin, run, model = trained(TENSORS[kind][0])
    model.network.module.get_submodule("blocks.0.attn1.to_q").in_features = 25
    with pytest.raises(CheckpointError, match=r"keys do not fit the model[\s\S]*\(24, 25\)"):
        plugin.save(run, model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["comfyui", "kohya", "lycoris"])
@pytest.mark.parametrize("kind", TENSORS)
@torch.no_grad()
def test_our_own_reader_finds_the_update_that_was_trained(trained, tmp_path, kind, layout):
    """`tuner convert` and `tuner merge` read files with it."""
    _, _, model = trained(TENSORS[kind][0])
    module = model.network.module
    path = tmp_path / "file.safetensors"
    adapter_file.save(*files.export(module, model.spec, layout, {}), path)
    found = updates(module)
    shapes = {name: each.factors.shape for name, each in found.items()}
    file = adapter_file.read(path, model.spec, shapes, adapter_names.FORMATS)
    assert file.updates.keys() == found.keys()
    assert file.notes == ()
    for name, update in found.items():
        wanted = update.factors.double().weight() * update.settings.multiplier
        read = file.updates[name].delta(update.factors.shape, dtype=torch.float64)
        torch.testing.assert_close(read, wanted, atol=1e-7, rtol=1e-6)
        if kind == "full":
            assert torch.equal(file.biases[name].double(), update.factors.tensor("diff_b"))


def test_two_experts_get_two_files(spec):
    low = replace(spec.networks[0], name="transformer_2", label="low_noise")
    assert files.file_name(low, alone=False) == "pytorch_lora_weights.low_noise.safetensors"


def test_a_format_without_names_for_it_is_refused(trained):
    with pytest.raises(ConfigError, match="no loader of diffusers reads LoKr"):
        trained(TENSORS["lokr"][0], lora_format="diffusers")


def test_a_lora_has_no_lycoris_names(make_run):
    with pytest.raises(ConfigError, match="is for lora_type: lycoris"):
        LoraPlugin("lora", LoraConfig(lora_format="lycoris")).configure(make_run())
