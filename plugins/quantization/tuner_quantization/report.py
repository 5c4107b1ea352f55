"""What quantising did: bytes saved, and how far the network's output is from the unquantised one's.

The first batch of the run goes through the network twice, without gradients: as it is, and with each block's weights
as they were read, block after block. So the two networks are never in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tuner.blocks import Residency
    from tuner.model import Batch, Model, Network
    from tuner_quantization.layers import LinearSink

LARGE = 0.05
"""Relative output error from which the run warns."""
MIB = 2**20


class FullPrecision:
    """A residency that gives each block its weights as they were read, around another one that may move the rest."""

    def __init__(self, network: Network, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self._inner, self._device, self._source = network.residency, device, network.weights
        self.streamed: Set[int] = frozenset() if self._inner is None else self._inner.streamed
        names = {each: name for name, each in network.module.named_modules()}
        prefixes = [f"{names[block]}." for block in network.stack.blocks]
        self._layers = [{name: each for name, each in layers.items() if name.startswith(prefix)} for prefix in prefixes]
        self._own = {layer: vars(layer).get("forward") for layer in layers.values()}

    def begin(self, differentiated: bool) -> None:
        """See ``tuner.blocks.Residency``."""
        self._pass(lambda inner: inner.begin(differentiated))

    def enter(self, index: int) -> None:
        """Block ``index`` computes with the weights of the file."""
        self._pass(lambda inner: inner.enter(index))
        wanted = self._layers[index]
        for name, tensor in self._source():
            layer = wanted.get(name.removesuffix(".weight"))
            if layer is not None and name.endswith(".weight"):
                weight = tensor.to(self._device)
                # On the instance: a layer of PEFT around it calls it like any other module.
                object.__setattr__(layer, "forward", partial(_plain, weight=weight, bias=layer._parameters["bias"]))

    def leave(self, index: int) -> None:
        """Back to what is stored."""
        self.restore(self._layers[index].values())
        self._pass(lambda inner: inner.leave(index))

    def backward_done(self, index: int) -> None:
        """Never: there is no backward."""

    def end(self, differentiated: bool) -> None:
        """See ``tuner.blocks.Residency``."""
        self._pass(lambda inner: inner.end(differentiated))

    def restore(self, layers: Iterable[nn.Module]) -> None:
        """Give ``layers`` back the forward that they had: their class's, or one of another plugin."""
        for layer in layers:
            vars(layer).pop("forward", None)
            if self._own[layer] is not None:
                object.__setattr__(layer, "forward", self._own[layer])

    def _pass(self, call: Callable[[Residency], None]) -> None:
        if self._inner is not None:
            call(self._inner)


def _plain(rows: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(rows, weight.to(rows), None if bias is None else bias.to(rows))


@contextmanager
def _unquantised(network: Network, layers: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    before = network.residency
    network.residency = plain = FullPrecision(network, layers, device)
    try:
        yield
    finally:
        network.residency = before
        plain.restore(layers.values())


@torch.no_grad()
def output_error(model: Model, network: Network, layers: Mapping[str, nn.Module], batch: Batch) -> float:
    """Norm of the difference of the two predictions for ``batch``, over the norm of the unquantised one."""
    device = batch.latents.device
    predictions = []
    for context in (nullcontext(), _unquantised(network, layers, device)):
        with context, network.inference():
            predictions.append(model.predict(batch).float())
    found, exact = predictions
    return float((found - exact).norm() / exact.norm())


def line(network: str, precision: str, sink: LinearSink, error: float) -> str:
    """The report, in one line."""
    before, after = sink.bytes_read / MIB, sink.bytes_stored / MIB
    return (
        f"{network} in {precision}: {len(sink.layers)} layers, {before:.0f} MiB as {after:.0f} MiB, "
        f"output differs by {100 * error:.2f} %"
    )
