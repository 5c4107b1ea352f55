"""A text encoder that streams while captions are encoded: two of its blocks are on the device at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from tuner.errors import ConfigError
from tuner.model import Component, Model, Network
from tuner_offload.host import HostStore
from tuner_offload.masters import make_master
from tuner_offload.ring import Ring
from tuner_offload.schedule import RING_GROUPS
from tuner_offload.staged import staged_copier
from tuner_offload.streaming import BlockStreaming

if TYPE_CHECKING:
    from tuner.run import Run

GIB = 2**30


def stream_text_encoders(run: Run, model: Model) -> None:
    """Let the components that encode captions stream. Raises ConfigError where the family has no way for it."""
    for name in model.spec.encoders.get("text", ()):
        component = model.components[name]
        if component.on_host is None:
            raise ConfigError(
                f"the {name.replace('_', ' ')} of family {model.spec.family!r} cannot be streamed",
                where="text_encoder_offload: true",
                remedy="leave text_encoder_offload out",
            )
        model.components[name] = replace(component, around=partial(_streamed, run, component.on_host))


@contextmanager
def _streamed(run: Run, on_host: Callable[[], tuple[Any, Network]], _: Component) -> Iterator[Any]:
    """The component, with its blocks in host memory and hooks that bring them to the device in turn."""
    held, network = on_host()
    masters = [
        make_master(network, [(index, block)], HostStore(pinned=False))
        for index, block in enumerate(network.stack.blocks)
    ]
    # Not pinned: it is only there for a phase, and two pinned buffers are filled as fast as they are sent.
    ring = Ring(RING_GROUPS, run.device, staged_copier(run.device, use_stream=True))
    residency = BlockStreaming(masters, ring, blocks=len(masters))
    _place_rest(network, run.device)
    run.log.info(
        "%s streams: %.2f GiB of blocks in host memory, %.2f GiB on %s at any time",
        network.name,
        sum(master.nbytes for master in masters) / GIB,
        ring.nbytes / GIB,
        run.device,
    )
    hooks = _watch(network, residency, run.device)
    try:
        yield held
    finally:
        # The modules know the residency by these, and it knows them: a circle that would hold on to the memory.
        for hook in hooks:
            hook.remove()
        ring.copier.finish()


def _place_rest(network: Network, device: torch.device) -> None:
    """Bring what lies outside of the blocks to ``device``, but tables of words, which are large and read in part."""
    inside = {each for block in network.stack.blocks for each in block.modules()}
    for owner in network.module.modules():
        if owner in inside or isinstance(owner, nn.Embedding):
            continue
        for parameter in owner._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(device)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)


def _watch(network: Network, residency: BlockStreaming, device: torch.device) -> list[Any]:
    """Hooks that tell ``residency`` which block runs, and bring its inputs to ``device``."""

    def enter(index: int, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        residency.enter(index)
        return send_to_device((args, kwargs), device)  # type: ignore[no-any-return]

    hooks: list[Any] = [
        network.module.register_forward_pre_hook(lambda *_: residency.begin(False)),
        network.module.register_forward_hook(lambda *_: residency.end(False)),
    ]
    for index, block in enumerate(network.stack.blocks):
        hooks.append(block.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda *_, index=index: residency.leave(index)))
    return hooks
