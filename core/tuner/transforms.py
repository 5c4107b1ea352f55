"""Applying the edits that plugins declare: sorted by stage, claims checked, each one logged.

The order comes from the stages alone, never from the order in which plugins were named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner import rng
from tuner.errors import ConfigError, PluginError
from tuner.materialise import materialise
from tuner.model import Model, Network, Stage, Transform

if TYPE_CHECKING:
    from tuner.manager import Manager
    from tuner.run import Run


def collect(run: Run, model: Model, manager: Manager) -> list[Transform]:
    """Every loaded plugin's transforms, the quantiser's included, in the order of application.

    Raises PluginError where two claim one thing, ConfigError where a network would have nothing to train:
    both before any weight is read.
    """
    found = declared(run, model, manager)
    for network in model.networks.values():
        _check(run, network, of(network, found))
    return found


def declared(run: Run, model: Model, manager: Manager) -> list[Transform]:
    """The same for a model that need not be trained. Raises PluginError where two claim one thing."""
    answers = manager.collect("model_transforms", run=run, model=model)
    found = [transform for _, answer in answers for transform in answer]
    quantiser = _quantiser(run)
    if quantiser is not None:
        found.append(quantiser)
    for network in model.networks.values():
        _check_claims(network, of(network, found))
    return sorted(found, key=lambda transform: (transform.stage, transform.name))


def of(network: Network, transforms: Sequence[Transform]) -> list[Transform]:
    """Those of ``transforms`` that apply to ``network``."""
    return [each for each in transforms if each.networks is None or network.name in each.networks]


def _quantiser(run: Run) -> Transform | None:
    """The transform of ``base_model_precision``, from the registry of quantisation backends."""
    precision = run.config.base_model_precision
    if precision == "no_change":
        return None
    assert run.quantizer is not None, "the model is not described yet"
    return Transform(
        stage=Stage.QUANTIZE,
        name=precision,
        claims=frozenset({"base_weights"}),
        apply=lambda network: None,
        sink=run.quantizer(precision),
    )


def _check_claims(network: Network, transforms: Sequence[Transform]) -> None:
    owner: dict[str, str] = {}
    for transform in transforms:
        for claim in sorted(transform.claims):
            if claim in owner:
                thing = claim.replace("_", " ")
                raise PluginError(
                    f"{owner[claim]!r} and {transform.name!r} both change the {thing} of network {network.name!r}",
                    remedy="unload one of them with --without",
                )
            owner[claim] = transform.name


def _check(run: Run, network: Network, transforms: Sequence[Transform]) -> None:
    config, stages = run.config, {transform.stage for transform in transforms}
    if config.checkpointing in ("selective", "offload") and Stage.CHECKPOINT not in stages:
        raise ConfigError(
            f"gradient_checkpointing {config.checkpointing!r} is served by no loaded plugin",
            allowed="true and false; the built-in plugin checkpointing serves selective and offload",
        )
    if Stage.ADAPT not in stages:
        raise ConfigError(
            f"no loaded plugin trains network {network.name!r} with model_type {config.model_type!r} "
            f"and lora_type {config.lora_type!r}",
            allowed="model_type lora with lora_type standard, or model_type full (the built-in plugins lora and full)",
            remedy="load a plugin that does, or change the two keys",
        )


def prepare(run: Run, network: Network, transforms: Sequence[Transform]) -> None:
    """Materialise ``network`` and apply those of ``transforms`` that are for it, in the order given."""
    mine = of(network, transforms)
    sinks = [each.sink(network) for each in mine if each.sink is not None]
    materialise(network, device=run.device, sinks=sinks)
    for transform in mine:
        # What a transform draws (adapter initialisation) must not depend on what ran before it.
        rng.seed_global(run.config.seed, f"transform.{transform.name}.{network.name}")
        adapter = transform.apply(network)
        if adapter is not None:
            network.adapter = adapter
        run.log.debug("%s: %s applied to %s", transform.stage.name, transform.name, network.name)
