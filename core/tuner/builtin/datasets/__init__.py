"""Datasets as people have them: from the list in ``data_backend_config`` to the samples of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.run import Run
    from tuner.spec import ModelSpec


PRIOR = "prior_preservation"
"""Whoever holds the model to its base on regularisation data."""
EVALUATION = "evaluation"
"""Whoever measures the loss on held-out data."""


class DatasetsPlugin(Plugin[PluginConfig]):
    """Finds, probes, captions and buckets the files of ``data_backend_config``."""

    @hookimpl
    def prepare_data(self, run: Run, spec: ModelSpec) -> Prepared:
        """Everything between people's folders and the samples of the run."""
        from tuner.builtin.datasets.prepare import prepare

        return prepare(run.config, spec, run.data_sources, show_progress=run.is_main)

    @hookimpl
    def data_ready(self, run: Run, data: Prepared) -> None:
        """Say when the plugin that regularisation data, or held-out data, are for is left out."""
        holding = [name for name, dataset in data.datasets.items() if dataset.regularisation]
        if holding and PRIOR not in run.plugins:
            run.log.warning(
                "dataset %r is regularisation data, and the plugin %s is left out: it is trained on like any other",
                holding[0],
                PRIOR,
            )
        unseen = dict.fromkeys(sample.dataset_id for sample in data.held_out)
        if unseen and EVALUATION not in run.plugins:
            run.log.warning(
                "nothing measures the loss on %s: load the plugin %s (one of its keys does, such as eval_timesteps: 4)",
                " and ".join(map(repr, unseen)),
                EVALUATION,
            )
