"""The order of training: what an epoch holds, how batches are cut, and which step trains on which of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.run import Run
    from tuner.spec import ModelSpec


class EpochsPlugin(Plugin[PluginConfig]):
    """Orders the samples into epochs and batches, by seed and position alone."""

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse keys about batches that contradict each other."""
        from tuner.builtin.epochs.plan import check_keys

        check_keys(run.config)

    @hookimpl
    def plan_epochs(self, run: Run, spec: ModelSpec, data: Prepared, processes: int) -> Order:
        """The plan of all epochs; refuses datasets that are smaller than a step.

        Once files were left out because they could not be encoded, what is too small is filled up instead: nobody
        should lose an hour of encoding to it.
        """
        from tuner.builtin.epochs.plan import Plan, check_sizes

        core, network = run.config, spec.networks[0]
        if run.cached is None:
            check_sizes(data, core, processes)
        return Plan(
            data.samples,
            data.datasets,
            seed=core.seed,
            batch_size=core.train_batch_size,
            accumulation=core.gradient_accumulation_steps,
            world=processes,
            drop_small_buckets=core.small_buckets == "drop",
            batch_tokens=core.batch_tokens,
            tokens=lambda each: network.tokens(*spec.latents.shape(each.frames, each.height, each.width)[1:]),
        )
