"""LoRA on real networks: what is trained, how it starts, what it computes, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner import rng
from tuner.builtin.lora.adapter import LoraSettings, attach, check_targets
from tuner.errors import CheckpointError, ConfigError
from tuner.testing.live_bytes import LiveBytes

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def settings(rank=4, alpha=4.0, dropout=0.0, initialisation="default", targets=TARGETS):
    return LoraSettings(rank, alpha, dropout, initialisation, tuple(targets))


def attached(network, **chosen):
    rng.seed_global(7, "test")
    network.adapter = attach(network, settings(**chosen), CPU)
    return network.adapter


def test_only_float32_lora_matrices_are_trained(make_network):
    network = make_network(torch.bfloat16)
    adapter = attached(network)

    trained = {name: each for name, each in network.module.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 8 * 2  # blocks x projections x (A, B)
    assert all("lora_" in name and each.dtype == torch.float32 for name, each in trained.items())
    (group,) = adapter.groups
    assert {id(each) for each in group.parameters.values()} == {id(each) for each in trained.values()}
    assert set(adapter.state()) == {name.replace(".default", "") for name in trained}


def test_a_fresh_lora_changes_nothing(make_network, wan_inputs):
    network = make_network()
    with torch.no_grad():
        before = network.module(**wan_inputs).sample
        attached(network)
        assert torch.equal(network.module(**wan_inputs).sample, before)


def test_the_start_depends_on_the_seed_and_not_on_the_bases_dtype(make_network):
    first = attached(make_network(torch.float32)).state()
    second = attached(make_network(torch.bfloat16)).state()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    network = make_network()
    rng.seed_global(8, "test")
    other = attach(network, settings(), CPU).state()
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_gaussian_start_has_deviation_one_over_rank(make_network):
    state = attached(make_network(), rank=16, alpha=16.0, initialisation="gaussian").state()
    drawn = torch.cat([tensor.flatten() for name, tensor in state.items() if "lora_A" in name])
    assert drawn.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert drawn.abs().max() > 3 / 16  # a uniform distribution of that deviation would end at 1.7 / 16
    assert all(not tensor.any() for name, tensor in state.items() if "lora_B" in name)


def test_the_update_is_alpha_over_rank_times_b_a(make_network, randomise):
    network = make_network()
    layer_name = "blocks.1.attn2.to_v"
    weight, bias = (tensor.clone() for tensor in network.module.get_submodule(layer_name).parameters())
    state = attached(network, rank=4, alpha=10.0).state()
    randomise(state)

    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3))
    down, up = state[f"{layer_name}.lora_A.weight"], state[f"{layer_name}.lora_B.weight"]
    wanted = x.double() @ (weight + 2.5 * up.double() @ down.double()).T + bias
    torch.testing.assert_close(network.module.get_submodule(layer_name)(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_state_round_trip_is_bit_equal_in_the_same_storage(make_network, randomise):
    source = attached(make_network()).state()
    randomise(source)
    adapter = attached(make_network())
    before = {name: tensor.data_ptr() for name, tensor in adapter.state().items()}

    adapter.load({name: tensor.clone() for name, tensor in source.items()})

    for name, tensor in adapter.state().items():
        assert torch.equal(tensor, source[name])
        assert tensor.data_ptr() == before[name]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state: state.pop("blocks.0.attn1.to_k.lora_A.weight"), "blocks.0.attn1.to_k.lora_A.weight is missing"),
        (lambda state: state.update(stranger=torch.zeros(1)), "stranger is unknown"),
        (
            lambda state: state.update({"blocks.0.attn1.to_k.lora_A.weight": torch.zeros(8, 24)}),
            r"blocks.0.attn1.to_k.lora_A.weight has shape \(8, 24\), not \(4, 24\)",
        ),
    ],
)
def test_a_foreign_state_is_refused_and_nothing_is_copied(make_network, randomise, damage, words):
    adapter = attached(make_network())
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    foreign = {name: tensor.clone() for name, tensor in before.items()}
    randomise(foreign)
    damage(foreign)

    with pytest.raises(CheckpointError, match=words):
        adapter.load(foreign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())


def test_every_matrix_gets_a_gradient(make_network, wan_inputs, randomise):
    network = make_network()
    randomise(attached(network).state())
    network.module(**wan_inputs).sample.square().mean().backward()
    assert all(each.grad.abs().sum() > 0 for each in network.adapter.groups[0].parameters.values())


def test_dropout_acts_in_training_only(make_network, wan_inputs, randomise):
    network = make_network()
    randomise(attached(network, dropout=0.5).state())
    with torch.no_grad():
        network.module.train()
        assert not torch.equal(network.module(**wan_inputs).sample, network.module(**wan_inputs).sample)
        network.module.eval()
        assert torch.equal(network.module(**wan_inputs).sample, network.module(**wan_inputs).sample)


def test_under_autocast_layers_keep_one_copy_of_a_tensor_and_compute_what_pefts_own_would(make_network, randomise):
    rows, found = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16(), []
    for theirs in (True, False):
        network = make_network()
        network.module = nn.ModuleDict({name: nn.Linear(256, 8, dtype=torch.bfloat16) for name in TARGETS[:3]})
        rng.seed_global(3, "test")
        for parameter in network.module.parameters():
            nn.init.normal_(parameter)
        adapter = attached(network, targets=TARGETS[:3])
        randomise(adapter.state())
        for layer in network.module.values() if theirs else ():
            del layer._cast_input_dtype
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            out = torch.stack([layer(rows) for layer in network.module.values()])
            kept = live.live
        out.float().square().sum().backward()
        found.append((kept, out, [each.grad for each in adapter.groups[0].parameters.values()]))
    theirs, ours = found
    assert theirs[0] - ours[0] == 3 * rows.nbytes  # without them what is kept is the caller's tensor itself
    assert torch.equal(theirs[1], ours[1])
    assert all(map(torch.equal, theirs[2], ours[2]))


def test_without_autocast_a_bfloat16_base_is_adapted_as_peft_does(make_network):
    network = make_network()
    network.module = nn.ModuleDict({"to_q": nn.Linear(8, 8, dtype=torch.bfloat16)})
    attached(network, targets=("to_q",))
    assert network.module["to_q"](torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_any_module_can_be_adapted(make_network):
    network = make_network()
    network.module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Conv3d(2, 3, 3))
    state = attached(network, targets=("0", "2")).state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "0.lora_A.weight": (4, 4),
        "0.lora_B.weight": (6, 4),
        "2.lora_A.weight": (4, 2, 3, 3, 3),
        "2.lora_B.weight": (3, 4, 1, 1, 1),
    }


def test_a_quantised_base_is_adapted_and_trains(make_network, wan_inputs, randomise):
    quanto = pytest.importorskip("optimum.quanto")
    network = make_network()
    quanto.quantize(network.module, weights=quanto.qint8, include=["*attn1*", "*attn2*"])
    quanto.freeze(network.module)
    state = attached(network).state()
    randomise(state)
    layer = network.module.get_submodule("blocks.0.attn1.to_q")
    assert type(layer.get_base_layer().weight).__name__.startswith("WeightQBytes")

    network.module(**wan_inputs).sample.square().mean().backward()
    assert all(each.grad.abs().sum() > 0 for each in network.adapter.groups[0].parameters.values())


def test_a_target_that_matches_nothing_is_refused_with_the_nearest(make_network):
    network = make_network()
    with pytest.raises(ConfigError) as refusal:
        check_targets(network, ["to_q", "to_qq"])
    message = str(refusal.value)
    assert "'to_qq' matches no module of network 'transformer'" in message
    assert "did you mean 'to_q'?" in message
    assert "to_out.0" in message
    assert "net.2" in message


def test_a_target_without_a_matrix_is_refused(make_network):
    with pytest.raises(ConfigError, match="matches only RMSNorm modules"):
        check_targets(make_network(), ["norm_q"])
