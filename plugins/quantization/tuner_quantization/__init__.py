"""Quantised frozen bases: one plugin for each backend, served to the core's registry of quantisers.

The weights of the blocks' Linear layers are quantised one by one as they are read, so that the
full-precision network never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Network, Sink
    from tuner.run import Run

QUANTO_VALUES = frozenset({"int8-quanto", "fp8-quanto"})


def _quanto_installed() -> bool:
    # Asked in two steps: a submodule of a missing package raises instead of being None.
    return find_spec("optimum") is not None and find_spec("optimum.quanto") is not None


class QuantoPlugin(Plugin[PluginConfig]):
    """8-bit weights of the frozen base (int8 or fp8, scaled per output channel) by optimum-quanto."""

    requires: ClassVar[frozenset[str]] = frozenset({"model-family"})
    values: ClassVar[Mapping[str, frozenset[str]]] = {"base_model_precision": QUANTO_VALUES}

    def is_active(self, core: CoreConfig) -> bool:
        """Only when one of its precisions is chosen."""
        return core.base_model_precision in QUANTO_VALUES

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse full-rank training on a quantised base, and a machine without the package."""
        if not self.is_active(run.config):
            return
        where = f"base_model_precision: {run.config.base_model_precision}"
        if run.config.model_type == "full":
            raise ConfigError(
                "quantised weights cannot be trained, and `model_type: full` trains them",
                where=where,
                remedy="use `model_type: lora`, or `base_model_precision: no_change`",
            )
        if not _quanto_installed():
            raise ConfigError(
                "the package optimum-quanto is not installed",
                where=where,
                remedy="pip install difftuner[quanto]",
            )

    @hookimpl
    def quantizers(self, run: Run) -> Mapping[str, Callable[[Network], Sink]]:
        """``int8-quanto`` and ``fp8-quanto``; quanto itself is imported when one of them is used."""

        def sink_of(qtype: str) -> Callable[[Network], Sink]:
            def make(network: Network) -> Sink:
                from tuner_quantization.quanto import QuantoSink

                return QuantoSink(network, qtype, device=run.device, dtype=run.dtype)

            return make

        return {"int8-quanto": sink_of("qint8"), "fp8-quanto": sink_of("qfloat8_e4m3fn")}
