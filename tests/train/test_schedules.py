"""Learning-rate curves against transformers' schedules and their formulas; the length of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup, get_scheduler

from tuner.builtin.epochs.plan import Plan
from tuner.builtin.optimizers import OptimizersConfig, OptimizersPlugin
from tuner.config.keys import CoreConfig
from tuner.data.samples import Bucket, Framing, Sample, View
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.train import schedules


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


def run_with(**keys: object) -> Run:
    own = {name: keys.pop(name) for name in ("lr_num_cycles", "lr_power") if name in keys}
    run = Run(CoreConfig(**keys), {})
    run.lr_curves = OptimizersPlugin("optimizers", OptimizersConfig(**own)).lr_curves(run)
    return run


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_curves_equal_transformers(scheduler):
    total, warmup = 50, 0 if scheduler == "constant" else 7
    core = run_with(learning_rate=3e-4, lr_scheduler=scheduler, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3e-4)
    reference = get_scheduler(scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for at in range(total):
        assert schedules.learning_rate(core, at, total) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        reference.step()


CURVES = {
    "cosine_with_restarts": lambda share: 0.5 * (1 + math.cos(math.pi * ((3 * share) % 1.0))),
    "sine": lambda share: 0.5 * (1 + math.cos(2 * math.pi * 3 * share)),
    "polynomial": lambda share: (1 - share) ** 2.5,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "constant_with_warmup": lambda share: 1.0,
}


@pytest.mark.parametrize("scheduler", CURVES)
def test_curves_are_their_formulas_between_base_rate_and_end(scheduler):
    core = run_with(
        learning_rate=2e-4, lr_end=5e-5, lr_scheduler=scheduler, lr_warmup_steps=10, lr_num_cycles=3, lr_power=2.5
    )
    for step in range(10):
        assert schedules.learning_rate(core, step, 110) == pytest.approx(2e-4 * step / 10, abs=1e-18)
    for step in range(10, 110):
        expected = 5e-5 + 1.5e-4 * CURVES[scheduler]((step - 10) / 100)
        assert schedules.learning_rate(core, step, 110) == pytest.approx(expected, rel=1e-12)


def test_restarts_are_those_of_transformers():
    core = run_with(learning_rate=1.0, lr_scheduler="cosine_with_restarts", lr_warmup_steps=5, lr_num_cycles=4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    reference = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 5, 45, num_cycles=4)
    for at in range(45):
        assert schedules.learning_rate(core, at, 45) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_a_warm_up_as_long_as_the_run_is_no_warm_up():
    core = run_with(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=400_000)
    assert schedules.warmup_steps(core.config, 400_000) == 0
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


def test_an_unknown_curve_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        schedules.check(run_with(lr_scheduler="cosin"))
