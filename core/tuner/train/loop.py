"""The training loop: step, log, validate, checkpoint, until the end or until someone asks to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import Stopped, TrainingError
from tuner.train import checkpoint, memory, optimizers
from tuner.train.interrupt import Interrupt, watch
from tuner.train.log import StepLog
from tuner.train.session import Session
from tuner.train.step import StepResult, train_step
from tuner.validate.stage import validate


def train(session: Session) -> Path:
    """Train to the last step. Returns the folder of the last checkpoint.

    Raises Stopped, with everything saved, when SIGINT or SIGTERM asked for it.

    Validation comes before the checkpoint of the same step: a run killed in between repeats it.
    """
    run, config = session.run, session.run.config
    log = StepLog(run.output_dir, resumed_at=run.step)
    session.manager.hook.on_train_start(run=run, model=session.model)
    saved: Path | None = None
    with watch() as interrupt:
        while run.step < session.total and interrupt.requested is None:
            try:
                _iterate(session, log)
                if run.step == session.total or interrupt.requested or _due(run.step, config.checkpoint_step_interval):
                    saved = save(session)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                raise _out_of_memory(session, error) from None
    log.close()
    if run.step < session.total:
        raise _stopped(session, interrupt, saved)
    session.manager.hook.on_train_end(run=run, model=session.model)
    assert saved is not None  # the last step always saves
    return saved


def _iterate(session: Session, log: StepLog) -> None:
    """One step, its validation if one is due, and its line in the log, which is written even where that fails."""
    run, config = session.run, session.run.config
    began = time.perf_counter()
    result = train_step(session)
    run.step += 1
    seconds = time.perf_counter() - began
    last = run.step == session.total
    asked = None if last or _due(run.step, config.validation_step_interval) else _asking(session)
    metrics: dict[str, float] = {}
    try:
        if asked is None or asked:
            with optimizers.averaged(session.optimizers.values()):
                metrics = validate(run, session.model, session.manager, session.engine, session.attention, asked)
    finally:
        _report(session, log, result, {"seconds": round(seconds, 4), **metrics})


def _out_of_memory(session: Session, error: Exception) -> TrainingError:
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
        kept = f"every step that was done is in {done if done.exists() else save(session)}"
    return memory.explained(session, error, held, kept)


def save(session: Session) -> Path:
    """Write the checkpoint of this step, then prune the oldest beyond the limit."""
    run = session.run
    target = checkpoint.folder(run.output_dir, run.step)
    with checkpoint.writing(target, {"step": run.step, **session.manifest}) as directory:
        session.save_into(directory)
    for path in checkpoint.prune(run.output_dir, run.config.checkpoints_total_limit):
        run.log.info("removed %s (checkpoints_total_limit %d)", path, run.config.checkpoints_total_limit)
    return target


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _asking(session: Session) -> list[str]:
    """The plugins that want to be asked after this step, beside the run's own validations."""
    step, epoch_of = session.run.step, session.plan.epoch_of
    ended = epoch_of(step) if epoch_of(step) > epoch_of(step - 1) else 0
    return [name for name, plugin in session.run.plugins.items() if plugin.validates_at(step, ended)]


def _report(session: Session, log: StepLog, result: StepResult, more: Mapping[str, float]) -> None:
    """The step's line in the log, and the plugins that listen."""
    run = session.run
    measured = {name: getattr(result, name) for name in ("loss", "grad_norm", "learning_rate", "samples")}
    metrics = {**measured, "seconds": more["seconds"], **result.metrics}
    session.manager.notify("on_step_end", run=run, model=session.model, metrics=metrics)
    if len(more) == 1 and not _due(run.step, run.config.logging_steps) and run.step != session.total:
        return
    line = {"step": run.step, **_line(session, result), **more}
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
        **{name: float(value) for name, value in result.metrics.items()},
    }
    peak = session.engine.peak_memory()
    return line if peak is None else {**line, "peak_memory_bytes": peak}


def _stopped(session: Session, interrupt: Interrupt, saved: Path | None) -> Stopped:
    return Stopped(
        f"{interrupt.requested}: training ended after step {session.run.step} of {session.total}",
        where=saved,
        remedy="go on with resume_from_checkpoint: latest",
    )
