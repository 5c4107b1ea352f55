"""The training loop: step, log, validate, checkpoint, until the end or until someone asks to stop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner import processes, variants
from tuner.errors import Stopped, TrainingError
from tuner.train import checkpoint, memory, optimizers
from tuner.train.interrupt import Interrupt, watch
from tuner.train.log import StepLog
from tuner.train.saving import Saving
from tuner.train.session import Session
from tuner.train.step import StepResult, train_step
from tuner.validate.stage import validate


def train(session: Session) -> Path:
    """Train to the last step. Returns the folder of the last checkpoint.

    Raises Stopped, with everything saved, when SIGINT or SIGTERM asked for it.

    Validation comes before the checkpoint of the same step: a run killed in between repeats it.
    """
    run = session.run
    log = StepLog(run.output_dir, resumed_at=run.step) if run.is_main else None
    saving = Saving(session)
    session.manager.hook.on_train_start(run=run, model=session.model)
    saved: Path | None = None
    stopping = False
    with watch() as interrupt:
        while run.step < session.total and not stopping:
            try:
                _iterate(session, log)
                stopping, wanted = _asked_for(session, interrupt)
                if stopping or wanted or run.step == session.total:
                    with session.timed("save"):
                        saved = saving.start()
                saving.look()
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    saving.abandon()
                    raise
                raise _out_of_memory(session, saving, error) from None
        saving.finish()
    if log is not None:
        log.close()
    if run.step < session.total:
        raise _stopped(session, interrupt, saved)
    session.manager.hook.on_train_end(run=run, model=session.model)
    assert saved is not None  # the last step always saves
    return saved


def _asked_for(session: Session, interrupt: Interrupt) -> tuple[bool, bool]:
    """Whether to stop after this step, and whether to save; one process that says so is enough."""
    run, ended = session.run, _epoch_ended(session)
    plugins = run.plugins.values()
    stop = interrupt.requested is not None or any(each.stops_at(run.step, ended) for each in plugins)
    wanted = any(each.saves_at(run.step, ended) for each in plugins)
    stop, save = processes.any_of(stop, wanted or _due(run.step, run.config.checkpoint_step_interval))
    return stop, save


def _iterate(session: Session, log: StepLog | None) -> None:
    """One step, its validation if one is due, and its line in the log, which is written even where that fails."""
    run, config = session.run, session.run.config
    metrics = _of_the_base(session) if run.step == 0 else {}
    began = time.perf_counter()
    result = train_step(session)
    run.step += 1
    seconds = round(time.perf_counter() - began, 4)
    _tell(session, result, seconds)
    last = run.step == session.total
    asked = None if last or _due(run.step, config.validation_step_interval) else _asking(session)
    try:
        if asked is None or asked:
            with session.timed("validate"), optimizers.averaged(session.optimizers.values()):
                metrics |= validate(run, session.model, session.manager, session.engine, session.attention, asked)
    finally:
        _report(session, log, result, {"seconds": seconds, **metrics})


def _out_of_memory(session: Session, saving: Saving, error: Exception) -> TrainingError:
    """Let go of the step, save what was done before it, and say what would help."""
    run = session.run
    held = memory.held(session)
    memory.release(session, error)
    if session.stepping:
        # Some weights were changed and some were not: they belong in no checkpoint.
        kept = "the optimizer was cut short, so what is in memory was not saved; earlier checkpoints are whole"
    elif run.step == 0:
        kept = "no step was done"
    else:
        done = checkpoint.folder(run.output_dir, run.step)
        if not done.exists() and run.process_count == 1:
            saving.start()
        kept = f"every step that was done is in {done}"
    saving.finish()
    return memory.explained(session, error, held, kept)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _asking(session: Session) -> list[str]:
    """The plugins that want to be asked after this step, beside the run's own validations."""
    step, ended = session.run.step, _epoch_ended(session)
    return [name for name, plugin in session.run.plugins.items() if plugin.validates_at(step, ended)]


def _of_the_base(session: Session) -> dict[str, float]:
    """What the plugins see in the base that want to see it, before the first step."""
    asked = [name for name, plugin in session.run.plugins.items() if plugin.validates_base()]
    if not asked:
        return {}
    session.take_turn()
    base = variants.base(session.model)
    with session.timed("validate"):
        return validate(
            session.run, session.model, session.manager, session.engine, session.attention, asked, weights=base
        )


def _epoch_ended(session: Session) -> int:
    """Epochs done, where this step ended one; else 0."""
    step, epoch_of = session.run.step, session.plan.epoch_of
    return epoch_of(step) if epoch_of(step) > epoch_of(step - 1) else 0


def _tell(session: Session, result: StepResult, seconds: float) -> None:
    """Tell the plugins of the step, before anyone looks at what the model has learnt."""
    measured = {name: getattr(result, name) for name in ("loss", "grad_norm", "learning_rate", "samples")}
    metrics = {**measured, "seconds": seconds, "stages": session.take_seconds(), **result.metrics}
    session.manager.notify("on_step_end", run=session.run, model=session.model, metrics=metrics)


def _report(session: Session, log: StepLog | None, result: StepResult, more: Mapping[str, float]) -> None:
    """The step's line in the log, and the plugins that listen."""
    run = session.run
    if len(more) == 1 and not _due(run.step, run.config.logging_steps) and run.step != session.total:
        return
    line = {"step": run.step, **_line(session, result), **more}
    if log is None:
        return
    for added in session.manager.hook.log_metrics(run=run, line=line):
        line |= added
    log.write(line)
    session.manager.notify("on_log", run=run, line=line)


def _line(session: Session, result: StepResult) -> dict[str, Any]:
    line: dict[str, Any] = {
        "epoch": session.plan.epoch_of(session.run.step - 1),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "samples": result.samples,
        **({"network": session.model.active} if len(session.turns.networks) > 1 else {}),
        **({"skipped": True} if result.skipped else {}),
        **_means(result.metrics),
    }
    peak = max(processes.gather(session.engine.peak_memory() or 0))
    return {**line, "peak_memory_bytes": peak} if peak else line


def _means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What ``compute_loss`` measured: the mean over the processes that have it."""
    everywhere = processes.gather({name: float(value) for name, value in metrics.items()})
    having = Counter(name for each in everywhere for name in each)
    return {name: sum(each.get(name, 0.0) for each in everywhere) / count for name, count in having.items()}


def _stopped(session: Session, interrupt: Interrupt, saved: Path | None) -> Stopped:
    signals = [each for each in processes.gather(interrupt.requested) if each is not None]
    return Stopped(
        f"{signals[0] if signals else 'as asked'}: training ended after step {session.run.step} of {session.total}",
        where=saved,
        remedy="go on with resume_from_checkpoint: latest",
    )
