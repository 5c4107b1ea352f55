"""LoRA files: their names, their metadata, and that diffusers computes what we computed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from tuner import rng
from tuner.builtin import adapter_file
from tuner.builtin.lora import LoraConfig, LoraPlugin
from tuner.builtin.lora import files as lora_files
from tuner.builtin.lora.names import Targets
from tuner.errors import CheckpointError, ConfigError
from tuner.model import Stage

FILE = "pytorch_lora_weights.safetensors"
ORIGINAL = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
"""The projections' names in Wan's own code, from its repository."""


@pytest.fixture
def trained(make_run, make_network, make_model, randomise):
    """A plugin, run and model whose LoRA (rank 4, alpha 6) has been trained."""

    def make(**keys):
        run, network = make_run(seed=5, learning_rate=5e-5, flow_schedule_shift=3), make_network()
        plugin = LoraPlugin("lora", LoraConfig(**{"lora_rank": 4, "lora_alpha": 6, **keys}))
        plugin.configure(run)
        model = make_model(network)
        (transform,) = plugin.model_transforms(run, model)
        assert transform.stage == Stage.ADAPT
        rng.seed_global(0, "test")
        network.adapter = transform.apply(network)
        randomise(network.adapter.state())
        return plugin, run, model

    return make


def saved(trained, folder, **keys):
    plugin, run, model = trained(**keys)
    (write,) = plugin.save(run, model, folder)
    write()
    return folder / FILE, model


def test_comfyui_names_are_those_of_wans_own_code(trained, tmp_path):
    path, _ = saved(trained, tmp_path)
    wanted = {
        f"diffusion_model.blocks.{block}.{attention}.{theirs}.{part}"
        for block in range(2)
        for attention in ("self_attn", "cross_attn")
        for theirs in ORIGINAL.values()
        for part in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    tensors = load_file(path)
    assert set(tensors) == wanted
    alphas = [tensor for name, tensor in tensors.items() if name.endswith("alpha")]
    assert all(alpha.shape == () and alpha.item() == 6.0 for alpha in alphas)


def test_diffusers_names_and_config(trained, tmp_path):
    path, model = saved(trained, tmp_path, lora_format="diffusers")
    assert set(load_file(path)) == {f"transformer.{name}" for name in model.network.adapter.state()}
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 4
    assert config["transformer.lora_alpha"] == 6
    modules = {name.rpartition(".lora_")[0] for name in model.network.adapter.state()}
    assert set(config["transformer.target_modules"]) == modules


def test_kohya_names_have_underscores(trained, tmp_path):
    path, _ = saved(trained, tmp_path, lora_format="kohya")
    tensors = load_file(path)
    assert set(tensors) == {
        f"lora_unet_blocks_{block}_{attention}_{theirs}.{part}"
        for block in range(2)
        for attention in ("self_attn", "cross_attn")
        for theirs in ORIGINAL.values()
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert tensors["lora_unet_blocks_0_self_attn_q.alpha"].item() == 6.0


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_diffusers_computes_what_we_trained(trained, tmp_path, tiny_wan, wan_inputs, layout):
    path, model = saved(trained, tmp_path, lora_format=layout)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    with torch.no_grad():
        base = pipeline.transformer(**wan_inputs).sample
        pipeline.load_lora_weights(path.parent)  # the folder: the name is the one diffusers looks for
        loaded = pipeline.transformer(**wan_inputs).sample
        ours = model.network.module(**wan_inputs).sample
    torch.testing.assert_close(loaded, ours, atol=2e-6, rtol=1e-5)
    # Alpha is 1.5 times the rank: with the scale left out the difference would be of the order of the update.
    assert (ours - base).abs().max() > 1e-2


def test_the_pipeline_renders_what_our_network_renders(trained, tmp_path, tiny_wan):
    path, model = saved(trained, tmp_path)

    def rendered(pipeline):
        arguments = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("a red circle", generator=torch.Generator().manual_seed(1), **arguments).frames

    theirs = WanPipeline.from_pretrained(tiny_wan)
    base = rendered(theirs)
    theirs.load_lora_weights(str(path))
    ours = rendered(WanPipeline.from_pretrained(tiny_wan, transformer=model.network.module))
    torch.testing.assert_close(rendered(theirs), ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, base, atol=1e-2)


def test_metadata_says_what_it_is_and_nothing_of_the_machine(trained, tmp_path):
    path, _ = saved(trained, tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "tuner.base_model": "tiny",
        "tuner.family": "wan",
        "tuner.flavour": "t2v-480p-1.3b-2.1",
        "tuner.network": "transformer",
        "tuner.sigma_range": "0.0-1.0",
        "tuner.format": "comfyui",
        "tuner.shift": "3.0",
        "tuner.rank": "4",
        "tuner.alpha": "6",
        "ss_network_dim": "4",
        "ss_network_alpha": "6",
    }
    assert expected.items() <= metadata.items()
    assert "lora_adapter_metadata" not in metadata  # diffusers would scale by alpha twice
    assert "/" not in "".join(value for name, value in metadata.items() if name != "modelspec.architecture")


def test_a_repository_is_named_in_full(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    public = {base: replace(spec, base=base).public_base for base in ("Wan-AI/Wan", "/home/someone/models/mine")}
    assert public == {"Wan-AI/Wan": "Wan-AI/Wan", "/home/someone/models/mine": "mine"}
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert replace(spec, base="models/mine").public_base == "mine"


def test_the_same_training_gives_the_same_bytes(trained, tmp_path):
    first, _ = saved(trained, tmp_path / "first")
    second, _ = saved(trained, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


def test_a_pair_of_networks_gets_names_of_its_own(trained):
    _, _, model = trained()
    low = replace(model.network.spec, name="transformer_2", label="low_noise")
    assert lora_files.file_name(low, alone=True) == FILE
    assert lora_files.file_name(low, alone=False) == "pytorch_lora_weights.low_noise.safetensors"
    unnamed = replace(low, label="")
    assert lora_files.file_name(unnamed, alone=False) == "pytorch_lora_weights.transformer_2.safetensors"


def exported(trained):
    _, _, model = trained()
    file = lora_files.export(model.network.adapter, model.spec, "comfyui", {})
    shapes = {
        name.removesuffix(".base_layer.weight").removesuffix(".weight"): tuple(parameter.shape)
        for name, parameter in model.network.module.named_parameters()
        if "lora_" not in name and name.endswith("weight") and parameter.ndim > 1
    }
    lora_files.verify(file.tensors, shapes, model.spec, "comfyui")
    return dict(file.tensors), shapes, model.spec


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.attn1.to_q.lora_A.weight",  # the prefix changed, the names not: ComfyUI would skip it
        "diffusion_model.blocks.2.self_attn.q.lora_A.weight",  # a block that is not there
        "blocks.0.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.self_attn.q.hada_w1_a",
    ],
)
def test_a_foreign_key_is_refused(trained, name):
    tensors, shapes, spec = exported(trained)
    tensors[name] = torch.zeros(4, 24)
    with pytest.raises(CheckpointError, match="1 of 49 keys of the LoRA file name no matrix of the model"):
        lora_files.verify(tensors, shapes, spec, "comfyui")


def test_a_missing_half_and_a_wrong_shape_are_refused(trained):
    tensors, shapes, spec = exported(trained)
    key = "diffusion_model.blocks.0.self_attn.q.lora_B.weight"
    whole = tensors.pop(key)
    with pytest.raises(CheckpointError, match=r"only one of the two matrices of 'diffusion_model\.blocks"):
        lora_files.verify(tensors, shapes, spec, "comfyui")
    tensors[key] = whole[:-1]
    with pytest.raises(CheckpointError, match=r"and its weight has \(24, 24\)"):
        lora_files.verify(tensors, shapes, spec, "comfyui")


def test_a_name_table_that_does_not_fit_is_refused_before_anything_is_written(trained, tmp_path):
    from dataclasses import replace

    plugin, run, model = trained()
    model.spec = replace(model.spec, rename=(("attn1.to_q", "q"), ("attn2.to_q", "q")))
    with pytest.raises(CheckpointError, match="two modules of the model are both called"):
        plugin.save(run, model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_full_disk_leaves_no_file(trained, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_file, "save_file", full)
    plugin, run, model = trained()
    (write,) = plugin.save(run, model, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_attached_or_written_when_something_else_is_trained(make_run, make_network, make_model, tmp_path):
    run, model = make_run(model_type="full"), make_model(make_network())
    plugin = LoraPlugin("lora", LoraConfig())
    assert list(plugin.model_transforms(run, model)) == []
    assert list(plugin.save(run, model, tmp_path)) == []


def test_an_unknown_target_is_refused_before_weights_are_read(make_run, make_network, make_model):
    plugin = LoraPlugin("lora", LoraConfig(lora_target_modules=["to_x"]))
    with pytest.raises(ConfigError, match="'to_x' matches no module"):
        plugin.model_transforms(make_run(), make_model(make_network()))


@pytest.mark.parametrize(("value", "words"), [("loftq", "is not offered"), ("gausian", "did you mean 'gaussian'")])
def test_other_initialisations_are_refused(make_run, value, words):
    with pytest.raises(ConfigError, match=words):
        LoraPlugin("lora", LoraConfig(lora_init_type=value)).configure(make_run())


def test_alpha_follows_the_rank_unless_set():
    assert Targets(("to_q",), 8).among(["to_q"], ()) == {"to_q": (8, 8.0)}
    assert Targets(("to_q",), 8, 1).among(["to_q"], ()) == {"to_q": (8, 1.0)}
