"""Memory while caching: the VAE sees a few frames at a time, the text encoder may be quantised."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.quanto import QLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.encoding.fingerprint import fingerprint
from tuner.config.keys import CoreConfig
from tuner.errors import PluginError
from tuner.model import EncodeBatch, Model, Sink
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.live_bytes import LiveBytes
from tuner.testing.toy import build_toy
from tuner.testing.toy.model import load as load_toy
from tuner_quantization import QuantoPlugin
from tuner_wan import WanPlugin
from tuner_wan.encode import TextEncoder, encode_clip
from tuner_wan.text_encoder import EMBEDDING, TWIN, Quantised

LONG, SHORT = 17, 9


def clip(frames: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "ti2v-5b-2.2"])
@pytest.mark.parametrize("tiled", [False, True])
def test_the_vae_never_holds_more_of_a_clip_than_it_works_on(
    flavour: str, tiled: bool, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    """Float64 stands for the device: what is brought to the VAE is a copy, and the clip is not in it."""
    keys = {"pretrained_model_name_or_path": str(flavours(flavour)), "model_flavour": flavour}
    run = new_run(plugin, **keys, vae_enable_tiling=tiled)
    peaks: dict[int, int] = {}
    with plugin.load_model(run).use("vae") as (vae,), torch.no_grad():
        vae.double()
        if tiled:
            vae.enable_tiling(32, 32, 24, 24)
        for frames in (SHORT, LONG):
            pixels = clip(frames)
            with LiveBytes(lambda tensor: tensor.dtype == torch.float64) as held:
                latents = encode_clip(vae, pixels)
            peaks[frames] = held.peak
    # Posterior of mean and variance, once more while it grows, its mode and what is made of that.
    results = 4 * latents.numel() * latents.element_size() * 2
    whole = 2 * clip(LONG).nbytes
    assert peaks[LONG] - peaks[SHORT] < results < whole / 2


@pytest.mark.parametrize("flavour", ["t2v-480p-1.3b-2.1", "ti2v-5b-2.2"])
@pytest.mark.parametrize("tiled", [False, True])
def test_pieces_give_the_bits_of_a_whole_clip(
    flavour: str, tiled: bool, flavours: Callable[[str], Path], plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    run = new_run(plugin, pretrained_model_name_or_path=str(flavours(flavour)), model_flavour=flavour)
    model = plugin.load_model(run)
    pixels = clip(9)
    with model.use("vae") as (vae,), torch.no_grad():
        if tiled:
            vae.enable_tiling(32, 32, 24, 24)
        mode = vae.encode(pixels[None]).latent_dist.mode()[0]
        (encoded,) = plugin.encode_batch(model, EncodeBatch("video", pixels=pixels[None]))
        mean, std = (torch.tensor(each).view(-1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    assert torch.equal(encoded["latents"], (mode - mean) / std)
    assert not vae.encoder._forward_pre_hooks, "nothing is left on the VAE"


# The text encoder

CAPTION = "a red ball rolls slowly over a grey street"


def states_of(encoder: TextEncoder) -> Tensor:
    inputs = encoder.tokenizer(CAPTION, return_tensors="pt")
    with torch.no_grad():
        states: Tensor = encoder.model(**inputs).last_hidden_state
    return states


def quantised(plugin: WanPlugin, new_run: Callable[..., Run], base: Path, precision: str = "int8-quanto") -> Model:
    run = new_run(plugin, pretrained_model_name_or_path=str(base), text_encoder_1_precision=precision)
    run.quantizer = lambda name: QuantoPlugin("quanto", QuantoPlugin.Config()).quantizers(run)[name]
    return plugin.load_model(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_encoder_equals_what_transformers_loads(
    dtype: torch.dtype, tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    model = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny)))
    read = replace(model.components["text_encoder"].load.__self__, dtype=dtype)  # type: ignore[attr-defined]
    theirs = UMT5EncoderModel.from_pretrained(tiny / "text_encoder", dtype=dtype)
    for encoder in (read.on_device(), read.on_host()[0]):
        ours = dict(encoder.model.named_parameters())
        for name, parameter in theirs.named_parameters():
            assert torch.equal(ours[name], parameter), name
            assert ours[name].dtype == parameter.dtype
        assert torch.equal(states_of(encoder), states_of(replace(encoder, model=theirs)))


@pytest.mark.parametrize("names", [(EMBEDDING, TWIN), (TWIN,)])
def test_the_embedding_is_found_under_either_name(
    names: tuple[str, ...], tiny: Path, tmp_path: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    tensors = load_file(tiny / "text_encoder" / "model.safetensors")
    embedding = tensors.pop(EMBEDDING)
    file = tmp_path / "umt5.safetensors"
    save_file(tensors | {name: embedding.clone() for name in names}, file)
    keys = {"pretrained_model_name_or_path": str(tiny), "pretrained_t5_model_name_or_path": str(file)}
    with plugin.load_model(new_run(plugin, **keys)).use("text_encoder") as (encoder,):
        assert torch.equal(encoder.model.encoder.embed_tokens.weight, embedding)


@pytest.mark.parametrize(("precision", "bound"), [("int8-quanto", 0.01), ("fp8-quanto", 0.04)])
def test_a_quantised_text_encoder_is_close_small_and_says_how_close(
    precision: str,
    bound: float,
    tiny: Path,
    plugin: WanPlugin,
    new_run: Callable[..., Run],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny)))
    with plain.use("text_encoder") as (encoder,):
        expected = states_of(encoder)
    model = quantised(plugin, new_run, tiny, precision)
    with caplog.at_level("INFO", logger="tuner"), model.use("text_encoder") as (encoder,):
        found = states_of(encoder)
        layers = [each for each in encoder.model.modules() if isinstance(each, nn.Linear)]
    assert len(layers) == 7
    assert all(isinstance(each, QLinear) and each.weight._data.itemsize == 1 for each in layers)
    assert 0 < (found - expected).norm() / expected.norm() < bound
    (said,) = [line for line in caplog.messages if line.startswith("text encoder in")]
    assert f"text encoder in {precision}: what its 7 quantised layers compute is off by" in said
    assert 0 < float(said.partition("off by ")[2].partition(" %")[0]) < 100 * bound


def test_another_precision_is_another_encoder_to_the_cache(
    tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    plain = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny))).components["text_encoder"]
    assert "precision" not in plain.settings, "what was cached before there was a choice stays valid"
    others = [
        quantised(plugin, new_run, tiny, name).components["text_encoder"] for name in ("int8-quanto", "fp8-quanto")
    ]
    assert len({fingerprint("text_encoder", each) for each in (plain, *others)}) == 3


def test_the_error_is_that_of_the_weights() -> None:
    """A sink that keeps every weight 3 % too large gives layers whose results are 3 % off."""
    module = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False))

    class Larger(Sink):
        def take(self, module: nn.Module, name: str, tensor: Tensor) -> bool:
            layer: Any = module.get_submodule(name.rpartition(".")[0])
            layer.weight = nn.Parameter(tensor * 1.03, requires_grad=False)
            return True

    sink = Quantised(Larger(), torch.device("cpu"))
    assert sink.error == 0
    for name, parameter in list(module.named_parameters()):
        assert sink.take(module, name, parameter.detach().clone())
    assert sink.layers == 2
    assert sink.error == pytest.approx(0.03, rel=1e-3)


def test_the_text_encoders_blocks_are_not_for_the_block_driver(
    tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    component = plugin.load_model(new_run(plugin, pretrained_model_name_or_path=str(tiny))).components["text_encoder"]
    assert component.on_host is not None
    encoder, network = component.on_host()
    assert network.module is encoder.model
    assert list(network.stack.blocks) == list(encoder.model.encoder.block)
    assert network.spec.blocks == len(network.stack.blocks)
    with pytest.raises(PluginError, match="runs its blocks itself"):
        network.stack.embed()


def test_the_key_alone_quantises_while_a_run_caches(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    render_clip(tmp_path / "clips/0.mp4", width=64, height=48, frames=5, fps=16, seed=0)
    (tmp_path / "clips/0.txt").write_text(CAPTION)
    clips = {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": str(tmp_path / "clips"),
        "resolution": 48,
        "video": {"num_frames": 5},
    }
    config = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(tiny),
        "output_dir": str(tmp_path / "output"),
        "mixed_precision": "no",
        "max_train_steps": 1,
        "text_encoder_1_precision": "int8-quanto",
        "data_backend_config": [clips, {"id": "text", "dataset_type": "text_embeds", "default": True}],
    }
    with caplog.at_level("INFO", logger="tuner"):
        pipeline.cache(assemble(config))
    assert any(line.startswith("text encoder in int8-quanto") for line in caplog.messages)


def test_a_quantised_text_encoder_is_gone_after_its_phase(
    tiny: Path, plugin: WanPlugin, new_run: Callable[..., Run]
) -> None:
    run = new_run(plugin, pretrained_model_name_or_path=str(tiny), text_encoder_1_precision="int8-quanto")
    backend = QuantoPlugin("quanto", QuantoPlugin.Config())
    run.quantizer = lambda name: backend.quantizers(run)[name]
    model = plugin.load_model(run)
    with model.use("text_encoder") as (encoder,):
        layer = weakref.ref(encoder.model.encoder.block[0].layer[0].SelfAttention.q)
        assert layer() is not None
    del encoder
    gc.collect()
    assert layer() is None


def test_a_family_that_does_not_quantise_its_text_encoder_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build_toy(tmp_path / "toy")
    run = Run(CoreConfig(pretrained_model_name_or_path=str(base), text_encoder_1_precision="int8-quanto"), {})
    run.place(torch.device("cpu"), torch.float32)
    load_toy(run)
    assert any("text_encoder_1_precision has no effect" in line for line in caplog.messages)
