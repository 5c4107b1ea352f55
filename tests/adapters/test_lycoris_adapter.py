"""LyCORIS adapters on the real tiny Wan: what they compute, how they train, and that they go with the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner import rng
from tuner.errors import CheckpointError

pytest.importorskip("lycoris")
from tuner_lycoris.adapter import attach, tree, updates
from tuner_lycoris.settings import read
from tuner_lycoris.targets import choose

BLOCKS = {"target_module": ["WanAttention", "FeedForward"]}
KINDS = {
    "lokr, whole": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 4},
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 5, "factor": 3},
    "lokr, halved": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 3, "decompose_both": True},
    "lokr, other way": {"algo": "lokr", "linear_dim": 2, "factor": 3, "unbalanced_factorization": True},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 10},
    "locon": {"algo": "locon", "linear_dim": 4, "linear_alpha": 10},
    "locon, square root": {"algo": "lora", "linear_dim": 4, "linear_alpha": 10, "rs_lora": True},
    "locon, scalar": {"algo": "lora", "linear_dim": 4, "use_scalar": True},
    "full": {"algo": "full"},
    "multiplied": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2, "multiplier": 0.5},
}


def attached(network, settings, *, seed=0):
    settings = read({"apply_preset": BLOCKS, **settings})
    rng.seed_global(seed, "test")
    chosen = choose(tree(network.module), settings, network.name)
    network.adapter = attach(network, chosen, settings, torch.device("cpu"))
    return network.adapter


def delta(tensors, shape):
    """The update that a file's tensors stand for, in float64, as the formats are defined."""
    found = {name: tensor.double() for name, tensor in tensors.items()}
    if "diff" in found:
        return found["diff"]
    ranks = [tensor.shape[1] for name, tensor in found.items() if name in ("lokr_w1_a", "lokr_w2_a", "hada_w1_a")]
    if "lora_up.weight" in found:
        up, down = found["lora_up.weight"], found["lora_down.weight"]
        matrix, ranks = up.flatten(1) @ down.flatten(1), [down.shape[0]]
    elif "hada_w1_a" in found:
        matrix = (found["hada_w1_a"] @ found["hada_w1_b"]) * (found["hada_w2_a"] @ found["hada_w2_b"])
    else:
        halves = [
            found[f"lokr_{half}"] if f"lokr_{half}" in found else found[f"lokr_{half}_a"] @ found[f"lokr_{half}_b"]
            for half in ("w1", "w2")
        ]
        matrix = torch.kron(halves[0], halves[1].flatten(1))
    return (matrix * (found["alpha"] / ranks[0] if ranks else 1)).reshape(shape)


@torch.no_grad()
def merged(network, base):
    """``base``, a network like ``network`` before it was adapted, in float64 with every update in its weights."""
    module = base.module.double()
    for name, update in updates(network.module).items():
        layer = module.get_submodule(name)
        tensors = update.factors.exported(update.settings.multiplier)
        layer.weight += delta(tensors, layer.weight.shape)
        if "diff_b" in tensors:
            layer.bias += tensors["diff_b"].double()
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_computes_with_its_weights_and_the_files_update(make_network, wan_inputs, randomise, kind):
    network = make_network()
    randomise(attached(network, KINDS[kind]).state())
    assert len(updates(network.module)) == 20
    with torch.no_grad():
        base = make_network().module(**wan_inputs).sample
        live = network.module(**wan_inputs).sample
        wanted = merged(network, make_network())
        for block in range(2):
            for name in ("attn1.to_q", "attn2.to_v", "ffn.net.0.proj", "ffn.net.2"):
                name = f"blocks.{block}.{name}"
                layer, expected = network.module.get_submodule(name), wanted.get_submodule(name)
                rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(3))
                torch.testing.assert_close(layer(rows).double(), expected(rows.double()), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(live, wanted.float()(**wan_inputs).sample, atol=2e-4, rtol=1e-4)
    assert (live - base).abs().max() > 1e-2


@pytest.mark.parametrize("algo", ["lokr", "loha", "locon", "full"])
@pytest.mark.parametrize("tucker", [False, True])
def test_convolutions_are_adapted(algo, tucker):
    module = nn.Sequential(nn.Conv3d(4, 6, 3, stride=2, padding=1), nn.Conv3d(6, 4, (1, 2, 2)))
    settings = read({"algo": algo, "linear_dim": 2, "linear_alpha": 3, "use_tucker": tucker, "factor": 2})
    weights = {name: each.detach().double().clone() for name, each in module.named_parameters()}
    chosen = choose(tree(module), settings, "x")
    assert len(chosen) == 2
    network = type("Plain", (), {"module": module, "name": "x"})()
    adapter = attach(network, chosen, settings, torch.device("cpu"))
    with torch.no_grad():
        for each in adapter.state().values():
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)))
        pixels = torch.randn(1, 4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
        expected = pixels.double()
        for index, layer in enumerate(module):
            factors = layer.lycoris.factors
            tensors = factors.exported(1.0)
            plain = not {"lora_mid.weight", "hada_t1", "lokr_t2"} & set(tensors)
            weight = delta(tensors, layer.weight.shape) if plain else factors.weight(torch.float64)
            bias = weights[f"{index}.bias"] + tensors.get("diff_b", torch.zeros(1)).double()
            weight = weight + weights[f"{index}.weight"]
            expected = nn.functional.conv3d(expected, weight, bias, layer.stride, layer.padding)
        torch.testing.assert_close(module(pixels).double(), expected, atol=1e-4, rtol=1e-4)


def test_training_starts_at_the_base_and_the_start_is_a_matter_of_the_seed(make_network, wan_inputs):
    for kind in KINDS.values():
        network, again, other = make_network(), make_network(torch.bfloat16), make_network()
        states = [attached(each, kind, seed=seed).state() for each, seed in ((network, 0), (again, 0), (other, 1))]
        with torch.no_grad():
            assert torch.equal(network.module(**wan_inputs).sample, make_network().module(**wan_inputs).sample)
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert all(tensor.dtype == torch.float32 for state in states for tensor in state.values())
        if kind["algo"] != "full":
            assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_gets_a_gradient_and_the_base_none(make_network, wan_inputs, randomise, kind):
    network = make_network()
    randomise(attached(network, KINDS[kind]).state())
    network.module(**wan_inputs).sample.square().mean().backward()
    trained = network.adapter.groups[0].parameters
    assert all(each.grad.abs().sum() > 0 for each in trained.values())
    mine = {id(each) for each in trained.values()}
    assert not [name for name, each in network.module.named_parameters() if each.requires_grad and id(each) not in mine]


def test_small_updates_count_on_a_bf16_base(make_network, randomise):
    """Added to bf16 weights, an update of a thousandth of them would round to nothing."""
    network = make_network(torch.bfloat16)
    state = attached(network, {"algo": "lokr", "linear_dim": 10000, "factor": 4}).state()
    randomise(state)
    for tensor in state.values():
        tensor.mul_(0.02)
    layer = network.module.get_submodule("blocks.0.attn1.to_q")
    update = layer.lycoris.factors
    rows = torch.randn(64, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        found, wanted = update.update(rows).double(), rows.double() @ delta(update.exported(1.0), (24, 24)).T
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_state_round_trip_is_bit_equal_in_the_same_storage(make_network, randomise, wan_inputs):
    settings = KINDS["locon, scalar"]
    source, network = make_network(), make_network()
    randomise(attached(source, settings).state())
    adapter = attached(network, settings, seed=1)
    before = {name: tensor.data_ptr() for name, tensor in adapter.state().items()}
    adapter.load({name: tensor.clone() for name, tensor in source.adapter.state().items()})
    assert {name: tensor.data_ptr() for name, tensor in adapter.state().items()} == before
    with torch.no_grad():
        assert torch.equal(network.module(**wan_inputs).sample, source.module(**wan_inputs).sample)
    with pytest.raises(CheckpointError, match="LyCORIS of network 'transformer'"):
        adapter.load({})


@pytest.mark.parametrize("kind", ["lokr", "full"])
def test_switched_off_the_network_is_its_base(make_network, wan_inputs, randomise, kind):
    network = make_network()
    randomise(attached(network, KINDS[kind]).state())
    with torch.no_grad():
        live, base = network.module(**wan_inputs).sample, make_network().module(**wan_inputs).sample
        with network.base():
            assert torch.equal(network.module(**wan_inputs).sample, base)
        assert torch.equal(network.module(**wan_inputs).sample, live)
    assert all(each.requires_grad for each in network.adapter.groups[0].parameters.values())


@pytest.mark.parametrize("key", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_act_in_training_only(make_network, wan_inputs, randomise, key):
    network = make_network()
    randomise(attached(network, {"algo": "lokr", "linear_dim": 2, key: 0.5, "rank_dropout_scale": True}).state())
    with torch.no_grad():
        network.module.train()
        assert not torch.equal(network.module(**wan_inputs).sample, network.module(**wan_inputs).sample)
        network.module.eval()
        assert torch.equal(network.module(**wan_inputs).sample, network.module(**wan_inputs).sample)


def test_rank_dropout_leaves_out_rows_of_the_update(make_network, randomise):
    network = make_network()
    randomise(attached(network, {"algo": "loha", "linear_dim": 2, "rank_dropout": 0.5}).state())
    layer = network.module.get_submodule("blocks.0.attn1.to_q").train()
    rows = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        update, whole = layer(rows) - layer.eval()(rows), nn.functional.linear(rows, layer.weight, layer.bias)
    left_out = (update + (layer(rows) - whole)).abs().amax(dim=0) < 1e-6  # an output is the base's alone, or whole
    kept = update.abs().amax(dim=0) < 1e-6
    assert (left_out ^ kept).all()
    assert 0 < left_out.sum() < 24


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cuda_device_it_computes_what_it_does_on_the_cpu(make_network, wan_inputs, randomise, kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network = make_network()
    randomise(attached(network, KINDS[kind]).state())
    with torch.no_grad():
        expected = network.module(**wan_inputs).sample
    network.module.cuda()
    inputs = {name: each.cuda() for name, each in wan_inputs.items()}
    found = network.module(**inputs).sample
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        network.module(**inputs).sample.square().mean().backward()
    assert all(each.grad.isfinite().all() for each in network.adapter.groups[0].parameters.values())


def test_the_library_prints_nothing(make_network, capfd):
    attached(make_network(), {"algo": "lokr", "linear_dim": 9999, "factor": 6})
    assert capfd.readouterr().out == ""
