"""Group offload of Wan denoisers, plain and quantised: training is bit-equal to a resident base."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from tuner import pipeline, transforms
from tuner.assembly import assemble, new_run
from tuner.blocks import StepContext
from tuner.testing.family import FamilyBench
from tuner_offload import placement
from tuner_offload.host import HostStore
from tuner_offload.masters import make_master
from tuner_offload.parts import take_apart
from tuner_wan import WanPlugin
from tuner_wan.tiny import build_tiny

FLAVOURS = {"t2v-480p-1.3b-2.1": (9, 64, 64), "i2v-14b-2.1": (9, 64, 64), "ti2v-5b-2.2": (9, 64, 64)}
LAYERS = 5


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory):
    """A factory of benches with a tiny model of a flavour, each made once."""
    torch.set_num_threads(1)

    @cache
    def make(flavour):
        folder = build_tiny(tmp_path_factory.mktemp("wan") / flavour, flavour, layers=LAYERS)
        settings = {"model_family": "wan", "model_flavour": flavour, "pretrained_model_name_or_path": str(folder)}
        return FamilyBench(WanPlugin("wan", WanPlugin.Config()), settings, FLAVOURS[flavour])

    return make


@pytest.fixture
def learn(bench_of, new_simulator, monkeypatch):
    """Losses and gradients of some steps of an assembled config, on a device whose copies land late."""
    simulator = new_simulator()
    monkeypatch.setattr(placement, "copier_for", lambda device, use_stream: simulator)

    def steps(flavour="t2v-480p-1.3b-2.1", dtype=torch.float32, count=2, render=True, **keys):
        bench = bench_of(flavour)
        assembly = assemble({**bench.settings, "lora_rank": 4, **keys})
        run, hook = new_run(assembly), assembly.manager.hook
        run.place(torch.device("cpu"), dtype)
        pipeline.describe(run, assembly.manager)
        model = hook.load_model(run=run)
        transforms.prepare(run, model.network, transforms.collect(run, model, assembly.manager))
        network = model.network
        parameters = [each for group in network.adapter.groups for each in group.parameters.values()]
        optimizer, batch, seen = torch.optim.AdamW(parameters, lr=1e-2), bench.batch(model), []
        for _ in range(count):
            network.module.train()
            network.trampoline.context = StepContext(checkpointing=True, residency=network.residency)
            torch.manual_seed(len(seen))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                losses = hook.compute_loss(run=run, model=model, batch=copy.copy(batch)).per_sample
            losses.mean().backward()
            seen += [losses.detach(), *(each.grad.clone() for each in parameters)]
            optimizer.step()
            optimizer.zero_grad()
        if render:
            with network.inference(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                seen.append(model.predict(batch))
        return network, seen

    return steps


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(each.isfinite().all() for each in expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert any(each.abs().sum() > 0 for each in found)


@pytest.mark.parametrize(
    ("flavour", "dtype"),
    [*((flavour, torch.float32) for flavour in FLAVOURS), ("t2v-480p-1.3b-2.1", torch.bfloat16)],
)
def test_a_lora_trains_the_same(learn, flavour, dtype):
    streamed, found = learn(flavour, dtype, enable_group_offload=True, group_offload_resident_blocks=1)
    assert streamed.residency is not None
    assert_same(found, learn(flavour, dtype)[1])


def test_beside_dropout_chunks_and_rollouts(learn):
    """What is drawn, computed in parts, or computed before the step, is as it is without offload."""
    keys = {
        "lora_dropout": 0.2,
        "enable_chunked_feed_forward": True,
        "feed_forward_chunk_size": 1,
        "scheduled_sampling_max_step_offset": 2,
        "scheduled_sampling_num_inference_steps": 4,
        "scheduled_sampling_probability": 1.0,
    }
    assert_same(learn(enable_group_offload=True, **keys)[1], learn(**keys)[1])


def test_the_network_itself_trains_the_same(learn):
    streamed, found = learn(model_type="full", enable_group_offload=True)
    assert_same(found, learn(model_type="full")[1])
    assert all(master.trained for master in streamed.residency.masters)


QUANTISED = ["int4-quanto", "int8-torchao", "nf4-bnb", "fp8-scaled"]
"""One for each way of keeping a weight: two kinds of tensor subclasses, and several plain parameters."""


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_quantised_base_streams(learn, precision):
    """What a quantiser stored goes to the masters piece by piece, scales too, and computes the same from the ring."""
    streamed, found = learn(dtype=torch.bfloat16, count=1, base_model_precision=precision, enable_group_offload=True)
    assert_same(found, learn(dtype=torch.bfloat16, count=1, base_model_precision=precision)[1])
    masters = {master.buffer.untyped_storage().data_ptr() for master in streamed.residency.masters}
    for block in streamed.stack.blocks:
        for name, parameter in block.named_parameters():
            if not parameter.requires_grad:
                parts = take_apart(parameter)
                assert {each.untyped_storage().data_ptr() for each in parts.tensors} <= masters, name


def test_buffers_stream_with_their_block_and_strides_stay(learn):
    """A backend may keep what it stores in buffers, or column by column."""
    network, _ = learn(count=0, render=False)
    layer = next(each for each in network.stack.blocks[0].modules() if isinstance(each, nn.Linear))
    table = torch.randn(30, 20).t()
    layer.register_buffer("table", table)
    layer.register_buffer("small", torch.ones(3))
    network.module.requires_grad_(False)

    master = make_master(network, [(0, network.stack.blocks[0])], HostStore(pinned=False))
    (entry,) = [each for each in master.entries if each.is_buffer]
    assert entry.leaf == "table"
    assert layer.table is not table
    assert torch.equal(layer.table, table)
    assert layer.table.stride() == table.stride()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_layer_by_layer_and_from_files(learn, flavour, tmp_path):
    """... bf16 matrices that the float32 files do not hold are in files of their own."""
    keys = {"group_offload_type": "leaf_level", "group_offload_to_disk_path": str(tmp_path / "offloaded")}
    streamed, found = learn(flavour, torch.bfloat16, enable_group_offload=True, **keys)
    assert list((tmp_path / "offloaded").iterdir())
    assert_same(found, learn(flavour, torch.bfloat16)[1])
    assert len(streamed.residency.masters) >= LAYERS * 10


@pytest.mark.parametrize("precision", QUANTISED)
def test_a_quantised_base_streams_layer_by_layer_from_files(learn, precision, tmp_path):
    """The quantiser's report computes with plain weights for once; afterwards the layers stream again."""
    keys = {"dtype": torch.bfloat16, "count": 1, "base_model_precision": precision, "render": False}
    kind = {"group_offload_type": "leaf_level", "group_offload_to_disk_path": str(tmp_path)}
    streamed, found = learn(enable_group_offload=True, **keys, **kind)
    assert_same(found, learn(**keys)[1])
    layers = [each for block in streamed.stack.blocks for each in block.modules() if hasattr(each, "_tuner_leaf")]
    assert len(layers) == len(streamed.residency.masters)
    assert all("forward" in vars(each) for each in layers)
