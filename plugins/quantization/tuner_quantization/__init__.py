"""Quantised frozen bases: one plugin for each backend, served to the core's registry of quantisers.

The weights of the blocks' Linear layers are quantised one by one as they are read, so that the
full-precision network never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Batch, Loss, Model, Network, Sink
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload
    from tuner_quantization.layers import LinearSink


@dataclass(frozen=True)
class Precision:
    """One value of ``base_model_precision``."""

    sink: str
    """``module:Class`` of its sink, in this package."""
    bytes: float
    """per weight, its scales included"""
    cuda: bool = False
    """whether it needs a CUDA device"""
    package: str | None = None
    """a module it needs beside the plugin's own, and the name to install"""
    capability: tuple[int, int] = (0, 0)
    """the least of a CUDA device"""


class QuantisationPlugin(Plugin[PluginConfig]):
    """A backend. A subclass says which precisions it has, and what they need."""

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    precisions: ClassVar[Mapping[str, Precision]] = {}
    needs: ClassVar[Mapping[str, str]] = {}
    """Modules that it needs -> what to install."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._sinks: dict[str, LinearSink] = {}

    def is_active(self, core: CoreConfig) -> bool:
        """Only when one of its precisions is chosen."""
        return any(self._chosen(core))

    def _chosen(self, core: CoreConfig) -> Iterator[str]:
        """The keys that name one of its precisions."""
        keys = ("base_model_precision", "text_encoder_1_precision")
        return (key for key in keys if getattr(core, key) in self.precisions)

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse full-rank training on a quantised base, and a machine that cannot run the backend."""
        for key in self._chosen(run.config):
            value = getattr(run.config, key)
            where = f"{key}: {value}"
            if key == "base_model_precision" and run.config.model_type == "full":
                raise ConfigError(
                    "quantised weights cannot be trained, and `model_type: full` trains them",
                    where=where,
                    remedy="use `model_type: lora`, or `base_model_precision: no_change`",
                )
            needs = dict(self.needs)
            if package := self.precisions[value].package:
                needs[package] = f"pip install {package}"
            for module, install in needs.items():
                if not _installed(module):
                    raise _cannot(f"it needs the package {module}, which is not installed", where, install)
            if self.precisions[value].cuda and not _cuda():
                raise _cannot("it needs a CUDA device", where, None)
            least = self.precisions[value].capability
            if least > (0, 0) and (own := _capability()) and own < least:
                wanted, found = (".".join(map(str, each)) for each in (least, own))
                raise _cannot(f"it needs compute capability {wanted}, and this device has {found}", where, None)

    @hookimpl
    def quantizers(self, run: Run) -> Mapping[str, Callable[[Network], Sink]]:
        """Its precisions; the library itself is imported when one of them is used."""
        return {value: partial(self._sink, run, value) for value in self.precisions}

    def _sink(self, run: Run, value: str, network: Network) -> Sink:
        import torch

        module, _, name = self.precisions[value].sink.partition(":")
        cls: type[LinearSink] = getattr(import_module(f"tuner_quantization.{module}"), name)
        via = torch.device("cpu") if run.config.quantize_via == "cpu" else run.device
        sink = cls.of(network, device=run.device, via=via, dtype=run.dtype)
        if run.spec is not None and network.spec in run.spec.networks:  # else it would outlive a text encoder
            self._sinks[network.name] = sink
        return sink

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Bytes of a weight."""
        chosen = self.precisions.get(run.config.base_model_precision)
        return {} if chosen is None else {"weight_bytes": chosen.bytes}

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run, model: Model, batch: Batch) -> Generator[None, Loss, Loss]:
        """Before a network's first batch is trained on, say what quantising did to its output."""
        sink = self._sinks.pop(model.network.name, None)
        if sink is not None and run.config.base_model_precision in self.precisions:
            self._report(run, model, batch, sink)
        return (yield)

    def _report(self, run: Run, model: Model, batch: Batch, sink: LinearSink) -> None:
        from tuner_quantization.report import LARGE, line, output_error

        network = model.network
        error = output_error(model, network, sink.layers, batch)
        if not run.is_main:
            return
        run.log.info("%s", line(network.name, run.config.base_model_precision, sink, error))
        if not error < LARGE:
            run.log.warning(
                "%s changes the output of %s by %.1f %%: what is trained on it may not fit the unquantised model; "
                "fp8-scaled and int8 change it least",
                run.config.base_model_precision,
                network.name,
                100 * error,
            )


class QuantoPlugin(QuantisationPlugin):
    """8-bit and 4-bit weights of the frozen base by optimum-quanto."""

    precisions: ClassVar[Mapping[str, Precision]] = {
        "int8-quanto": Precision("quanto:Int8Sink", 1.0),
        "fp8-quanto": Precision("quanto:Fp8Sink", 1.0),
        "int4-quanto": Precision("quanto:Int4Sink", 0.625),
    }
    needs: ClassVar[Mapping[str, str]] = {"optimum.quanto": "pip install difftuner[quanto]"}
    values: ClassVar[Mapping[str, frozenset[str]]] = {
        "base_model_precision": frozenset(precisions),
        "text_encoder_1_precision": frozenset(precisions),
    }
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"base_model_precision": "int8-quanto"},)


class TorchaoPlugin(QuantisationPlugin):
    """Weight-only int8, fp8 and int4 of the frozen base by torchao."""

    precisions: ClassVar[Mapping[str, Precision]] = {
        "int8-torchao": Precision("torchao:Int8Sink", 1.0),
        "fp8-torchao": Precision("torchao:Fp8Sink", 1.0),
        "int4-torchao": Precision("torchao:Int4Sink", 0.5625, cuda=True, package="mslk"),
    }
    needs: ClassVar[Mapping[str, str]] = {"torchao": "pip install difftuner[torchao]"}
    values: ClassVar[Mapping[str, frozenset[str]]] = {
        "base_model_precision": frozenset(precisions),
        "text_encoder_1_precision": frozenset(precisions),
    }


class BitsandbytesPlugin(QuantisationPlugin):
    """4-bit NormalFloat (arXiv:2305.14314) and int8 weights of the frozen base by bitsandbytes."""

    precisions: ClassVar[Mapping[str, Precision]] = {
        "int8-bnb": Precision("bitsandbytes:Int8Sink", 1.0),
        "nf4-bnb": Precision("bitsandbytes:Nf4Sink", 0.516),
    }
    needs: ClassVar[Mapping[str, str]] = {"bitsandbytes": "pip install difftuner[bitsandbytes]"}
    values: ClassVar[Mapping[str, frozenset[str]]] = {
        "base_model_precision": frozenset(precisions),
        "text_encoder_1_precision": frozenset(precisions),
    }
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"base_model_precision": "nf4-bnb"},)


class Fp8ScaledPlugin(QuantisationPlugin):
    """float8 weights of the frozen base with a float32 scale for each 64 inputs: needs no library."""

    precisions: ClassVar[Mapping[str, Precision]] = {"fp8-scaled": Precision("fp8_scaled:Fp8ScaledSink", 1.0625)}
    values: ClassVar[Mapping[str, frozenset[str]]] = {
        "base_model_precision": frozenset(precisions),
        "text_encoder_1_precision": frozenset(precisions),
    }
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"base_model_precision": "fp8-scaled"},)


class ProductsPlugin(QuantisationPlugin):
    """Products in int8 or fp8 for the frozen base, forward and for gradients: faster, where matrices are the step."""

    precisions: ClassVar[Mapping[str, Precision]] = {
        "int8-products": Precision("products:Int8ProductSink", 1.0, capability=(8, 0)),
        "fp8-products": Precision("products:Fp8ProductSink", 2.0, capability=(8, 9)),
    }
    values: ClassVar[Mapping[str, frozenset[str]]] = {"base_model_precision": frozenset(precisions)}


def _cannot(why: str, where: str, install: str | None) -> ConfigError:
    """The error for a backend that cannot run here, with those that can."""
    plugins = (Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin, BitsandbytesPlugin, ProductsPlugin)
    runs = [
        value
        for plugin in plugins
        if all(map(_installed, plugin.needs))
        for value, precision in plugin.precisions.items()
        if not precision.cuda
    ]
    return ConfigError(
        f"this precision cannot be used here: {why}",
        where=where,
        allowed=f"what runs here: {', '.join(runs)}",
        remedy=install or "choose one of those",
    )


def _installed(module: str) -> bool:
    # From the outside in: a submodule of a missing package raises instead of being None.
    parts = module.split(".")
    return all(find_spec(".".join(parts[: end + 1])) is not None for end in range(len(parts)))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _capability() -> tuple[int, int] | None:
    """Of the CUDA device; None without one."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
