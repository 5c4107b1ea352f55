"""Parts of the model that come as single files, in diffusers' names and in those of Wan's own code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.errors import ModelError
from tuner.model import EncodeBatch
from tuner.run import Run
from tuner_wan import WanPlugin
from tuner_wan.flavours import FLAVOURS
from tuner_wan.names import TEXT_BLOCK_MODULES, TEXT_MODULES

NewRun = Callable[..., Run]


def encoded(plugin: WanPlugin, run: Run, batch: EncodeBatch) -> dict[str, Tensor]:
    with torch.no_grad():
        (found,) = plugin.encode_batch(model=plugin.load_model(run), batch=batch)
    return found


def original_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that Wan's own UMT5 gives: built from the table read backwards, block by block."""
    inside = {ours: theirs for theirs, ours in TEXT_BLOCK_MODULES}
    outside = {ours: theirs for theirs, ours in TEXT_MODULES}
    named = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"encoder\.block\.(\d+)\.(.*)", module)
        if block:
            named[f"blocks.{block[1]}.{inside[block[2]]}.{leaf}"] = tensor
        elif module in outside:
            named[f"{outside[module]}.{leaf}"] = tensor
    return named


@pytest.mark.parametrize("names", ["transformers", "original"])
def test_the_text_encoder_may_be_one_file(
    names: str, tiny: Path, tmp_path: Path, plugin: WanPlugin, new_run: NewRun
) -> None:
    tensors = load_file(tiny / "text_encoder" / "model.safetensors")
    save_file(original_text(tensors) if names == "original" else tensors, tmp_path / "umt5.safetensors")
    batch = EncodeBatch("text", captions=("a red ball rolls",))
    base = {"pretrained_model_name_or_path": str(tiny)}
    expected = encoded(plugin, new_run(plugin, **base), batch)
    run = new_run(plugin, **base, pretrained_t5_model_name_or_path=str(tmp_path / "umt5.safetensors"))
    assert torch.equal(encoded(plugin, run, batch)["states"], expected["states"])


def test_the_vae_may_be_one_file(tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    file = tiny / "vae" / "diffusion_pytorch_model.safetensors"
    batch = EncodeBatch("video", pixels=torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    base = {"pretrained_model_name_or_path": str(tiny)}
    expected = encoded(plugin, new_run(plugin, **base), batch)
    run = new_run(plugin, **base, pretrained_vae_model_name_or_path=str(file))
    assert torch.equal(encoded(plugin, run, batch)["latents"], expected["latents"])


@pytest.mark.parametrize(
    ("key", "part"),
    [("pretrained_vae_model_name_or_path", "text_encoder"), ("pretrained_t5_model_name_or_path", "vae")],
)
def test_a_file_of_another_part_is_refused(key: str, part: str, tiny: Path, plugin: WanPlugin, new_run: NewRun) -> None:
    file = next((tiny / part).glob("*.safetensors"))
    run = new_run(plugin, pretrained_model_name_or_path=str(tiny), **{key: str(file)})
    batch: dict[str, Any] = {
        "pretrained_vae_model_name_or_path": EncodeBatch("video", pixels=torch.zeros(1, 3, 1, 32, 32)),
        "pretrained_t5_model_name_or_path": EncodeBatch("text", captions=("x",)),
    }
    with pytest.raises(ModelError, match=r"does not (fit|have)(.|\n)*where: +" + str(file)):
        encoded(plugin, run, batch[key])


def test_weights_of_another_flavour_are_refused_before_anything_is_encoded(
    tiny: Path, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: NewRun
) -> None:
    """A text-to-video file for an image-to-video model: the first differing tensors are named."""
    run = new_run(
        plugin,
        pretrained_model_name_or_path=str(flavours("i2v-14b-2.1")),
        pretrained_transformer_model_name_or_path=str(tiny / "transformer" / "diffusion_pytorch_model.safetensors"),
        model_flavour="i2v-14b-2.1",
    )
    with pytest.raises(ModelError) as caught:
        plugin.load_model(run)
    assert "tensors differ" in str(caught.value)
    assert "condition_embedder.image_embedder" in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FLAVOURS if not name.endswith(("-low", "-high"))])
def test_the_networks_of_every_flavour_equal_diffusers_own(
    name: str, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: NewRun
) -> None:
    from diffusers import WanTransformer3DModel

    from tuner.materialise import materialise

    base = flavours(name)
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(base), model_flavour=name))
    assert list(model.networks) == [network.name for network in model.spec.networks]
    for network in model.networks.values():
        materialise(network, device=torch.device("cpu"))
        reference = WanTransformer3DModel.from_pretrained(base, subfolder=network.name).state_dict()
        ours = network.module.state_dict()
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[key], reference[key]) for key in ours)


def test_the_image_encoder_is_loaded_whole(flavours: Callable[[str], Path], plugin: WanPlugin, new_run: NewRun) -> None:
    base = flavours("i2v-14b-2.1")
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(base)))
    saved = load_file(base / "image_encoder" / "model.safetensors")
    with model.use("image_encoder") as (encoder,):
        held = encoder.model.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in saved.items())
    assert {path.name for path in model.components["image_encoder"].files} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }


def original_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of Wan's own VAE: blocks counted through, layers by their place in a sequence."""
    layers = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    layers |= {"conv_shortcut": "shortcut"}

    def renamed(name: str) -> str:
        for ours, theirs in (("quant_conv.", "conv1."), ("post_quant_conv.", "conv2.")):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        name = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda found: f".{layers[found[1]]}.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}", name)
        name = name.replace("mid_block.attentions.0", "middle.1").replace("encoder.down_blocks", "encoder.downsamples")
        # Each of the decoder's four groups has three residual blocks, and all but the last an upsampler.
        name = re.sub(
            r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{4 * int(found[1]) + int(found[2])}", name
        )
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{4 * int(found[1]) + 3}", name)
        for ours, theirs in (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2")):
            name = name.replace(f"coder.{ours}.", f"coder.{theirs}.")
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def test_a_vae_in_the_original_names_loads(tiny: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    from tuner_wan.components import load_vae
    from tuner_wan.sources import Part

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    vae.save_pretrained(tmp_path / "vae")
    tensors = original_vae(vae.state_dict())
    assert "encoder.middle.0.residual.0.gamma" in tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "wan_vae.safetensors")
    beside = Part("vae", "key", str(tmp_path), "vae", None, tmp_path / "vae")
    part = Part("vae", "key", "file", "vae", None, None, tmp_path / "wan_vae.safetensors", beside)
    held = load_vae(part, torch.device("cpu")).state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in vae.state_dict().items())
