"""Precision x adapter x feature: a tiny Wan trained with every set of features that the compatibility page marks.

What only moves or recomputes changes nothing: losses and gradient norms of two steps are those of the same precision,
adapter and routes without it. A precision changes the loss by as much as its error allows, and by something.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tuner_chunked_ff
from tuner.testing.compatibility import (
    FEATURES,
    LOSSES,
    MEMORY,
    MORE_OPTIMIZERS,
    OPTIMIZERS,
    PRECISIONS,
    Bench,
    trained_together,
)
from tuner.testing.opened import opened
from tuner.train import state
from tuner.train.session import Session
from tuner.train.step import train_step
from tuner_wan.tiny import build_tiny

STEPS = 2
LAYERS = 3
BY_BITS = {"8": 0.01, "4": 0.06}
"""Share of the loss that quantised weights may change it by, at most."""
EXACT = 1e-5
BFLOAT16 = 1e-2
SAME = {each.name for each in MEMORY}
"""Features that change nothing of what is computed."""
CHANGING = {each.name for each in LOSSES}
"""Features that change what is trained."""
NAMES = {each.name for each in (*OPTIMIZERS, *MORE_OPTIMIZERS)}
ALL = {**FEATURES, **{each.name: each for each in MORE_OPTIMIZERS}}


@dataclass(frozen=True)
class Trained:
    """What some steps came to."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    changed: int
    """trained tensors that the steps changed"""
    tensors: int


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("matrix")
    build_tiny(folder / "model", layers=LAYERS, heads=2, head_dim=64, ffn_dim=256)
    base = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(folder / "model"),
        "mixed_precision": "no",
        "learning_rate": 1e-2,
        "lora_rank": 4,
        "max_grad_norm": 0,
        "seed": 3,
    }
    bench = Bench(folder, base=base)
    bench.render()
    return bench


@pytest.fixture(scope="module")
def train(bench: Bench):
    """Two steps with some features, each set of them trained once."""

    @cache
    def steps(names: frozenset[str]) -> Trained:
        settings = bench.settings([ALL[name] for name in sorted(names)])
        if on_cuda(names):
            pytest.importorskip("mslk")  # kernels of int4, for bfloat16 alone
            settings["mixed_precision"] = "bf16"
        with opened(settings) as session:
            [network] = session.trained
            check_in_effect(session, names)
            before = {name: each.detach().clone() for name, each in network.adapter.state().items()}
            done = [take_step(session, step, names) for step in range(STEPS)]
            after = network.adapter.state()
            saved = bench.folder / "saved" / str(steps.cache_info().misses)
            saved.mkdir(parents=True)
            state.write_all(saved, session.contents())
            for write in session.export_into(saved):
                write()
            check_saved(saved, names)
            changed = sum(not torch.equal(before[name], after[name]) for name in before)
            return Trained(*zip(*done, strict=True), changed, len(before))

    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(tuner_chunked_ff, "TOKENS_PER_UNIT", 3)  # of 8 tokens
        yield lambda names: steps(frozenset(names))


def on_cuda(names: Iterable[str]) -> bool:
    """Whether one of the features needs a CUDA device."""
    return any(ALL[name].cuda for name in names)


def take_step(session: Session, step: int, names: Iterable[str]) -> tuple[float, float]:
    """Loss and gradient norm. The first step refuses by itself a trained tensor that got no gradient."""
    session.run.step = step
    result = train_step(session)
    assert ("tread/dropped" in result.metrics) == ("TREAD" in names)
    return result.loss, result.grad_norm


def check_in_effect(session: Session, names: Iterable[str]) -> None:
    """The features that can be seen on a network are there, and no others."""
    [network] = session.trained
    policy = None if network.checkpointing is None else type(network.checkpointing).__name__
    assert policy == (
        "Selective" if "selective checkpointing" in names else "Offload" if "checkpoints on the host" in names else None
    )
    assert (network.residency is not None) == any(name.startswith("group offload") for name in names)
    chunked = ["forward" in vars(module) for module in network.feed_forwards.values()]
    assert chunked == [("chunked feed-forward" in names)] * LAYERS
    fused = ["forward" in vars(block) for block in network.stack.blocks]
    assert fused == [("fused blocks" in names)] * LAYERS
    assert bool(session.releases) == ("gradient release" in names)


def check_saved(folder: Path, names: Iterable[str]) -> None:
    """What people use elsewhere holds matrices of the unquantised shapes, and finite numbers."""
    if "full" in names:
        assert {each.shape for each in load_file(folder / "adapter.transformer.safetensors").values()} >= {
            (128, 128),
            (256, 128),
        }
        return
    [file] = folder.glob("*lora*.safetensors")
    tensors = load_file(file)
    assert {tuple(each.shape) for name, each in tensors.items() if "lora_B" in name} == {(128, 4)}
    assert all(each.isfinite().all() for each in tensors.values())


def case(names: tuple[str, ...]) -> Any:
    marks = [pytest.mark.gpu] if on_cuda(names) else []
    return pytest.param(names, id=" + ".join(names), marks=marks)


def close(found: tuple[float, ...], expected: tuple[float, ...], tolerance: float) -> None:
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "names", [case(names) for names in [*trained_together(), *(("LoRA", each.name) for each in MORE_OPTIMIZERS)]]
)
def test_trained_together(train, names: tuple[str, ...]) -> None:
    found = train(names)
    assert torch.tensor(found.losses + found.norms).isfinite().all()
    # An optimizer that starts slowly rounds to nothing on some.
    assert found.changed > found.tensors / 2 if NAMES.intersection(names) else found.changed == found.tensors
    same = [name for name in names if name not in SAME]
    if len(same) < len(names):
        expected = train(same)
        close(found.losses, expected.losses, BFLOAT16 if on_cuda(names) else EXACT)
        close(found.norms, expected.norms, BFLOAT16 if on_cuda(names) else EXACT)
    for name in CHANGING.intersection(names) if len(names) == 2 else ():
        assert found.losses != train(set(names) - {name}).losses
    optimizer = NAMES.intersection(names)
    if optimizer:
        plain = train(set(names) - optimizer)
        close(found.losses[:1], plain.losses[:1], EXACT)


@pytest.mark.parametrize("changing", [(), ("TREAD",)])
@pytest.mark.parametrize("precision", [case((each.name,)) for each in PRECISIONS])
def test_a_precision_changes_the_loss_by_as_much_as_its_error(train, precision, changing) -> None:
    plain = train(["LoRA", *changing])
    quantised = train(["LoRA", *changing, *precision])
    [bits] = [each for each in "84" if each in precision[0].partition("-")[0]]
    assert quantised.losses[0] != plain.losses[0]
    close(quantised.losses[:1], plain.losses[:1], BY_BITS[bits])
