"""Other weights beside the trained ones, put in place in turn where a run is validated or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.manager import Manager
    from tuner.model import Model
    from tuner.run import Run

Variants = Mapping[str, Callable[[], AbstractContextManager[None]]]
BASE = "base"
"""What training starts from."""


def offered(run: Run, model: Model, manager: Manager, purpose: str) -> Variants:
    """What there is for ``purpose``: the trained weights, unless a plugin answers ``weight_variants``."""
    answer: Variants | None = manager.hook.weight_variants(run=run, model=model, purpose=purpose)
    return {"": nullcontext} if answer is None else answer


@contextmanager
def in_place(run: Run, variants: Variants, name: str) -> Iterator[None]:
    """While entered, the weights of that name are the network's, and the run says so."""
    with variants[name]():
        run.variant = name
        try:
            yield
        finally:
            run.variant = ""


def base(model: Model) -> Variants:
    """The networks without their adapters; one that is itself trained is its own base before the first step."""

    @contextmanager
    def without_adapters() -> Iterator[None]:
        with ExitStack() as stack:
            for network in model.networks.values():
                if network.adapter is not None and network.adapter.disabled is not None:
                    stack.enter_context(network.adapter.disabled())
            yield

    return {BASE: without_adapters}
