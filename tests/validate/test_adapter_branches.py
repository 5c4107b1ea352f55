"""Adapters beside the layers compute what they would inside the weights, and at strength 0 the base."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tuner.builtin.adapter_file import AdapterFile, Update, low_rank
from tuner.builtin.sampling.branches import Strength, attach
from tuner.config.keys import CoreConfig
from tuner.errors import CheckpointError
from tuner.materialise import materialise
from tuner.model import Network
from tuner.run import Run
from tuner_kernels import block as kernels
from tuner_wan import WanPlugin, lean
from tuner_wan.tiny import build_tiny_t2v

torch.set_num_threads(1)
CPU = torch.device("cpu")
MATRIX, KERNEL, NORM, QUERY_NORM = "blocks.0.attn1.to_q", "patch_embedding", "blocks.1.norm2", "blocks.1.attn1.norm_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_t2v(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def network(folder: Path) -> Network:
    """The denoiser in float32."""
    plugin = WanPlugin("wan", WanPlugin.Config())
    run = Run(CoreConfig(pretrained_model_name_or_path=str(folder)), {})
    run.spec = plugin.describe_model(run)
    run.place(CPU, torch.float32)
    found = plugin.load_model(run).network
    materialise(found, device=CPU)
    found.module.eval()
    return found


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 3, 4, 6, generator=draw), torch.randn(1, 5, 16, generator=draw)
    given: Tensor = module(latents, torch.tensor([500.0]), text, return_dict=False)[0]
    return given


def drawn(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def lora(weight: Tensor) -> Update:
    return low_rank(drawn(3, *weight.shape[1:]), drawn(weight.shape[0], 3, *[1] * (weight.ndim - 2), seed=1), 6.0)


def with_core(weight: Tensor) -> Update:
    rows, columns, *kernel = weight.shape
    factors = {"lora_down": drawn(2, columns, 1, 1, 1), "lora_up": drawn(rows, 2, 1, 1, 1, seed=1)}
    return Update({**factors, "lora_mid": drawn(2, 2, *kernel, seed=2, scale=1.0)})


def loha(weight: Tensor) -> Update:
    rows, columns = weight.shape
    shapes = {"hada_w1_a": (rows, 2), "hada_w1_b": (2, columns), "hada_w2_a": (rows, 2), "hada_w2_b": (2, columns)}
    return Update({name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}, 3.0)


def lokr(weight: Tensor) -> Update:
    return Update({"lokr_w1": drawn(4, 4), "lokr_w2": drawn(weight.shape[0] // 4, weight.shape[1] // 4, seed=1)})


def difference(weight: Tensor) -> Update:
    return Update({"diff": drawn(*weight.shape)})


def dora_of_rows(weight: Tensor) -> Update:
    low = lora(weight)
    return Update(low.tensors, low.alpha, dora_scale=1 + drawn(weight.shape[0], *[1] * (weight.ndim - 1), seed=3))


def dora_of_columns(weight: Tensor) -> Update:
    low = lora(weight)
    return Update(low.tensors, low.alpha, dora_scale=1 + drawn(1, weight.shape[1], seed=3))


@pytest.mark.parametrize(
    ("module", "make"),
    [
        *((MATRIX, make) for make in (lora, loha, lokr, difference, dora_of_rows, dora_of_columns)),
        *((KERNEL, make) for make in (lora, with_core, difference, dora_of_rows)),
        (NORM, difference),
        (QUERY_NORM, difference),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_branch_is_the_update_inside_the_weight(
    module: str, make: Callable[[Tensor], Update], network: Network
) -> None:
    layer = network.module.get_submodule(module)
    weight = layer.get_parameter("weight").detach()
    update = make(weight)
    with_bias = {module: drawn(weight.shape[0], seed=5)} if getattr(layer, "bias", None) is not None else {}
    merged = deepcopy(network.module)
    with torch.no_grad():
        target = merged.get_submodule(module)
        target.get_parameter("weight").add_(update.delta(weight.shape, base=weight) * 0.7)
        for bias in with_bias.values():
            target.get_parameter("bias").add_(bias * 0.7)
    bare, expected = output(network.module), output(merged)
    strength = Strength()
    attach(network, [(AdapterFile({module: update}, with_bias), 1.4)], strength, CPU)
    strength.value = 0.5
    torch.testing.assert_close(output(network.module), expected, rtol=1e-4, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3
    strength.value = 0.0
    assert torch.equal(output(network.module), bare)
    assert torch.equal(layer.get_parameter("weight"), weight), "the base is never changed"


def test_two_files_change_one_norm_and_it_is_put_back(network: Network) -> None:
    norm = network.module.get_submodule(QUERY_NORM)
    weight, bare = norm.get_parameter("weight"), output(network.module)
    files = [(AdapterFile({QUERY_NORM: Update({"diff": drawn(*weight.shape, seed=seed)})}), 1.0) for seed in (1, 2)]
    merged = deepcopy(network.module)
    with torch.no_grad():
        for seed in (1, 2):
            merged.get_parameter(f"{QUERY_NORM}.weight").add_(drawn(*weight.shape, seed=seed))
    strength = Strength()
    attach(network, files, strength, CPU)
    torch.testing.assert_close(output(network.module), output(merged), rtol=1e-4, atol=1e-5)
    assert norm.get_parameter("weight") is weight
    strength.value = 0.0
    assert torch.equal(output(network.module), bare)


@pytest.mark.parametrize("rewrite", [kernels.install, lean.install], ids=["fused", "lean"])
def test_blocks_that_are_computed_otherwise_take_them_too(
    rewrite: Callable[[nn.Module], None], network: Network
) -> None:
    updates = {}
    for module, make in ((MATRIX, lora), (NORM, difference), (QUERY_NORM, difference)):
        updates[module] = make(network.module.get_submodule(module).get_parameter("weight").detach())
    merged = deepcopy(network.module)
    with torch.no_grad():
        for module, update in updates.items():
            weight = merged.get_submodule(module).get_parameter("weight")
            weight.add_(update.delta(weight.shape))
    bare, expected = output(network.module), output(merged)
    strength = Strength()
    attach(network, [(AdapterFile(updates), 1.0)], strength, CPU)
    for block in network.stack.blocks:
        rewrite(block)
    torch.testing.assert_close(output(network.module), expected, rtol=1e-4, atol=1e-5)
    strength.value = 0.0
    torch.testing.assert_close(output(network.module), bare, rtol=1e-4, atol=1e-5)


def test_several_files_add_up(network: Network) -> None:
    weight = network.module.get_parameter(f"{MATRIX}.weight").detach()
    updates = [lora(weight), lokr(weight)]
    merged = deepcopy(network.module)
    with torch.no_grad():
        for update, share in zip(updates, (1.0, -0.5), strict=True):
            merged.get_parameter(f"{MATRIX}.weight").add_(update.delta(weight.shape) * share)
    files = [(AdapterFile({MATRIX: update}), share) for update, share in zip(updates, (1.0, -0.5), strict=True)]
    attach(network, files, Strength(), CPU)
    torch.testing.assert_close(output(network.module), output(merged), rtol=1e-4, atol=1e-5)


def test_a_module_that_is_not_there(network: Network) -> None:
    file = AdapterFile({"blocks.9.attn1.to_q": lora(torch.zeros(24, 24))})
    with pytest.raises(CheckpointError, match=r"no module 'blocks.9.attn1.to_q'"):
        attach(network, [(file, 1.0)], Strength(), CPU)
