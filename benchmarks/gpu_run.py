"""One measured case: a Wan of real dimensions with random weights, trained by the project's own step.

Everything is what a run has: the config and its plugins, materialising with their sinks (a quantiser, an offloader's
masters), LoRA, the session, the optimizer step with its guards. Only the family's reading of files is replaced, by
random weights, and the cache of encodings, by one clip of the shape that it would give.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tuner import attention, pipeline, transforms, workload
from tuner.assembly import Assembly, assemble, new_run
from tuner.blocks import install
from tuner.builtin.planner.cards import of_device
from tuner.builtin.planner.memory import CONTEXT, Memory, predict
from tuner.builtin.planner.speed import step_seconds
from tuner.data.loader import Loader
from tuner.data.order import MicroBatch
from tuner.data.samples import Bucket, Dataset, Sample
from tuner.model import Model, Network
from tuner.run import Run
from tuner.spec import ModelSpec, NetworkSpec
from tuner.train.engine import Engine
from tuner.train.session import Session
from tuner.train.step import train_step
from tuner.workload import Workload

GIB = 2**30
WARM_UP = 3
"""Steps that are not timed: kernels are chosen, buffers are allocated."""
FEWEST = 3
"""Timed steps, also where the time is up."""


@dataclass(frozen=True)
class Case:
    """A config, a shape, and the card that it is to make do with."""

    name: str
    flavour: str
    shape: tuple[int, int, int]
    """(frames, height, width) in pixels"""
    keys: Mapping[str, Any] = field(default_factory=dict)
    limit: float | None = None
    """GiB of the small card that this one stands for, CUDA's context included; None is all of this one"""
    narrow: Mapping[str, Any] = field(default_factory=dict)
    """Dimensions of the network in the place of the flavour's."""


@dataclass(frozen=True)
class Result:
    """What a case came to. Bytes of device memory; None on a CPU."""

    case: Case
    tokens: int
    predicted: float
    """without CUDA's context"""
    expected: float | None
    """seconds a step by the planner, where it knows the card"""
    seconds: tuple[float, ...] = ()
    """of each timed step"""
    loading: float = 0.0
    """seconds from nothing to the first step"""
    allocated: int | None = None
    """most that tensors held, in the timed steps and those before"""
    reserved: int | None = None
    """most that torch's allocator held"""
    context: int | None = None
    """what CUDA took beside that"""
    note: str = ""
    """why there are no seconds"""
    work: Workload | None = None
    """what a step computes and holds, by the loaded plugins"""


# The run


class Order:
    """One clip a step. What the session and the step ask of an order."""

    per_step = 1

    def __init__(self, bucket: Bucket) -> None:
        path = Path("synthetic")
        facts = {"captions": ("",), "width": bucket.width, "height": bucket.height, "frames": bucket.frames}
        sample = Sample("clip", "synthetic", path, "", fps=16.0, bucket=bucket, views=(), cache=path, **facts)  # type: ignore[arg-type]
        self._batch = MicroBatch((sample,), ("",), (0,), (0,))

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The same for each step."""
        return [self._batch]


class Cache:
    """Gives the same latents (C, F', h, w) and text (L, D) every time, as a cache gives what it has read."""

    datasets: Mapping[str, Dataset] = {}

    def __init__(self, spec: ModelSpec, network: NetworkSpec, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self._latents = torch.randn(spec.latents.shape(*case.shape))
        self._states = torch.randn(network.text_tokens, network.text_dim).to(dtype)

    def text(self, caption: str) -> dict[str, Tensor]:
        """Whatever the caption."""
        return {"states": self._states}

    def video(self, sample: Sample, view: int = 0) -> dict[str, Tensor]:
        """Whatever the sample."""
        return {"latents": self._latents}

    def mask(self, sample: Sample, view: int = 0) -> None:
        """There is none."""


def settings(case: Case, folder: Path) -> dict[str, Any]:
    """The case's flat config."""
    return {
        "model_family": "wan",
        "model_flavour": case.flavour,
        "output_dir": str(folder),
        "max_train_steps": 1000,
        "train_batch_size": 1,
        "lora_rank": 16,
        **case.keys,
    }


def described(case: Case, assembly: Assembly) -> tuple[Run, ModelSpec, Workload]:
    """The run before any weight is there, and what the loaded plugins say that a step holds and computes."""
    run = new_run(assembly)
    run.optimizers = assembly.manager.registry("optimizers", run)
    run.lr_curves = assembly.manager.registry("lr_curves", run)
    spec = pipeline.describe(run, assembly.manager)
    spec = replace(spec, networks=tuple(narrowed(each, case.narrow) for each in spec.networks))
    run.spec, run.trained_shape, run.total_steps = spec, case.shape, run.config.max_train_steps or 0
    run.estimate = partial(workload.of, run, spec, assembly.manager)
    return run, spec, run.estimate(spec.networks[0], Bucket(*case.shape), 1)


def narrowed(network: NetworkSpec, dimensions: Mapping[str, Any]) -> NetworkSpec:
    """``network`` with other dimensions, all that follows from them included."""
    if not dimensions:
        return network
    from tuner_wan import dimensions as wan

    found = replace(network, **dimensions)
    return replace(
        found,
        linears=wan.linears(found.dim, found.ffn_dim),
        small=wan.small(found.dim, found.ffn_dim),
        other=wan.other(found, found.in_channels),
    )


@torch.no_grad()
def random_weights(module: nn.Module, network: Network) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of each parameter: norms 1, biases 0, matrices normal with variance 1 / inputs.

    Tensors of one shape are drawn once: each block gets copies of the same numbers, which takes seconds, not minutes.
    """
    drawn: dict[tuple[object, ...], Tensor] = {}
    for name, parameter in list(module.named_parameters()):  # sinks change modules on the way
        shape, dtype, leaf = tuple(parameter.shape), network.dtype_of(name), name.rpartition(".")[2]
        kind = (shape, dtype, leaf)
        if kind not in drawn:
            if len(shape) == 1:
                drawn[kind] = torch.full(shape, float(leaf == "weight"), dtype=dtype)
            else:
                inputs = parameter[0].numel() if leaf == "weight" else shape[-1]
                drawn[kind] = torch.empty(shape).normal_(std=inputs**-0.5).to(dtype)
        yield name, drawn[kind]


def random_model(spec: ModelSpec, run: Run, own: Any = None) -> Model:
    """What ``tuner_wan.loading.load`` gives, without files."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    from tuner_wan.loading import parameter_dtype
    from tuner_wan.model import WanModel
    from tuner_wan.stack import WanStack

    facts = spec.networks[0]
    with init_empty_weights(include_buffers=False):
        module: Any = WanTransformer3DModel(
            num_attention_heads=facts.heads,
            attention_head_dim=facts.dim // facts.heads,
            in_channels=facts.in_channels,
            out_channels=spec.latents.channels,
            text_dim=facts.text_dim,
            ffn_dim=facts.ffn_dim,
            num_layers=facts.blocks,
        )
    stack, kept = WanStack(module), frozenset(module._keep_in_fp32_modules)
    network = Network(
        spec=facts,
        module=module,
        stack=stack,
        weights=lambda: random_weights(module, network),
        dtype_of=partial(parameter_dtype, dtype=run.dtype, kept=kept),
        trampoline=install(module, stack),
        feed_forwards={f"blocks.{index}.ffn": block.ffn for index, block in enumerate(stack.blocks)},  # type: ignore[misc]
        attention_processors=lambda: list(module.attn_processors.values()),
    )
    return WanModel(spec, [network], {}, {}, flow_shift=3.0)


def opened(case: Case, assembly: Assembly, run: Run, spec: ModelSpec) -> Session:
    """The run where it takes its first step."""
    hook, engine = assembly.manager.hook, Engine(run)
    with mock.patch("tuner_wan.loading.load", partial(random_model, spec)):
        model: Model = hook.load_model(run=run)
    edits = transforms.collect(run, model, assembly.manager)
    for network in model.networks.values():
        transforms.prepare(run, network, edits)
    backends = assembly.manager.registry("attention_backends", run)
    kernels = attention.choose(run.config.attention_mechanism, run.config.attention_usage, backends)
    cache: Any = Cache(spec, spec.networks[0], case, run.dtype)
    order: Any = Order(Bucket(*case.shape))
    loader = Loader(cache, order, seed=run.config.seed, device=engine.device)
    session = Session(run, assembly.manager, model, engine, order, loader, run.total_steps, {}, kernels)
    hook.on_train_start(run=run, model=model)
    return session


# The measurement


def timed(session: Session) -> float:
    """Seconds of one optimizer step: on the device's own clock, between two events, where it is a GPU."""
    if session.engine.device.type != "cuda":
        began = time.perf_counter()
        train_step(session)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    train_step(session)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def steps(session: Session, number: int, until: float, warm_up: int = WARM_UP) -> tuple[float, ...]:
    """Seconds of ``number`` steps after the warm-up, or of fewer where the clock (``time.time``) is past ``until``."""
    seconds: list[float] = []
    for done in range(warm_up + number):
        if len(seconds) >= FEWEST and time.time() > until:
            break
        took = timed(session)
        session.run.step += 1
        if done >= warm_up:
            seconds.append(took)
    return tuple(seconds)


def measure(case: Case, number: int, until: float, warm_up: int = WARM_UP) -> Result:
    """Train ``number`` steps of ``case``. Out of memory, and what the card cannot hold, come back as notes."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        assembly = assemble(settings(case, Path(folder)))
        run, spec, work = described(case, assembly)
        cuda = torch.cuda.is_available()
        memory = predict(work)
        result = Result(case, work.tokens, memory.on_device - CONTEXT, _expected(work) if cuda else None, work=work)
        if cuda and (refusal := _limited(case, memory)):
            return replace(result, note=refusal)
        try:
            session = opened(case, assembly, run, spec)
            loading = time.time() - began
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            result = replace(result, seconds=steps(session, number, until, warm_up), loading=loading)
            session.loader.close()
        except torch.OutOfMemoryError as error:
            result = replace(result, note=f"out of memory: {str(error).splitlines()[0]}")
        finally:
            if cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)
        return _held(result) if cuda else result


def _expected(work: Workload) -> float | None:
    device = torch.cuda.get_device_properties()
    card = of_device(device.name, device.total_memory / GIB)
    return None if card is None else step_seconds(work, card)


def _limited(case: Case, memory: Memory) -> str:
    """Make the card as small as the case wants it; why there is no use in trying, where there is none."""
    total = torch.cuda.get_device_properties().total_memory
    if case.limit is not None:
        # The context is outside of what torch limits, and the small card would have to hold it.
        torch.cuda.set_per_process_memory_fraction((case.limit * GIB - CONTEXT) / total)
    elif memory.on_device > total:
        return f"not run: {memory.on_device / GIB:.1f} GiB are predicted, the card has {total / GIB:.1f}"
    return ""


def _held(result: Result) -> Result:
    free, total = torch.cuda.mem_get_info()
    return replace(
        result,
        allocated=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
        context=total - free - torch.cuda.memory_reserved(),
    )
