"""A run brought to where it takes its first step, for tests that look at batches, losses and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tuner import pipeline, transforms
from tuner.assembly import assemble
from tuner.builtin.encoding.fill import build_cache
from tuner.data.loader import Loader
from tuner.train.engine import Engine
from tuner.train.session import Session

if TYPE_CHECKING:
    from tuner.model import Model


@contextmanager
def opened(
    settings: Mapping[str, Any], *, without: Sequence[str] = (), rank: int = 0, world: int = 1
) -> Iterator[Session]:
    """A training session of the flat config ``settings``: data cached, weights read, adapters attached, nothing saved.

    Arguments
        without: plugins to leave out.
        rank, world: which of how many processes this one stands for; there is no other.
    """
    assembly = assemble(settings, without=without)
    found = pipeline.survey(assembly)
    run, hook = found.run, assembly.manager.hook
    engine = Engine(run)
    model: Model = hook.load_model(run=run)
    edits = transforms.collect(run, model, assembly.manager)
    cached = build_cache(run, model, hook, found.prepared, show_progress=False)
    run.text_cache, run.cached = cached.text, cached
    run.place(engine.device, engine.dtype, rank, world)
    for network in model.networks.values():
        transforms.prepare(run, network, edits)
    plan = hook.plan_epochs(run=run, spec=found.spec, data=cached.prepared, processes=world)
    dropout, seed = run.config.caption_dropout_probability, run.config.seed
    loader = Loader(cached, plan, rank=rank, world=world, seed=seed, caption_dropout=dropout, device=engine.device)
    try:
        yield Session(run, assembly.manager, model, engine, plan, loader, found.total, {})
    finally:
        loader.close()
