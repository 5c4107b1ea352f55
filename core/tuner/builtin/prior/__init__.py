"""Prior preservation: samples of datasets with ``is_regularisation_data`` hold the model to what its base predicts."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from tuner.errors import ConfigError
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.samples import Prepared
    from tuner.model import Batch, Loss, Model
    from tuner.run import Run
    from tuner.spec import ModelSpec


class PriorPreservationPlugin(Plugin[PluginConfig]):
    """Prior preservation: regularisation data hold the model to what its base predicts, instead of teaching it."""

    def __init__(self, name: str, config: PluginConfig) -> None:
        super().__init__(name, config)
        self._holds = False

    @hookimpl
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared) -> None:
        """Refuse regularisation data where the base itself is trained: it is then nowhere to be asked."""
        holding = regularisation_ids(data)
        if not holding:
            return
        if run.config.model_type == "full":
            raise ConfigError(
                f"dataset {holding[0]!r} is regularisation data, which needs an adapter: "
                "with model_type full the base that it would be held to changes",
                where="is_regularisation_data",
                remedy="train a LoRA (model_type: lora), or set is_regularisation_data to false",
            )
        count = sum(sample.dataset_id in holding for sample in data.samples)
        run.log.info("prior preservation: %d of %d samples hold the model to its base", count, len(data.samples))

    @hookimpl
    def on_train_start(self, run: Run, model: Model) -> None:
        """Refuse, before the first step, an adapter that cannot be switched off."""
        self._holds = run.cached is not None and bool(regularisation_ids(run.cached.prepared))
        if self._holds:
            for network in model.networks.values():
                with network.base():
                    pass

    # Last of all wrappers: others may replace the noisy latents, and the base must see what the network sees.
    @hookimpl(wrapper=True, trylast=True)
    def compute_loss(self, model: Model, batch: Batch) -> Generator[None, Loss, Loss]:
        """Put the base's own prediction in the place of the target, for the samples that ask for it."""
        # Each forward of a spread network needs every process: all ask the base where one may have to.
        if any(batch.regularisation) or (self._holds and model.network.sharding is not None):
            from tuner.builtin.prior.target import take_base_as_target

            take_base_as_target(model, batch)
        return (yield)


def regularisation_ids(data: Prepared) -> list[str]:
    """Ids of the regularisation datasets that are trained on, in their order."""
    trained = dict.fromkeys(sample.dataset_id for sample in data.samples)
    return [name for name in trained if name in data.datasets and data.datasets[name].regularisation]
