"""Optimizers that are unknown, missing, wrongly set up, or not for this device: one error each, in time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner.builtin.optimizers import OptimizersPlugin
from tuner.builtin.optimizers.fp8 import OnlyWhereThereIsFp8
from tuner.builtin.optimizers.paged import PagedAfterLoading
from tuner.config.keys import CoreConfig
from tuner.errors import ConfigError
from tuner.run import Run
from tuner.testing.plugin_env import importable
from tuner.train import optimizers
from tuner.train.optimizers import OptimizerChoice

CPU = torch.device("cpu")


def run_with(name: str, **keys: object) -> Run:
    run = Run(CoreConfig(optimizer=name, **keys), {})
    run.optimizers = OptimizersPlugin("optimizers", OptimizersPlugin.Config()).optimizers(run)
    return run


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'optimi-lion'"):
        optimizers.check(run_with("optimi-lyon"))


def test_torchs_classes_are_known_as_torch_writes_them() -> None:
    assert optimizers.check(run_with("torch-NAdam")).cls == "NAdam"
    assert optimizers.check(run_with("torch-RMSprop")).cls == "RMSprop"


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bnb-adamw8bit", "bitsandbytes"),
        ("bnb-lion8bit-paged", "bitsandbytes"),
        ("ao-adamfp8", "torchao"),
        ("prodigy", "prodigyopt"),
    ],
)
def test_a_missing_library_is_named_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    found = optimizers.find_spec
    monkeypatch.setattr(optimizers, "find_spec", lambda module: None if module == library else found(module))
    extra = "prodigy" if library == "prodigyopt" else library
    with pytest.raises(ConfigError, match=rf"pip install difftuner\[{extra}\]"):
        optimizers.check(run_with(name))


def test_a_library_that_cannot_be_imported_is_said(tmp_path) -> None:
    (tmp_path / "broken_optimizers.py").write_text("raise OSError('libsomething.so is missing')")
    run = run_with("mine")
    run.optimizers = {"mine": OptimizerChoice("broken_optimizers", "Mine", "broken-optimizers")}
    with importable(tmp_path), pytest.raises(ConfigError, match="cannot be had of 'broken-optimizers': libsomething"):
        optimizers.rehearse(run, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decy": 1}, "did you mean 'weight_decay'"),
        ({"lr": 1}, "optimizer_config holds 'lr', which adamw does not take"),
        ({"betas": [0.9, 1.5]}, "'adamw' does not take this: Invalid beta parameter at index 1: 1.5"),
    ],
)
def test_wrong_options_are_refused_in_a_rehearsal(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizers.rehearse(run_with("adamw", optimizer_config=options), CPU)


def test_muon_alone_is_refused_what_is_no_matrix() -> None:
    from tuner.model import ParameterGroup

    group = ParameterGroup("biases", {"bias": nn.Parameter(torch.zeros(3))})
    with pytest.raises(ConfigError, match="Muon only supports 2D"):
        optimizers.make(run_with("torch-muon"), [group], CPU)
    optimizers.make(run_with("muon"), [group], CPU)


class Placed:
    """What is asked of a parameter on a device that this machine has not."""

    device = torch.device("cuda", 0)

    def __init__(self, elements: int = 1) -> None:
        self.elements = elements

    def numel(self) -> int:
        return self.elements


def test_fp8_state_is_refused_where_the_device_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        def add_param_group(self, group: dict[str, object]) -> None:
            pass

    class Refusing(OnlyWhereThereIsFp8, Base):
        pass

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    Refusing().add_param_group({"params": [Placed()]})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError, match="Refusing needs fp8, which an old card has not"):
        Refusing().add_param_group({"params": [Placed()]})


def test_state_that_is_loaded_goes_to_the_buffers_of_a_first_step() -> None:
    """bitsandbytes itself loads it into plain device memory: a resumed run would need more than it had."""
    lion, mix = Placed(3), Placed(3)
    saved = {lion: {"state1": torch.ones(3)}, mix: {"state1": torch.ones(2, 3), "state2": torch.ones(3)}}

    class Base:
        param_groups = [{"params": [lion, mix]}]
        paged: list[torch.Tensor] = []

        def load_state_dict(self, state: dict[object, dict[str, torch.Tensor]], move_to_device: bool) -> None:
            self.state = {each: dict(values) for each, values in state.items()}

        def get_state_buffer(self, parameter: Placed, dtype: torch.dtype, *before: int) -> torch.Tensor:
            self.paged.append(torch.zeros(*before, parameter.numel(), dtype=dtype))
            return self.paged[-1]

        def _get_state_double_buffer(self, parameter: Placed, dtype: torch.dtype) -> torch.Tensor:
            return self.get_state_buffer(parameter, dtype, 2)

    class Paged(PagedAfterLoading, Base):
        pass

    optimizer = Paged()
    optimizer.load_state_dict(saved)
    held = [each for values in optimizer.state.values() for each in values.values()]
    assert [id(each) for each in held] == [id(each) for each in optimizer.paged]
    assert all(torch.equal(*each) for each in zip(held, (v for s in saved.values() for v in s.values()), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bnb-adamw8bit-paged", "bnb-ademamix-paged", "bnb-lion8bit-paged"])
def test_a_resumed_paged_optimizer_is_paged(name: str) -> None:
    from tuner.model import ParameterGroup

    device = torch.device("cuda")
    run, made = run_with(name), []
    for _ in range(2):
        weight = nn.Parameter(torch.ones(512, 512, device=device))
        weight.grad = torch.ones_like(weight)
        made.append((weight, optimizers.make(run, [ParameterGroup("all", {"weight": weight})], device)))
    (weight, first), (other, second) = made
    first.step()
    second.load_state_dict(first.state_dict())
    other.data.copy_(weight.data)
    assert second.state[other]["state1"].is_paged
    for optimizer in (first, second):
        optimizer.step()
    assert torch.equal(weight, other)
