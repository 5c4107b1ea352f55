"""Gradient release: each parameter is stepped in backward, so that one gradient is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    import torch

    from tuner.config.keys import CoreConfig
    from tuner.data.samples import Prepared
    from tuner.model import Network
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.train.optimizers import GradientRelease
    from tuner.workload import Workload


class GradientReleaseConfig(PluginConfig):
    """Keys of gradient release."""

    gradient_release: bool = key(
        False,
        "Step each parameter as soon as backward has its gradient, and free the gradient: for `model_type: full`, "
        "without accumulation, and clipped by value or not at all.",
        effect="memory",
    )


class GradientReleasePlugin(Plugin[GradientReleaseConfig]):
    """Full fine-tuning with one gradient in memory at a time."""

    Config = GradientReleaseConfig

    def is_active(self, core: CoreConfig) -> bool:
        """Whether gradients are released."""
        return self.config.gradient_release

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what needs all gradients at once."""
        if self.config.gradient_release:
            if run.process_count > 1:
                raise ConfigError(
                    f"{run.process_count} processes were launched, and released gradients cannot be summed over them",
                    where="gradient_release: true",
                    remedy="leave gradient_release out; fsdp_enable: true spreads gradients over the processes",
                )
            for what, remedy in self._refused(run.config):
                raise ConfigError(what, where="gradient_release: true", remedy=remedy)

    def _refused(self, core: CoreConfig) -> Iterator[tuple[str, str]]:
        """(what does not go with it, what to do)."""
        drop = "leave gradient_release out"
        if core.model_type != "full":
            yield "gradient_release is for model_type full: the gradients of an adapter are small", drop
        if core.gradient_accumulation_steps > 1:
            yield (
                f"gradient_accumulation_steps is {core.gradient_accumulation_steps}, and released gradients cannot be "
                "added up",
                "set gradient_accumulation_steps: 1 and a larger train_batch_size",
            )
        if core.max_grad_norm and core.grad_clip_method == "norm":
            yield (
                f"max_grad_norm is {core.max_grad_norm:g}, and the norm of all gradients is known when they are gone",
                "set max_grad_norm: 0, or grad_clip_method: value",
            )
        if "gradient_release" in core.optimizer_config:
            yield (
                "optimizer_config holds 'gradient_release' too, which is the optimizer's own way to do it",
                "leave it out of optimizer_config",
            )

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared) -> None:
        """Refuse an optimizer that looks at all gradients, and weights that stream from the host."""
        if not self.config.gradient_release:
            return
        from tuner.train import optimizers

        if optimizers.check(run).needs_all_gradients:
            raise ConfigError(
                f"optimizer {run.config.optimizer!r} looks at all gradients at once, and gradient_release frees each",
                remedy="choose another optimizer, such as adamw or bnb-adamw8bit, or leave gradient_release out",
            )
        if run.estimate is None or not data.samples:
            return
        bucket = data.samples[0].bucket
        if any(run.estimate(network, bucket, 1).resident_blocks is not None for network in spec.networks):
            raise ConfigError(
                "the weights of blocks stream from the host, and their gradients go there: none stays on the device",
                where="gradient_release: true",
                remedy="leave gradient_release out, or leave offloading out",
            )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """That gradients take no room."""
        return {"gradients_released": True} if self.config.gradient_release else {}

    @hookimpl
    def gradient_release(self, run: Run, network: Network, optimizer: torch.optim.Optimizer) -> GradientRelease | None:
        """Steps in backward, where that is configured."""
        if not self.config.gradient_release:
            return None
        from tuner.builtin.gradient_release.release import Release

        return Release(optimizer, clip_value=run.config.max_grad_norm)
