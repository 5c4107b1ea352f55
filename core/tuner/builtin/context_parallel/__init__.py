"""Context parallelism: several processes share each sample, each with a part of its tokens (Ulysses)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Model, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec


class ContextParallelConfig(PluginConfig):
    """Keys of context parallelism."""

    context_parallel_strategy: Literal["ulysses"] = key(
        "ulysses", "How attention sees all tokens: each process computes some of the heads, over all tokens (Ulysses)."
    )


class ContextParallelPlugin(Plugin[ContextParallelConfig]):
    """Lets several processes share each sample, each with a part of its tokens."""

    Config = ContextParallelConfig
    conflicts: ClassVar[frozenset[str]] = frozenset({"token-router"})

    def __init__(self, name: str, config: ContextParallelConfig) -> None:
        super().__init__(name, config)
        self._group: Any = None

    def is_active(self, core: CoreConfig) -> bool:
        """Whether samples are shared, by what the config says: a conflict shows on one process too."""
        return core.context_parallel_size > 1

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse processes that cannot be divided into groups; say where nothing is shared."""
        size, count = run.config.context_parallel_size, run.process_count
        if size == 1:
            return
        if count == 1:
            run.log.warning("context_parallel_size does nothing: this run is one process")
        elif count % size:
            raise ConfigError(
                f"context_parallel_size is {size}, and {count} processes cannot be divided into groups of {size}",
                allowed=[each for each in range(1, count + 1) if count % each == 0],
            )

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Refuse a number of processes that the heads cannot be divided by."""
        size = run.config.context_parallel_size
        for network in spec.networks:
            if network.heads % size:
                raise ConfigError(
                    f"context_parallel_size is {size}, and the {network.heads} attention heads of network "
                    f"{network.name!r} cannot be divided by it",
                    allowed=[each for each in range(1, network.heads + 1) if network.heads % each == 0],
                )

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Divide the tokens of each network. Raises ConfigError where its attention has no place for the exchange."""
        if run.sharing == 1:
            return []
        from tuner.builtin.context_parallel.ulysses import attach, group_of, has_place
        from tuner.model import Stage, Transform

        for network in model.networks.values():
            if not has_place(network):
                raise ConfigError(
                    f"context_parallel_size is {run.sharing}, and the attention of network {network.name!r} does not "
                    "go through diffusers' dispatcher, where the processes exchange their tokens",
                    remedy="leave context_parallel_size out",
                )
        self._group = self._group or group_of(run)
        return [
            Transform(
                stage=Stage.REWRITE,
                name="context parallel",
                claims=frozenset({"sequence"}),
                apply=lambda network: attach(network, self._group),
            )
        ]
