"""Every optimizer by name: it steps as its library does, lowers a loss, and resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import optimi
import pytest
import torch
from torch import nn

from tuner.builtin.gradient_release.release import Release
from tuner.builtin.optimizers import TORCH, OptimizersPlugin, bfloat16_bytes
from tuner.config.keys import CoreConfig
from tuner.errors import CheckpointError
from tuner.model import Adapter, ParameterGroup
from tuner.run import Run
from tuner.train import optimizers, state
from tuner.train.subclasses import put_together, taken_apart

CPU = torch.device("cpu")
NAMES = sorted(OptimizersPlugin("optimizers", OptimizersPlugin.Config()).optimizers(Run(CoreConfig(), {})))
LARGE = (64, 128)
"""Enough elements for state in 8 bits; smaller tensors keep theirs in float32."""


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao compiles its steps, which takes half a minute: here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def run_with(name: str, **keys: object) -> Run:
    plugin = OptimizersPlugin("optimizers", OptimizersPlugin.Config())
    run = Run(CoreConfig(optimizer=name, **{"learning_rate": 0.05, **keys}), {})
    run.optimizers = plugin.optimizers(run)
    return run


def groups(parameter: nn.Parameter, **keys: object) -> tuple[ParameterGroup, ...]:
    return (ParameterGroup("all", {"weight": parameter}, **keys),)


def grow(parameter: nn.Parameter, at: int) -> None:
    draw = torch.Generator().manual_seed(at)
    parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


REFERENCES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.9, 0.999), weight_decay=0.01, fused=True),
    "torch-rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "torch-muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "muon": lambda p: torch.optim.Muon(p, lr=0.05, adjust_lr_fn="match_rms_adamw"),
    "optimi-lion": lambda p: optimi.Lion(p, lr=0.05),
    "optimi-stableadamw": lambda p: optimi.StableAdamW(p, lr=0.05, weight_decay=0.01),
    "adamw_bf16": lambda p: optimi.AdamW(p, lr=0.05, betas=(0.9, 0.999), weight_decay=0.01, kahan_sum=True),
    "bnb-lion8bit": lambda p: import_module("bitsandbytes").optim.Lion8bit(p, lr=0.05),
    "bnb-adamw8bit": lambda p: import_module("bitsandbytes").optim.AdamW8bit(p, lr=0.05, weight_decay=0.01),
    "ao-adamw8bit": lambda p: import_module("torchao").optim.AdamW8bit(p, lr=0.05, weight_decay=0.01),
    "prodigy": lambda p: import_module("prodigyopt").Prodigy(p, lr=0.05),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_steps_as_its_library_does(name: str, dtype: torch.dtype) -> None:
    start = torch.randn(LARGE, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, other = optimizers.make(run_with(name), groups(ours), CPU), REFERENCES[name]([theirs])
    for at in range(3):
        for optimizer, parameter in ((mine, ours), (other, theirs)):
            grow(parameter, at)
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


@pytest.mark.parametrize("name", NAMES)
def test_it_lowers_a_loss(name: str) -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    rate = 1.0 if name in ("torch-adadelta", "prodigy") else 0.05
    optimizer = optimizers.make(run_with(name, learning_rate=rate), groups(parameter), CPU)
    for _ in range(30):
        loss = (parameter + 0.1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with optimizers.averaged([optimizer]):
        assert (parameter + 0.1).square().sum() < 0.99 * 16 * 1.21


class Holder:
    """What a checkpoint saves of a network: a matrix, and a vector where it takes one."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, released: bool = False) -> None:
        draw = torch.Generator().manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(LARGE, generator=draw).to(dtype))
        self.other = nn.Parameter(torch.randn((8, 1) if name == "torch-muon" else (8,), generator=draw).to(dtype))
        self.both = {"matrix": self.parameter, "other": self.other}
        self.name = "net"
        self.adapter = Adapter(
            "test",
            (
                ParameterGroup("matrices", {"matrix": self.parameter}),
                # prodigy, which finds one rate for all, takes no others
                ParameterGroup("others", {"other": self.other}, 1.0 if name == "prodigy" else 0.5, weight_decay=False),
            ),
            state=lambda: {name: each.detach() for name, each in self.both.items()},
            load=lambda saved: [each.data.copy_(saved[name]) for name, each in self.both.items()],
        )
        self.optimizer = optimizers.make(run_with(name), self.adapter.groups, CPU)
        self.release = Release(self.optimizer, clip_value=0.0) if released else None

    def step(self, start: int, stop: int) -> None:
        for at in range(start, stop):
            optimizers.set_rate(self.optimizer, 0.05 / (at + 1))
            for index, each in enumerate(self.both.values()):
                grow(each, 10 * at + index)
            if self.release is None:
                self.optimizer.step()
            else:
                wanted = {each: each.grad for each in self.both.values()}
                self.optimizer.zero_grad()
                sum((each * grad).sum() for each, grad in wanted.items()).backward()
                self.release.finish()

    def weights(self) -> list[torch.Tensor]:
        return [each.detach().clone() for each in self.both.values()]


def equal(ours: Holder, theirs: Holder) -> bool:
    return all(torch.equal(*each) for each in zip(ours.weights(), theirs.weights(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_its_state_resumes_exactly(tmp_path: Path, name: str) -> None:
    whole, first = Holder(name), Holder(name)
    whole.step(0, 6)
    first.step(0, 3)
    state.write_all(tmp_path, state.of_network(first, first.optimizer))  # type: ignore[arg-type]
    second = Holder(name)
    state.load_network(second, second.optimizer, tmp_path)  # type: ignore[arg-type]
    assert equal(second, first)
    second.step(3, 6)
    assert equal(second, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_its_state_is_as_large_as_said(name: str, dtype: torch.dtype) -> None:
    held = Holder(name, dtype)
    held.step(0, 2)
    values = {
        f"{index}": value
        for index, value in enumerate(held.optimizer.state[held.parameter].values())
        if isinstance(value, torch.Tensor)
    }
    plain, _ = taken_apart(values)
    # Tables that all tensors of an optimizer share are not its state.
    own = [each for each in plain.values() if each.numel() not in (256, 1)]
    choice = run_with(name).optimizers[name]
    size = choice.state_bytes if dtype is torch.float32 else bfloat16_bytes(choice)
    assert sum(each.nbytes for each in own) == pytest.approx(size * held.parameter.numel(), rel=0.05, abs=600)


@pytest.mark.parametrize(
    ("trained", "weight_bytes", "size"), [("adapter", 2.0, 8), ("network", 4.0, 8), ("network", 2.0, 6)]
)
def test_the_planner_is_told_the_state_of_what_is_trained(trained: str, weight_bytes: float, size: float) -> None:
    """An adapter is float32 on any base; the network is trained in the type that it is stored in."""
    plugin = OptimizersPlugin("optimizers", OptimizersPlugin.Config())
    workload = SimpleNamespace(trained=trained, weight_bytes=weight_bytes)
    answer = plugin.estimate(run=run_with("adamw_bf16"), spec=None, workload=workload)  # type: ignore[arg-type]
    assert answer == {"optimizer_bytes": size}


def test_the_weights_to_use_of_a_schedule_free_optimizer_are_others_than_those_it_trains() -> None:
    from schedulefree import AdamWScheduleFree

    parameter, reference = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    ours = optimizers.make(run_with("adamw_schedulefree"), groups(parameter), CPU)
    theirs = AdamWScheduleFree([reference], lr=0.05)
    theirs.train()
    for at in range(5):
        for optimizer, each in ((ours, parameter), (theirs, reference)):
            grow(each, at)
            optimizer.step()
    trained = parameter.detach().clone()
    theirs.eval()
    with optimizers.averaged([ours]):
        assert torch.equal(parameter, reference)
        assert not torch.equal(parameter, trained)
    assert torch.equal(parameter, trained), "and back, to the bit"
    grow(parameter, 5)
    ours.step()


def test_kahan_summation_learns_what_bfloat16_alone_would_round_away() -> None:
    """Updates a hundredth of a bfloat16 weight's last bit add up."""
    moved = {}
    for name in ("optimi-sgd", "torch-sgd"):
        parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        options = {"kahan_sum": True} if name == "optimi-sgd" else {}
        run = run_with(name, learning_rate=1e-3, optimizer_config=options)
        optimizer = optimizers.make(run, groups(parameter), CPU)
        for _ in range(100):
            parameter.grad = torch.full((8,), 0.1, dtype=torch.bfloat16)
            optimizer.step()
        moved[name] = float(1 - parameter.float().mean())
    assert moved["torch-sgd"] == 0
    assert moved["optimi-sgd"] == pytest.approx(0.01, rel=0.3)


def test_groups_keep_their_name_their_rate_and_whether_they_decay() -> None:
    run = run_with("adamw", optimizer_config={"weight_decay": 0.3})
    [values] = optimizers.make(
        run, groups(nn.Parameter(torch.ones(2)), rate_scale=0.5, weight_decay=False), CPU
    ).param_groups
    assert (values["name"], values["lr"], values["weight_decay"]) == ("all", 0.025, 0.0)


def test_every_optimizer_of_torch_that_needs_no_closure_has_a_name() -> None:
    classes = {name.lower() for name in dir(torch.optim) if name[0].isupper()}
    assert set(TORCH) == classes - {"lbfgs", "optimizer", "sparseadam"}


@pytest.mark.parametrize("name", NAMES)
def test_steps_in_backward_are_the_steps_after_it(tmp_path: Path, name: str) -> None:
    """Gradient release, and that its state resumes: for every optimizer but those that look at all gradients."""
    if run_with(name).optimizers[name].needs_all_gradients:
        return
    after, first = Holder(name), Holder(name, released=True)
    after.step(0, 6)
    first.step(0, 3)
    state.write_all(tmp_path, state.of_network(first, first.optimizer))  # type: ignore[arg-type]
    second = Holder(name, released=True)
    state.load_network(second, second.optimizer, tmp_path)  # type: ignore[arg-type]
    second.step(3, 6)
    assert equal(second, after)


def test_what_a_library_counts_in_groups_is_not_given_to_other_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where gradient release is switched on between two runs."""
    before, after = Holder("adamw_schedulefree"), Holder("adamw_schedulefree", released=True)
    after.step(0, 1)
    before.step(0, 3)
    state.write_all(tmp_path, state.of_network(after, after.optimizer))  # type: ignore[arg-type]
    plain = Holder("adamw_schedulefree")
    state.load_network(plain, plain.optimizer, tmp_path)  # type: ignore[arg-type]
    assert not caplog.text, "as many groups: two of one tensor each"
    plain.optimizer.param_groups.append({**plain.optimizer.param_groups[0], "params": []})
    state.load_network(plain, plain.optimizer, tmp_path)  # type: ignore[arg-type]
    assert "other groups of tensors than this run's, which starts afresh" in caplog.text


def test_muon_leaves_what_is_no_matrix_to_adamw() -> None:
    ours, matrix, vector = Holder("muon"), Holder("torch-muon"), Holder("adamw")
    options = {"adjust_lr_fn": "match_rms_adamw"}
    matrix.optimizer = optimizers.make(run_with("torch-muon", optimizer_config=options), matrix.adapter.groups, CPU)
    options = {"betas": (0.9, 0.95)}
    vector.optimizer = optimizers.make(run_with("adamw", optimizer_config=options), vector.adapter.groups, CPU)
    for each in (ours, matrix, vector):
        each.step(0, 4)
    assert torch.equal(ours.parameter, matrix.parameter)
    assert torch.equal(ours.other, vector.other)
    assert [group["name"] for group in ours.optimizer.param_groups] == ["matrices", "others"]


def test_torchao_rounds_stochastically_where_asked() -> None:
    """bfloat16 weights learn from updates smaller than their last bit, and alike from the same seed."""
    moved = []
    for _ in range(2):
        parameter = nn.Parameter(torch.ones(LARGE, dtype=torch.bfloat16))
        options = {"bf16_stochastic_round": True, "weight_decay": 0.0}
        run = run_with("ao-adamw8bit", learning_rate=1e-4, optimizer_config=options)
        optimizer = optimizers.make(run, groups(parameter), CPU)
        torch.manual_seed(0)
        for _ in range(10):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved.append(parameter.detach().float())
    assert torch.equal(*moved)
    assert float(1 - moved[0].mean()) == pytest.approx(1e-3, rel=0.3)


def test_an_optimizer_that_finds_its_own_rate_is_told_of_a_small_one(caplog: pytest.LogCaptureFixture) -> None:
    plugin = OptimizersPlugin("optimizers", OptimizersPlugin.Config())
    plugin.configure(run=run_with("prodigy", learning_rate=1e-4))
    assert "1 is usual" in caplog.text
    caplog.clear()
    plugin.configure(run=run_with("prodigy", learning_rate=1.0))
    plugin.configure(run=run_with("adamw", learning_rate=1e-4))
    assert not caplog.text


def test_a_checkpoint_cannot_name_a_class_of_its_own() -> None:
    recipe = {"tensor subclass": "pathlib:Path", "parts": [], "context": []}
    with pytest.raises(CheckpointError, match="pathlib:Path, which is unknown here"):
        put_together({}, {"0.exp_avg": recipe})
