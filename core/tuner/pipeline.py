"""The flow of a run, left to right: config, plugins, model facts, data, cache, training, saving.

``check`` walks it up to the data, ``cache`` up to the encodings, ``run`` to the end. Whatever can be
refused is refused before any weight is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import attention, output, processes, workload
from tuner.assembly import new_run, settle
from tuner.train import checkpoint, optimizers, schedules

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.data.cached import CachedData
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.manager import Manager
    from tuner.model import Model
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.train.engine import Engine


@dataclass(frozen=True)
class Survey:
    """What is known before any weight is read."""

    run: Run
    spec: ModelSpec
    prepared: Prepared
    plan: Order
    total: int
    """Optimizer steps of the whole run."""


def survey(assembly: Assembly) -> Survey:
    """Configure the plugins, describe the model, look at the data, and plan the epochs.

    Raises the first ConfigError, ModelError or DataError that the user can mend.
    """
    from tuner import flow

    run = new_run(assembly)
    run.optimizers = assembly.manager.registry("optimizers", run)
    run.lr_curves = assembly.manager.registry("lr_curves", run)
    optimizers.check(run)
    schedules.check(run)
    spec = describe(run, assembly.manager)
    flow.check(run.config, spec.networks)
    with output.writable(run.output_dir):
        pass  # plugins write there as soon as the data are known
    hook = assembly.manager.hook
    prepared: Prepared = hook.prepare_data(run=run, spec=spec)
    run.trained_shape = most_frequent_shape(prepared)
    wanted = hook.extra_samples(run=run, spec=spec, data=prepared)
    prepared = replace(prepared, extra=tuple(sample for answer in wanted for sample in answer))
    plan: Order = hook.plan_epochs(run=run, spec=spec, data=prepared, processes=run.replica_count)
    run.total_steps = schedules.total_steps(run.config, plan)
    hook.data_ready(run=run, spec=spec, data=prepared, plan=plan)
    return Survey(run, spec, prepared, plan, run.total_steps)


def describe(run: Run, manager: Manager) -> ModelSpec:
    """The model's facts, put into ``run`` and held against every plugin's keys. Raises ConfigError or ModelError."""
    spec: ModelSpec = manager.hook.describe_model(run=run)
    run.spec = spec
    run.token_selectors = manager.registry("token_selectors", run)
    run.data_sources = manager.registry("data_sources", run)
    run.quantizer = lambda precision: manager.registry("quantizers", run)[precision]
    plain = manager.unwrapped("compute_loss")
    run.plain_loss = lambda model, batch: plain(run=run, model=model, batch=batch)
    run.estimate = partial(workload.of, run, spec, manager)
    run.announcer = partial(manager.announcer, run=run)
    manager.hook.check_model(run=run, spec=spec)
    return spec


def most_frequent_shape(prepared: Prepared) -> tuple[int, int, int] | None:
    """(frames, height, width) that most clips are trained at; of several equally frequent ones the largest."""
    counts = Counter(sample.bucket for sample in prepared.samples)
    if not counts:
        return None
    bucket = max(counts, key=lambda each: (counts[each], each))
    return bucket.frames, bucket.height, bucket.width


def check(assembly: Assembly) -> tuple[Assembly, Survey]:
    """Everything ``run`` does before it reads weights; the plugins say what would happen."""
    settled = settle(assembly)
    return settled, survey(settled)


def cache(assembly: Assembly, *, verify: bool = False) -> None:
    """Encode what is not encoded yet, and stop there. Each of several processes does its share.

    ``verify``: read every entry, also those that were found whole before.
    """
    from tuner.train.engine import Engine

    with processes.joined():
        assembly = settle(assembly)
        with processes.together():
            found = survey(assembly)
        Engine(found.run)
        with processes.together():
            model: Model = assembly.manager.hook.load_model(run=found.run)
        _encode(assembly, found, model, verify=verify)


def run(assembly: Assembly) -> None:
    """The whole job. Raises TunerError for whatever a user can mend."""
    with processes.joined():
        _run(settle(assembly))


def _run(assembly: Assembly) -> None:
    """The job of one process."""
    from tuner import transforms
    from tuner.train import turns
    from tuner.train.engine import Engine

    with processes.together():
        found = survey(assembly)
    resume = _to_resume(assembly, found.run)
    if resume is not None and resume[1]["step"] >= found.total:
        if found.run.is_main:
            print(f"nothing to train: {resume[0]} is at step {found.total} of it; raise max_train_steps to go on")
        assembly.manager.notify("on_run_end", run=found.run, checkpoint=resume[0], error=None)
        return
    with output.lock(found.run), _ended(assembly, found.run) as ended:
        with processes.together():
            engine = Engine(found.run)
            optimizers.rehearse(found.run, engine.device)
            model: Model = assembly.manager.hook.load_model(run=found.run)
            edits = transforms.collect(found.run, model, assembly.manager)
        cached, plan = _encode(assembly, found, model)
        for network in model.networks.values():
            transforms.prepare(found.run, network, edits)
            if len(model.networks) > 1:
                turns.leave(network)  # to the host, until its turn comes
        ended.append(_train(assembly, found, engine, model, cached, plan, resume))


def _to_resume(assembly: Assembly, run: Run) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The checkpoint to go on from; one that is elsewhere is brought into the output folder by a plugin first."""
    wanted = run.config.resume_from_checkpoint
    fetched = False
    with processes.together():
        if run.is_main and wanted not in (None, "latest") and not Path(wanted).is_dir():
            fetched = bool(assembly.manager.hook.fetch_checkpoint(run=run, reference=wanted))
    [fetched] = processes.any_of(fetched)
    with processes.together():
        return checkpoint.find(run.output_dir, "latest" if fetched else wanted)


@contextmanager
def _ended(assembly: Assembly, run: Run) -> Iterator[list[Path]]:
    """Tell the plugins that the run is over, however it ends. Yields a list for the last checkpoint's folder."""
    saved: list[Path] = []
    failure: BaseException | None = None
    try:
        yield saved
    except BaseException as error:
        failure = error
        raise
    finally:
        facts: dict[str, Any] = {"run": run, "checkpoint": saved[0] if saved else None, "error": failure}
        assembly.manager.notify("on_run_end", **facts)


def _encode(assembly: Assembly, found: Survey, model: Model, *, verify: bool = False) -> tuple[CachedData, Order]:
    """Fill the cache and let the plugins read what they asked for; the plan without what could not be encoded."""
    hook = assembly.manager.hook
    with processes.together():
        extra = extra_captions(assembly, found.run)
    facts = {"run": found.run, "model": model, "data": found.prepared, "captions": extra}
    cached: CachedData = hook.fill_cache(**facts, hooks=hook, verify=verify)
    found.run.text_cache, found.run.cached = cached.text, cached
    if cached.prepared is not found.prepared:
        with processes.together():
            left = {"run": found.run, "spec": found.spec, "data": cached.prepared}
            plan = hook.plan_epochs(**left, processes=found.run.replica_count)
            hook.data_ready(**left, plan=plan)
        return cached, plan
    return cached, found.plan


def extra_captions(assembly: Assembly, run: Run) -> list[str]:
    """What the plugins want encoded beside the datasets' captions."""
    return [caption for answer in assembly.manager.hook.extra_captions(run=run) for caption in answer]


def _train(
    assembly: Assembly,
    found: Survey,
    engine: Engine,
    model: Model,
    cached: CachedData,
    plan: Order,
    resume: tuple[Path, dict[str, object], list[str]] | None,
) -> Path:
    """Take back a checkpoint, if there is one, and train to the end."""
    from tuner.data.loader import Loader
    from tuner.train.loop import train
    from tuner.train.session import Session

    run = found.run
    plan.check_until(found.total)  # clips that could not be encoded may have been a dataset's last
    loader = Loader(
        cached,
        plan,
        rank=run.replica_index,
        world=run.replica_count,
        seed=run.config.seed,
        caption_dropout=run.config.caption_dropout_probability,
        device=engine.device,
    )
    manifest = output.manifest(assembly, found)
    backends = assembly.manager.registry("attention_backends", run)
    kernels = attention.choose(run.config.attention_mechanism, run.config.attention_usage, backends)
    session = Session(run, assembly.manager, model, engine, plan, loader, found.total, manifest, kernels)
    if resume is not None:
        path, saved, passed = resume
        session.restore(path)
        run.step = int(str(saved["step"]))
        facts = {"run": run, "checkpoint": path, "saved": saved, "now": manifest, "passed": passed}
        assembly.manager.hook.on_resume(**facts)
    try:
        return train(session)
    finally:
        loader.close()
