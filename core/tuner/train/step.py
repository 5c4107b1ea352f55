"""One optimizer step, readable from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tuner import flow, processes, rng
from tuner.data.loader import OF_THE_DEVICE, LoadedBatch
from tuner.data.transfer import sent
from tuner.errors import FailedElsewhere, TrainingError
from tuner.model import Batch, Loss, Network
from tuner.sharded import is_sharded, whole_of
from tuner.train import guards, optimizers
from tuner.train.reduce import sum_over_processes
from tuner.train.session import Session

SKIPPED_IN_A_ROW = 20
"""So many steps without numbers are no accident: the run ends, whatever ``nonfinite`` says."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to."""

    loss: float
    grad_norm: float
    learning_rate: float
    samples: int
    skipped: bool
    metrics: Mapping[str, float]
    """what ``compute_loss`` measured"""


def train_step(session: Session) -> StepResult:
    """Forward, backward, clip, step. In a network's first step every trained tensor must get a gradient.

    There is one host read, after all backwards are queued: loss, gradient norm and metrics together. A
    non-finite value never reaches the optimizer. Raises TrainingError for it unless ``nonfinite`` is ``skip``.

    With gradient release the weights are stepped during backward: a non-finite loss is read before it, and a
    non-finite gradient of a finite loss always ends the run.
    """
    run, network = session.run, session.take_turn()
    optimizer = session.optimizers[network.name]
    release = session.releases.get(network.name)
    optimizers.set_rate(optimizer, rate := session.learning_rate(network.name))

    micro_batches = session.plan.micro_batches(run.step)
    samples = sum(len(each.samples) for each in micro_batches)
    slots = _slots(session, network, len(micro_batches))
    total = torch.zeros((), device=session.engine.device)
    seen: list[str] = []
    metrics: dict[str, Tensor] = {}
    for number, (slot, counts) in enumerate(slots, start=1):
        with session.timed("data"):
            batch = make_batch(session, session.loader.load(run.step, slot))
        if network.sharding is not None:
            network.sharding.synchronise(number == len(slots))
        with session.timed("forward"):
            loss = _loss(session, batch, slot)
        metrics.update(loss.metrics)
        # Scaled by the samples of the whole step, so that unequal micro-batches do not bias the mean.
        scaled = loss.per_sample.sum() / (samples * run.sharing) if counts else loss.per_sample.sum() * 0
        session.loader.read_ahead(run.step, slot)
        if release is not None:
            session.copied.wait()
            session.stepping = True
        with session.timed("backward"):
            if release is None or math.isfinite(scaled.item()):
                scaled.backward()  # type: ignore[no-untyped-call]
        total += scaled.detach()
        seen += batch.sample_ids
    reached = frozenset() if release is None else frozenset(release.reached)
    if slots and network.name in session.unchecked and (release is None or reached):
        guards.check_gradient_coverage(network, reached)

    sum_over_processes([each for each in optimizers.parameters(optimizer) if not is_sharded(each)], total)
    norm = clip_gradients(session) if release is None else release.finish()
    with session.timed("device"):
        value, norm_value, *measured = _read(total, norm, *metrics.values())
    session.copied.wait()
    finite = math.isfinite(value) and math.isfinite(norm_value)
    if finite:
        session.skipped = 0
        session.unchecked.discard(network.name)
    if finite and release is None:
        _change_weights(session, optimizer)
    session.stepping = False
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        everywhere = [sample for part in processes.gather(seen) for sample in part]
        _nonfinite(session, value, norm_value, everywhere, spoilt=bool(reached))
    return StepResult(value, norm_value, rate, samples, not finite, dict(zip(metrics, measured, strict=True)))


def _change_weights(session: Session, optimizer: torch.optim.Optimizer) -> None:
    session.stepping = True
    # Replicas must round alike, where an optimizer rounds at random.
    rng.seed_global(session.run.config.seed, "optimizer", session.run.step)
    with session.timed("optimizer"):
        optimizer.step()


def _read(total: Tensor, *scalars: Tensor) -> list[float]:
    """The values of all, in one read; to send a number that is not on the device takes no page-locked copy."""
    there = [each.detach().to(total, non_blocking=True).squeeze() for each in scalars]
    return torch.stack([total, *there]).tolist()  # type: ignore[no-any-return]


def _slots(session: Session, network: Network, micro_batches: int) -> list[tuple[int, bool]]:
    """The micro-batches of this process, and whether each counts.

    Where the forward of a sharded network needs every process, all do as many: one more that counts nothing.
    """
    index, count = session.run.replica_index, session.run.replica_count
    slots = [(slot, True) for slot in range(index, micro_batches, count)]
    if network.sharding is not None and len(slots) < -(-micro_batches // count):
        slots.append((index % micro_batches, False))
    return slots


def make_batch(session: Session, loaded: LoadedBatch) -> Batch:
    """A loaded batch on the device, with the noise, times and target drawn by the core."""
    if loaded.noise is None:
        sigmas, noise = session.draw(session.run.step, loaded.positions, loaded.latents)
        loaded = replace(loaded, sigmas=sigmas, noise=noise)
    forced, keep_at_least = loaded.forced, loaded.keep_at_least
    samples, _, *grid = loaded.latents.shape
    own = session.model.forced_tokens((grid[0], grid[1], grid[2]))
    if own is not None:
        # Counted on the CPU, where the masks still are: nothing waits for the device.
        forced = own.expand(samples, -1) if forced is None else forced | own
        keep_at_least = int(forced.sum(1).max())
    there = sent({**loaded.named(*OF_THE_DEVICE, "sigmas"), "forced": forced}, session.engine.device)
    noisy, target = flow.mix(there["latents"], there["noise"], there["sigmas"])
    facts = loaded.named("sample_ids", "positions", "regularisation")
    levels = tuple(loaded.sigmas.tolist()) if loaded.sigmas is not None else ()
    return Batch(**there, **facts, noisy=noisy, target=target, keep_at_least=keep_at_least, levels=levels)


def _loss(session: Session, batch: Batch, slot: int) -> Loss:
    """The loss of one micro-batch, through the family's hook, with autocast and the step's context."""
    run = session.run
    session.model.network.trampoline.context = session.context(batch)
    # Whatever torch draws from its global generator (dropout) is then a function of step and slot.
    rng.seed_global(run.config.seed, "micro_batch", run.step, slot)
    with session.engine.autocast():
        return session.manager.hook.compute_loss(run=run, model=session.model, batch=batch)  # type: ignore[no-any-return]


def clip_gradients(session: Session) -> Tensor:
    """Clip as configured; returns the global L2 norm before clipping, on the device."""
    config = session.run.config
    trained = optimizers.parameters(session.optimizers[session.model.network.name])
    parameters = [each for each in trained if each.grad is not None]
    norm = _norm(parameters)
    if config.max_grad_norm and config.grad_clip_method == "norm":
        for alike in _apart(parameters):
            nn.utils.clip_grads_with_norm_(alike, config.max_grad_norm, norm)
    elif config.max_grad_norm:
        nn.utils.clip_grad_value_(parameters, config.max_grad_norm)
    return norm


def _apart(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that every process holds whole, and those it holds a part of."""
    return [each for each in parameters if not is_sharded(each)], [each for each in parameters if is_sharded(each)]


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients."""
    norms = [
        nn.utils.get_total_norm([each.grad for each in alike if each.grad is not None])
        for alike in _apart(parameters)
        if alike
    ]
    whole = [whole_of(norm) for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def _nonfinite(session: Session, loss: float, norm: float, samples: list[str], *, spoilt: bool) -> None:
    message = (
        f"step {session.run.step + 1}: the loss is {loss} and the gradient norm {norm}; samples: {', '.join(samples)}"
    )
    session.skipped += 1
    if session.run.config.nonfinite == "skip" and not spoilt and session.skipped < SKIPPED_IN_A_ROW:
        session.run.log.warning("%s; the step was skipped", message)
        return
    if not session.run.is_main:
        raise FailedElsewhere(message)
    raise TrainingError(
        message,
        remedy="look at these clips, lower learning_rate, or set nonfinite: skip to leave such steps out; "
        "the checkpoints before this step are sound",
    )
