"""Features work on a family that knows none of them: LoRA, TREAD, chunked feed-forward, offload, on the toy model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import pipeline, transforms
from tuner.assembly import assemble, new_run
from tuner.blocks import StepContext
from tuner.errors import ConfigError
from tuner.model import Model, Stage
from tuner.testing.family import FamilyBench
from tuner.testing.plugin_env import importable
from tuner.testing.toy import ToyConfig, ToyPlugin, build_toy

PACKAGE = Path(__file__).parent / "package"
BLOCKS = 6
HALF = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}


@dataclass(frozen=True)
class Learnt:
    """One training forward and backward of an assembled run."""

    model: Model
    losses: Tensor
    gradients: dict[str, Tensor]
    tokens: list[int]
    """Tokens that each block saw, in order; recomputation included."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FamilyBench]:
    torch.set_num_threads(1)
    folder = build_toy(tmp_path_factory.mktemp("toy") / "model", blocks=BLOCKS)
    with importable(PACKAGE):
        yield FamilyBench(
            ToyPlugin("toy", ToyConfig()),
            {"model_family": "toy", "pretrained_model_name_or_path": str(folder)},
            (9, 64, 96),
        )


def learn(bench: FamilyBench, *extra: transforms.Transform, checkpointing: bool = True, **keys: Any) -> Learnt:
    """Assemble the config, load and edit the model as a run does, and learn from one batch."""
    assembly = assemble({**bench.settings, "lora_rank": 4, **keys})
    run, hook = new_run(assembly), assembly.manager.hook
    run.place(torch.device("cpu"), torch.float32)
    pipeline.describe(run, assembly.manager)
    model: Model = hook.load_model(run=run)
    network = model.network
    transforms.prepare(run, network, [*transforms.collect(run, model, assembly.manager), *extra])
    assert network.adapter is not None
    parameters = network.adapter.groups[0].parameters
    fill(parameters)
    tokens: list[int] = []
    for block in network.stack.blocks:
        block.register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0].shape[1]))
    routed = bool(hook.route_tokens.get_hookimpls())
    network.trampoline.context = StepContext(
        router=(lambda request: hook.route_tokens(run=run, request=request) or ()) if routed else None,
        checkpointing=checkpointing,
        residency=network.residency,
    )
    losses = hook.compute_loss(run=run, model=model, batch=bench.batch(model)).per_sample
    losses.mean().backward()
    gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
    assert len(gradients) == len(parameters)
    return Learnt(model, losses.detach(), gradients, tokens)


def fill(parameters: Any) -> None:
    """Give the adapter values: a fresh LoRA is zero, and so would be half of its gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in parameters.values():
            each.copy_(torch.randn(each.shape, generator=generator) / 10)


@pytest.fixture(scope="module")
def plain(bench: FamilyBench) -> Learnt:
    return learn(bench)


def assert_bit_equal(ours: Learnt, theirs: Learnt) -> None:
    assert torch.equal(ours.losses, theirs.losses)
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert all(torch.equal(each, theirs.gradients[name]) for name, each in ours.gradients.items())


def test_lora_adapts_every_attention(plain: Learnt) -> None:
    assert len(plain.gradients) == BLOCKS * 2 * 4 * 2  # blocks, attentions, projections, A and B
    base = [each for name, each in plain.model.network.module.named_parameters() if "lora" not in name]
    assert not any(each.requires_grad for each in base)


def test_checkpointing_changes_nothing(bench: FamilyBench, plain: Learnt) -> None:
    without = learn(bench, checkpointing=False)
    assert_bit_equal(without, plain)
    assert len(plain.tokens) == 2 * len(without.tokens)


def test_tread_routes_tokens_around_the_middle(bench: FamilyBench, plain: Learnt) -> None:
    routed = learn(bench, tread_config=HALF, checkpointing=False)
    whole = plain.tokens[0]
    assert routed.tokens == [whole, *[whole // 2] * (BLOCKS - 2), whole]
    assert not torch.equal(routed.losses, plain.losses)


def test_unloaded_tread_changes_nothing(bench: FamilyBench, plain: Learnt) -> None:
    assert_bit_equal(learn(bench, tread_config=HALF, without=["tread"]), plain)


def test_routes_are_checked_against_the_toys_blocks(bench: FamilyBench) -> None:
    outside = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": BLOCKS}]}
    with pytest.raises(ConfigError):
        learn(bench, tread_config=outside)


def test_chunked_feed_forward_gives_the_same_gradients(bench: FamilyBench, plain: Learnt) -> None:
    from tuner_chunked_ff.chunk import transform

    chunked = learn(bench, transform(16))
    torch.testing.assert_close(chunked.losses, plain.losses)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(chunked.gradients[name], gradient, msg=name)


def test_chunked_feed_forward_is_declared_for_the_toy(bench: FamilyBench) -> None:
    assembly = assemble({**bench.settings, "enable_chunked_feed_forward": True})
    run = new_run(assembly)
    run.place(torch.device("cpu"), torch.float32)
    edits = transforms.collect(run, bench.hand_over(), assembly.manager)
    assert [edit.stage for edit in edits] == [Stage.ADAPT, Stage.REWRITE]


def test_group_offload_gives_the_same_gradients(bench: FamilyBench, plain: Learnt) -> None:
    offloaded = learn(bench, enable_group_offload=True)
    assert offloaded.model.network.residency is not None
    assert_bit_equal(offloaded, plain)


def test_all_of_them_together(bench: FamilyBench) -> None:
    from tuner_chunked_ff.chunk import transform

    routed = learn(bench, tread_config=HALF)
    together = learn(bench, transform(16), tread_config=HALF, enable_group_offload=True)
    torch.testing.assert_close(together.losses, routed.losses)
    for name, gradient in routed.gradients.items():
        torch.testing.assert_close(together.gradients[name], gradient, msg=name)
