"""Other models than the one that is trained: a text encoder that streams, a denoiser that makes room for the VAE."""

from __future__ import annotations

import gc
import os
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from optimum.quanto import qtypes
from torch import nn

from tuner import pipeline
from tuner.assembly import assemble
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.materialise import materialise
from tuner.model import EncodeBatch
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.testing.toy import build_toy
from tuner.testing.toy.describe import describe
from tuner.testing.toy.model import load as load_toy
from tuner.train import turns
from tuner_offload import OffloadConfig, OffloadPlugin, encoders
from tuner_offload.encoders import stream_text_encoders
from tuner_quantization import QuantoPlugin
from tuner_quantization.quanto import quantise
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny_t2v, tiny_pipeline

CAPTIONS = ("a red ball rolls slowly over a grey street", "", "rain")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Wan whose text encoder has five blocks."""
    from transformers import UMT5EncoderModel

    folder = build_tiny_t2v(tmp_path_factory.mktemp("models") / "tiny")
    config = tiny_pipeline().text_encoder.config
    config.num_layers = 5
    torch.manual_seed(0)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture
def load(base):
    """(run, model) with these core keys; quanto serves the text encoder's precision."""

    def loaded(device="cpu", dtype=torch.float32, **keys):
        run = Run(CoreConfig(pretrained_model_name_or_path=str(base), **keys), {})
        backend = QuantoPlugin("quanto", QuantoPlugin.Config())
        run.quantizer = lambda name: backend.quantizers(run)[name]
        wan = WanPlugin("wan", WanPlugin.Config())
        run.spec = wan.describe_model(run)
        run.place(torch.device(device), dtype)
        return run, wan.load_model(run)

    return loaded


@pytest.fixture
def rings(monkeypatch):
    """Every ring that is made for a text encoder."""
    found, plain = [], encoders.Ring

    def made(*args):
        found.append(plain(*args))
        return found[-1]

    monkeypatch.setattr(encoders, "Ring", made)
    return found


def storages(module):
    return {each.untyped_storage().data_ptr() for each in module.parameters()}


def encode(model):
    wan = WanPlugin("wan", WanPlugin.Config())
    with torch.no_grad():
        return [each["states"] for each in wan.encode_batch(model, EncodeBatch("text", captions=CAPTIONS))]


# The text encoder


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_a_streamed_text_encoder_gives_the_same_bits(load, precision, caplog):
    _, resident = load(text_encoder_1_precision=precision)
    run, streamed = load(text_encoder_1_precision=precision)
    stream_text_encoders(run, streamed)
    with caplog.at_level("INFO", logger="tuner"):
        found = encode(streamed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, encode(resident), strict=True))
    assert any("text_encoder streams" in line and "at any time" in line for line in caplog.messages)


def test_two_blocks_and_no_table_of_words_are_on_the_device(load, rings):
    """Every block computes in the ring's two buffers, and what stays on the host is looked up there."""
    run, model = load()
    stream_text_encoders(run, model)
    with model.use("text_encoder") as (encoder,), torch.no_grad():
        (made,) = rings
        buffers = {each.untyped_storage().data_ptr() for each in made.buffers}
        blocks = list(encoder.model.encoder.block)
        one = sum(each.nbytes for each in blocks[0].parameters())
        assert len(blocks) == 5
        assert 2 * one <= made.nbytes < 2 * one + 2 * 256 * len(list(blocks[0].parameters()))
        computed = []

        def check(block, *_):
            computed.append(block)
            assert storages(block) <= buffers

        for block in blocks:
            block.register_forward_pre_hook(check)
        encoder.model(torch.tensor([[1, 2, 3]]))
        assert computed == blocks
        assert not storages(encoder.model) & buffers, "afterwards, and the table of words at any time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_on_a_device_it_computes_there_and_leaves_its_weights_on_the_host(load, rings, precision):
    keys = {"device": "cuda", "dtype": torch.bfloat16, "text_encoder_1_precision": precision}
    _, resident = load(**keys)
    run, streamed = load(**keys)
    stream_text_encoders(run, streamed)
    with streamed.use("text_encoder") as (encoder,):
        assert encoder.model.shared.weight.is_cpu
        assert all(each.is_cpu for block in encoder.model.encoder.block for each in block.parameters())
        assert all(each.is_cuda for each in rings[-1].buffers)
        found = encode(streamed)
    for ours, theirs in zip(found, encode(resident), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("fails", [False, True])
def test_all_of_it_is_gone_after_its_phase(load, rings, fails):
    """At once: what is loaded next needs the memory and does not wait for a garbage collection."""
    run, model = load()
    stream_text_encoders(run, model)
    gc.collect()
    gc.disable()
    try:
        with model.use("text_encoder") as (encoder,):
            module = weakref.ref(encoder.model)
            kept = [weakref.ref(each) for each in rings.pop().buffers]
            if fails:
                encoder.model.encoder.block[2].register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    encoder.model(torch.tensor([[1, 2]]))
            else:
                encoder.model(torch.tensor([[1, 2]]))
            del encoder
        assert module() is None
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_a_family_that_cannot_stream_its_text_encoder_says_so(tmp_path):
    run = Run(CoreConfig(pretrained_model_name_or_path=str(build_toy(tmp_path / "toy"))), {})
    run.spec = describe(run.config)
    run.place(torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="text encoder of family 'toy' cannot be streamed"):
        stream_text_encoders(run, load_toy(run))


def settings(base, folder, **keys):
    render_clip(folder / "clips/0.mp4", width=64, height=48, frames=5, fps=16, seed=0)
    (folder / "clips/0.txt").write_text(CAPTIONS[0])
    clips = {
        "id": "clips",
        "dataset_type": "video",
        "instance_data_dir": str(folder / "clips"),
        "resolution": 48,
        "video": {"num_frames": 5},
    }
    return {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(base),
        "output_dir": str(folder / "output"),
        "mixed_precision": "no",
        "max_train_steps": 1,
        "lora_rank": 2,
        "data_backend_config": [clips, {"id": "text", "dataset_type": "text_embeds", "default": True}],
    } | keys


def test_the_key_streams_while_tuner_caches(base, tmp_path, caplog):
    """Also in ``tuner cache``, which loads no denoiser; and the entries are those of a resident encoder."""
    with caplog.at_level("INFO", logger="tuner"):
        plain = settings(base, tmp_path)
        pipeline.cache(assemble(plain | {"text_encoder_offload": True}))
        assert any("text_encoder streams" in line for line in caplog.messages)
        caplog.clear()
        pipeline.cache(assemble(plain))
    assert any("cache: 0 entries encoded" in line for line in caplog.messages), "its fingerprint is the same"


# The denoiser


def test_the_denoiser_is_away_exactly_while_the_vae_is_there(base, tmp_path, monkeypatch):
    """On the CPU moving changes nothing, so what is moved is written down."""
    events, vaes = [], []

    def back(network, device):
        assert device == torch.device("cpu")
        events.append("back" if vaes[-1]() is None else "back beside the VAE")

    monkeypatch.setattr(turns, "leave", lambda network: events.append("away"))
    monkeypatch.setattr(turns, "move", back)
    with opened(settings(base, tmp_path, enable_model_cpu_offload=True)) as session:
        assert events == [], "while caching there is no denoiser"
        model = session.model
        for _ in range(2):
            with model.use("vae"):
                vaes.append(weakref.ref(model._held["vae"]))
                events.append("decoding")
                model.decode(torch.zeros(1, 16, 2, 6, 8))
        assert events == ["away", "decoding", "back"] * 2
        with pytest.raises(ValueError, match="interrupted"), model.use("vae"):
            raise ValueError("interrupted")
        assert events[-2:] == ["away", "back"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_frozen_weights_go_and_come_back(base, tmp_path):
    with opened(settings(base, tmp_path, enable_model_cpu_offload=True)) as session:
        frozen = [name for name, each in session.model.network.module.named_parameters() if not each.requires_grad]

        def places():
            parameters = dict(session.model.network.module.named_parameters())
            return {parameters[name].device.type for name in frozen}

        before = {name: each.cpu() for name, each in session.model.network.module.named_parameters()}
        assert places() == {"cuda"}
        with session.model.use("vae") as (vae,):
            assert places() == {"cpu"}
            assert vae.device.type == "cuda"
        assert places() == {"cuda"}
        for name, each in session.model.network.module.named_parameters():
            assert torch.equal(each.cpu(), before[name]), name


def test_model_offload_of_a_trained_network_is_said(caplog):
    plugin = OffloadPlugin("offload", OffloadConfig(enable_model_cpu_offload=True))
    assert plugin.is_active(CoreConfig())
    plugin.configure(Run(CoreConfig(), {}))
    assert not caplog.messages
    plugin.configure(Run(CoreConfig(model_type="full"), {}))
    assert caplog.messages == [
        "enable_model_cpu_offload moves frozen weights; those that are trained stay on the device"
    ]


def test_a_quantised_weight_is_moved_with_all_it_is_made_of(load):
    """To the meta device, which is another one on every machine."""
    run, model = load()
    network = model.network
    materialise(network, device=run.device)
    layer = network.stack.blocks[0].attn1.to_q
    layer.weight = nn.Parameter(
        quantise(layer.weight.data, qtypes["qint8"], device=run.device, dtype=torch.float32), requires_grad=False
    )
    turns.move(network, torch.device("meta"))
    assert {layer.weight.device.type, layer.weight._data.device.type, layer.weight._scale.device.type} == {"meta"}
    assert all(each.is_meta and isinstance(each, nn.Parameter) for each in network.module.parameters())
