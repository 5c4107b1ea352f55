"""The average of trained tensors: its formula in float64, float32 whatever is trained, put in place exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tuner.builtin.ema import EmaConfig, EmaPlugin
from tuner.builtin.ema.average import Average, HostAverage
from tuner.builtin.ema.averages import Averages
from tuner.builtin.ema.decay import decay_at, decay_over
from tuner.builtin.planner.memory import predict
from tuner.config.keys import CoreConfig
from tuner.model import Adapter, Batch, Model, Network, ParameterGroup, SampleRequest
from tuner.run import Run
from tuner.spec import LatentGeometry, ModelSpec, NetworkSpec
from tuner.workload import Workload

SHAPES = {"down": (4, 7), "up": (7, 4), "bias": (7,)}
KINDS = [Average, HostAverage]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def step(trained: dict[str, nn.Parameter], number: int) -> None:
    """What an optimizer does: other values in the same storage."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for each in trained.values():
            each.add_(torch.randn(each.shape, generator=generator).to(each) * 0.1)


def bits(tensors: dict[str, nn.Parameter] | dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in tensors.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_decay_is_that_of_diffusers() -> None:
    for start in (0, 5):
        theirs = EMAModel([], decay=0.9, update_after_step=start)
        ours = [decay_at(step, start + 1, 0.9) for step in range(100)]
        assert ours == [theirs.get_decay(step) for step in range(100)]
    assert ours[-1] == 0.9
    assert ours[:7] == [0.0] * 7
    assert ours[7] == 2 / 11


def test_an_update_stands_for_the_steps_since_the_last() -> None:
    assert decay_over(1000, 1004, 1, 0.9) == pytest.approx(0.9**4)
    assert decay_over(2, 4, 1, 0.999) == pytest.approx(3 / 12 * 4 / 13)
    assert decay_over(0, 4, 1, 0.999) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "interval"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 1)])
def test_it_is_the_formula_in_float64(kind: type[Average], dtype: torch.dtype, interval: int) -> None:
    trained = parameters(dtype)
    average, expected, updated = kind(trained), bits(trained), 1
    reference = {name: each.double() for name, each in expected.items()}
    for number in range(2, 61):
        step(trained, number)
        if number % interval:
            continue
        decay = 1.0
        for k in range(updated + 1, number + 1):
            decay *= min((1 + k - 1) / (10 + k - 1), 0.97)
        reference = {
            name: decay * value + (1 - decay) * trained[name].detach().double() for name, value in reference.items()
        }
        average.follow(1 - decay_over(updated, number, 1, 0.97))
        updated = number
    for name, tensor in average.tensors.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), reference[name], rtol=1e-5, atol=1e-6)
    average.close()


def test_the_average_of_bfloat16_weights_does_not_stall() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    average = Average({"weight": weight})
    with torch.no_grad():
        weight.fill_(1.2)
    for _ in range(1000):
        average.follow(1 - 0.995)
    torch.testing.assert_close(average.tensors["weight"], weight.detach().float(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_change_places_in_their_own_storage_and_back_bit_for_bit(
    kind: type[Average], dtype: torch.dtype
) -> None:
    trained = parameters(dtype)
    average = kind(trained)
    step(trained, 1)
    average.follow(0.5)
    own, kept = bits(trained), bits(average.tensors)
    places = [each.data_ptr() for each in trained.values()]
    with average.exchanged():
        assert same(bits(trained), {name: each.to(dtype) for name, each in kept.items()})
        assert not same(bits(trained), own)
    assert same(bits(trained), own)
    assert same(bits(average.tensors), kept)
    with pytest.raises(RuntimeError, match="in between"), average.exchanged():
        raise RuntimeError("in between")
    assert same(bits(trained), own)
    assert same(bits(average.tensors), kept)
    assert [each.data_ptr() for each in trained.values()] == places
    assert all(each.requires_grad for each in trained.values())
    average.close()


def test_what_fails_halfway_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.builtin.ema import average as module

    trained = parameters()
    average = Average(trained)
    step(trained, 1)
    own, swap, calls = bits(trained), module._swap, []

    def failing(first: Tensor, second: Tensor) -> None:
        calls.append(first)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room for the second tensor")
        swap(first, second)

    monkeypatch.setattr(module, "_swap", failing)
    with pytest.raises(torch.OutOfMemoryError), average.exchanged():
        pass
    assert same(bits(trained), own)


def test_what_goes_wrong_in_the_background_is_raised() -> None:
    trained = parameters()
    average = HostAverage(trained)
    average._stages[0] = torch.zeros(2, 2)
    trained["down"].data = torch.zeros(2, 2)
    average.follow(0.5)
    with pytest.raises(RuntimeError, match="size"):
        average.tensors  # noqa: B018
    average.close()


class Pair(Model):
    """Two experts, of which a test needs the trained parameters alone."""

    def predict(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def sample(self, request: SampleRequest) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def pair(first: dict[str, nn.Parameter], second: dict[str, nn.Parameter], every: int) -> Pair:
    def network(name: str, trained: dict[str, nn.Parameter]) -> Network:
        module = nn.ParameterDict(trained)
        groups = tuple(ParameterGroup(each, {each: parameter}) for each, parameter in trained.items())
        adapter = Adapter("full", groups, state=dict, load=lambda state: None)
        spec = NetworkSpec(name, 1, 4, 1, 4, 4, 4, 4)
        made: Any = {"stack": None, "trampoline": None}
        return Network(
            spec, module, weights=lambda: iter(()), dtype_of=lambda _: torch.float32, adapter=adapter, **made
        )

    networks = [network("high", first), network("low", second)]
    latents = LatentGeometry(16, 4, 8)
    specs = tuple(each.spec for each in networks)
    return Pair(ModelSpec("wan", "both", "base", specs, latents, 16, 16, (), switch_steps=every), networks, {})


def test_each_of_two_experts_has_its_own_count(tmp_path: Path) -> None:
    run = Run(CoreConfig(output_dir=tmp_path), {}, total_steps=24)
    config = EmaConfig(use_ema=True, ema_decay=0.5, ema_start_step=2)
    trained = {"high": parameters(seed=1), "low": parameters(seed=2)}
    averages = Averages(run, pair(trained["high"], trained["low"], every=3), config)
    alone = {}
    for name, seed in (("high", 1), ("low", 2)):
        twin = parameters(seed=seed)
        theirs = EMAModel(list(twin.values()), decay=0.5, update_after_step=2)
        for own in range(1, 13):
            step(twin, 100 * seed + own)
            theirs.step(list(twin.values()))
        alone[name] = dict(zip(twin, theirs.shadow_params, strict=True))
    done = {"high": 0, "low": 0}
    for number in range(1, 25):
        name = "high" if (number - 1) // 3 % 2 == 0 else "low"
        done[name] += 1
        step(trained[name], 100 * (1 if name == "high" else 2) + done[name])
        averages.follow(number)
        assert averages.began == (number >= 3)
        expected = None if done[name] < 3 else decay_at(done[name], 3, 0.5)
        assert averages.decay(number) == expected
    state = averages.state()
    assert state["high"] == state["low"] == {"origin": 3, "updated": 12}
    for name, tensors in alone.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(state[f"{name}/{key}"], tensor)
    with averages.exchanged():
        for name, tensors in alone.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(trained[name][key].detach(), tensor)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    """One process that is a group of its own, as a sharded run's are many."""
    from torch import distributed

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sharded_weights_have_sharded_averages(mesh: object) -> None:
    plain = parameters()
    trained = {name: nn.Parameter(distribute_tensor(each.detach(), mesh, [Shard(0)])) for name, each in plain.items()}
    ours, theirs = Average(trained), Average(plain)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, each in plain.items():
                each.add_(torch.randn(each.shape, generator=generator))
                trained[name].to_local().copy_(each)
        ours.follow(0.3)
        theirs.follow(0.3)
    assert all(isinstance(each, DTensor) for each in ours.tensors.values())
    whole = {name: each.full_tensor().clone() for name, each in ours.tensors.items()}
    assert same(whole, theirs.tensors)
    with ours.exchanged():
        assert same({name: each.full_tensor().detach() for name, each in trained.items()}, whole)
    assert same({name: each.full_tensor().detach() for name, each in trained.items()}, bits(plain))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(kind: type[Average], dtype: torch.dtype) -> None:
    plain = parameters(dtype)
    trained = {name: nn.Parameter(each.detach().cuda()) for name, each in plain.items()}
    ours, theirs = kind(trained), Average(plain)
    for number in range(20):
        step(plain, number)
        with torch.no_grad():
            for name, each in trained.items():
                each.copy_(plain[name])
        ours.follow(0.1)
        with torch.no_grad():  # what comes after must not be seen by a copy that is under way
            for each in trained.values():
                each.fill_(99)
        theirs.follow(0.1)
        with torch.no_grad():
            for name, each in trained.items():
                each.copy_(plain[name])
    device = "cpu" if kind is HostAverage else "cuda"
    assert {each.device.type for each in ours.tensors.values()} == {device}
    for name, tensor in ours.tensors.items():
        torch.testing.assert_close(tensor.cpu(), theirs.tensors[name], rtol=1e-5, atol=1e-6)
    own = bits(trained)
    with ours.exchanged():
        assert not same(bits(trained), own)
    assert same(bits(trained), own)
    ours.close()


@pytest.mark.parametrize(("device", "beside", "on_host"), [("accelerator", 4, 0), ("cpu", 0, 8)])
def test_the_plan_counts_its_memory(device: str, beside: int, on_host: int) -> None:
    spec = NetworkSpec("transformer", 30, 1536, 12, 8960, 4096, 512, 16)
    plain = Workload(spec, LatentGeometry(16, 4, 8), (81, 480, 832), 1, adapter_parameters=10**6)
    plugin = EmaPlugin("ema", EmaConfig(use_ema=True, ema_device=device))
    ours = predict(replace(plain, **plugin.estimate(run=None, spec=None, workload=plain)))
    theirs = predict(plain)
    assert ours.on_device - theirs.on_device == beside * 10**6
    assert ours.on_host - theirs.on_host == on_host * 10**6
    assert EmaPlugin("ema", EmaConfig()).estimate(run=None, spec=None, workload=plain) == {}
