"""Optimizers against their library's own step, learning-rate curves against transformers' schedules."""

from __future__ import annotations

from pathlib import Path

import optimi
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from tuner.builtin.epochs.plan import Plan
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket, Framing, Sample, View
from tuner.errors import ConfigError
from tuner.model import ParameterGroup
from tuner.train import optimizers, schedules


def plan_of_ten_steps() -> Plan:
    """Epochs of ten steps each."""
    bucket = Bucket(1, 64, 64)
    samples = [
        Sample(
            f"{i}", "a", Path(f"{i}"), "0", ("",), 64, 64, 1, 0, bucket, (View(Framing(64, 64, 0, 0)),), Path("cache")
        )
        for i in range(10)
    ]
    return Plan(samples, seed=0, batch_size=1)


def groups(parameter: nn.Parameter, rate_scale: float = 1.0) -> tuple[ParameterGroup, ...]:
    return (ParameterGroup("all", {"weight": parameter}, rate_scale),)


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
        ("optimi-lion", lambda p: optimi.Lion(p, lr=0.1)),
        ("optimi-stableadamw", lambda p: optimi.StableAdamW(p, lr=0.1, weight_decay=0.01)),
    ],
)
def test_an_optimizer_steps_as_its_library_does(name, reference):
    ours, theirs = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    core = CoreConfig(optimizer=name, learning_rate=0.1)
    mine, other = optimizers.make(core, groups(ours), torch.device("cpu")), reference([theirs])
    for _ in range(3):
        step(mine, ours)
        step(other, theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS))
def test_every_registered_optimizer_lowers_a_loss(name):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = optimizers.make(CoreConfig(optimizer=name, learning_rate=0.05), groups(parameter), torch.device("cpu"))
    for _ in range(20):
        loss = parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parameter.square().sum() < 4


def test_unknown_optimizers_and_options_name_the_nearest():
    with pytest.raises(ConfigError, match="optimi-lion"):
        optimizers.check(CoreConfig(optimizer="optimi-lyon"))
    with pytest.raises(ConfigError, match="weight_decay"):
        optimizers.make(
            CoreConfig(optimizer_config={"weight_decy": 1}), groups(nn.Parameter(torch.ones(1))), torch.device("cpu")
        )


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_curves_equal_transformers(scheduler):
    total, warmup = 50, 0 if scheduler == "constant" else 7
    core = CoreConfig(learning_rate=3e-4, lr_scheduler=scheduler, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3e-4)
    reference = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for at in range(total):
        assert schedules.learning_rate(core, at, total) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        reference.step()


def test_a_warm_up_as_long_as_the_run_is_no_warm_up():
    core = CoreConfig(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=400_000)
    assert schedules.warmup_steps(core, 400_000) == 0
    assert schedules.learning_rate(core, 0, 400_000) == 1.0
    assert schedules.learning_rate(core, 200_000, 400_000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"max_train_steps": 100}, 100),
        ({"num_train_epochs": 3}, 30),
        ({"max_train_steps": 100, "num_train_epochs": 3}, 30),
        ({"max_train_steps": 100, "num_train_epochs": 3, "ignore_final_epochs": True}, 100),
        ({"max_train_steps": 20, "num_train_epochs": 3}, 20),
    ],
)
def test_length_of_the_run(keys, steps):
    assert schedules.total_steps(CoreConfig(**keys), plan_of_ten_steps()) == steps


def test_a_run_without_length_is_refused():
    with pytest.raises(ConfigError, match="max_train_steps"):
        schedules.total_steps(CoreConfig(), plan_of_ten_steps())
