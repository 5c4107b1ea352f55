"""Products in 8 bits: exact for what was quantised, near what was not, in forward and in the gradient of the input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional

import tuner_quantization
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.testing.clips import render_clip
from tuner.testing.opened import opened
from tuner.testing.project import flat_config, video_entry
from tuner.train.step import train_step
from tuner_quantization import ProductsPlugin
from tuner_quantization.products import Fp8Products, Int8Products, ProductLinear, int8_rows
from tuner_wan.tiny import build_tiny_t2v

CODECS = {"int8-products": Int8Products(), "fp8-products": Fp8Products()}
ROUNDED = {"int8-products": 0.012, "fp8-products": 0.04}
"""Relative error of a product of normally distributed matrices, both quantised, at most."""


def layer(precision: str, inputs: int = 96, outputs: int = 80) -> tuple[ProductLinear, Tensor]:
    """A layer with a bias, and its weight (out, in) as it was."""
    torch.manual_seed(0)
    plain = nn.Linear(inputs, outputs).requires_grad_(False)
    weight = plain.weight.clone()
    made = ProductLinear(plain, CODECS[precision])
    made.store(weight, torch.device("cpu"))
    return made, weight


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("precision", CODECS)
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 5, 7)], ids=str)
def test_both_products_are_near_the_exact_ones(precision: str, shape: tuple[int, ...]) -> None:
    made, weight = layer(precision)
    rows = (torch.randn(*shape, 96) * torch.logspace(-3, 2, 96)[torch.randperm(96)][0]).requires_grad_(True)
    gradient = torch.randn(*shape, 80)
    made(rows).backward(gradient)
    exact = rows.detach().double() @ weight.double().t() + made.bias.double()
    assert distance(made(rows).detach() - made.bias, exact - made.bias.double()) < ROUNDED[precision]
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape
    assert distance(rows.grad, gradient.double() @ weight.double()) < ROUNDED[precision]
    assert all(not parameter.requires_grad for parameter in made.parameters())


def test_what_was_quantised_is_multiplied_exactly() -> None:
    made, _ = layer("int8-products")
    rows = torch.randn(50, 96, requires_grad=True)
    small, scales = int8_rows(rows.detach())
    weight = made.weight.double() * made.weight_scale.double()
    result = made(rows)
    torch.testing.assert_close(
        result.double(), (small.double() * scales.double()) @ weight.t() + made.bias.double(), rtol=1e-5, atol=1e-6
    )
    gradient = torch.randn(50, 80)
    result.backward(gradient)
    folded, own = int8_rows(gradient * made.weight_scale.t())
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.double(), (folded.double() * own.double()) @ made.weight.double())


@pytest.mark.parametrize("precision", CODECS)
def test_rows_of_zeros_and_outliers(precision: str) -> None:
    """A row with one huge value loses its small ones, and no other row's; zeros give zeros."""
    made, weight = layer(precision)
    rows = torch.randn(4, 96)
    rows[1] = 0
    rows[2, 5] = 1e4
    result = made(rows) - made.bias
    assert not result[1].any()
    assert torch.isfinite(result).all()
    exact = rows.double() @ weight.double().t()
    assert distance(result[[0, 3]], exact[[0, 3]]) < ROUNDED[precision]
    assert distance(result[2], exact[2]) < ROUNDED[precision]


def lora_gradients(precision: str | None) -> Tensor:
    """Gradients of a LoRA r16 on the attention of one block of Wan 1.3B's width, as one vector."""
    torch.manual_seed(0)
    block = WanTransformerBlock(1536, 8960, 12, "rms_norm_across_heads", True, 1e-6).requires_grad_(False)
    if precision is not None:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                made = ProductLinear(module, CODECS[precision])
                made.store(module.weight.detach().clone(), torch.device("cpu"))
                block.set_submodule(name, made)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=16, target_modules=targets), block)
    trained = {name: each for name, each in block.named_parameters() if "lora_" in name}
    torch.manual_seed(1)
    for parameter in trained.values():
        parameter.data = torch.randn(parameter.shape) * 0.02
        parameter.requires_grad_(True)
    angles = torch.randn(1, 48, 1, 64).repeat_interleave(2, -1)
    tokens, text = torch.randn(1, 48, 1536), torch.randn(1, 512, 1536)
    result = block(tokens, text, 0.1 * torch.randn(1, 6, 1536), (angles.cos(), angles.sin()))
    functional.mse_loss(result, torch.randn_like(result)).backward()
    return torch.cat([each.grad.flatten() for each in trained.values() if each.grad is not None])


@pytest.mark.parametrize("precision", CODECS)
def test_gradients_of_a_lora_at_wans_width_point_where_they_did(precision: str) -> None:
    with torch.random.fork_rng():
        exact, found = lora_gradients(None), lora_gradients(precision)
    least = {"int8-products": 0.999, "fp8-products": 0.996}[precision]
    assert functional.cosine_similarity(exact, found, dim=0) > least


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("products")
    build_tiny_t2v(place / "model", layers=4)
    render_clip(place / "clips" / "a circle.mp4", width=32, height=32, frames=5, fps=16, seed=0)
    return place


def trained(folder: Any, precision: str, **keys: Any) -> list[float]:
    """Losses of three steps."""
    entry = video_entry(folder / "clips", resolution=32, frames=5)
    settings = flat_config(folder, entry, family="wan", base_model_precision=precision, learning_rate=1e-2, **keys)
    with opened(settings) as session:
        losses = []
        for _ in range(3):
            losses.append(float(train_step(session).loss))
            session.run.step += 1
    return losses


@pytest.mark.parametrize("precision", CODECS)
def test_it_trains_wherever_the_weights_are(folder: Any, precision: str) -> None:
    plain = trained(folder, precision)
    assert plain != trained(folder, "no_change")
    assert trained(folder, precision, enable_group_offload=True) == plain
    assert trained(folder, precision, gradient_checkpointing="selective", fused_blocks=True) == pytest.approx(
        plain, rel=0.02
    )


@pytest.mark.parametrize(
    ("precision", "own", "needed"), [("int8-products", (7, 5), "8.0"), ("fp8-products", (8, 6), "8.9")]
)
def test_a_device_that_has_no_such_product_is_refused(
    monkeypatch: pytest.MonkeyPatch, precision: str, own: tuple[int, int], needed: str
) -> None:
    monkeypatch.setattr(tuner_quantization, "_capability", lambda: own)
    plugin = ProductsPlugin("products", ProductsPlugin.Config())
    run = Run(CoreConfig(base_model_precision=precision), {})
    with pytest.raises(ConfigError, match=f"needs compute capability {needed}") as caught:
        plugin.configure(run)
    assert "fp8-scaled" in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", CODECS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 333])
def test_a_gpu_gives_what_the_cpu_gives(precision: str, tokens: int) -> None:
    made, _ = layer(precision, 256, 128)
    rows, gradient = torch.randn(tokens, 256), torch.randn(tokens, 128)
    found = []
    for device in ("cpu", "cuda"):
        made.to(device)
        own = rows.to(device).requires_grad_(True)
        result = made(own)
        result.backward(gradient.to(device))
        assert own.grad is not None
        found.append((result.detach().cpu(), own.grad.cpu()))
    for cpu, cuda in zip(*found, strict=True):
        assert distance(cuda, cpu) < 5e-3
