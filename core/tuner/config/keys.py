"""CoreConfig: every key that the core owns, put together from its sections."""

from __future__ import annotations

from tuner.config.data_keys import DataKeys
from tuner.config.model_keys import ModelKeys
from tuner.config.train_keys import FlowKeys, TrainKeys
from tuner.config.validation_keys import ValidationKeys
from tuner.plugin import key


class CoreConfig(ModelKeys, DataKeys, TrainKeys, FlowKeys, ValidationKeys):
    """All core keys, frozen. Plugins read them at ``run.config``."""

    plugins: list[str] | None = key(
        None, "Plugins to load, exactly these beside the built-in ones; assembled from the other keys when absent."
    )
    without: list[str] = key([], "Plugins to leave out, built-in ones included; their keys are set aside.")
    strict: bool = key(False, "Make keys and values of plugins that are not loaded an error.")
