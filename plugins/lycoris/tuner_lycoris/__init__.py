"""LyCORIS adapters (LoKr, LoHa, LoCon, full differences) on the frozen base, and the files that other programs load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tuner import ConfigError, Plugin, PluginConfig, hookimpl, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Adapter, Model, Network, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload
    from tuner_lycoris.settings import LycorisSettings
    from tuner_lycoris.targets import Chosen

FORMATS = ("comfyui", "kohya", "lycoris")
SHARED = frozenset({"lora_type", "lora_format"})
"""Keys of LoRA that mean something here."""


class LycorisConfig(PluginConfig):
    """Keys of LyCORIS."""

    lycoris_config: Path | dict[str, Any] | None = key(
        None,
        "LyCORIS settings for `lora_type: lycoris`: a JSON file as the LyCORIS library's users have it (`algo`, "
        "`linear_dim`, `linear_alpha`, `factor`, `apply_preset` …), or the same object in its place.",
    )


class LycorisPlugin(Plugin[LycorisConfig]):
    """LyCORIS: trains LoKr, LoHa, LoCon or full differences of the model's matrices (arXiv:2309.14859)."""

    values: ClassVar[Mapping[str, frozenset[str]]] = {"lora_type": frozenset({"lycoris"})}
    Config = LycorisConfig

    def __init__(self, name: str, config: LycorisConfig) -> None:
        super().__init__(name, config)
        self._settings: LycorisSettings | None = None
        self._warn: Any = None

    def is_active(self, core: CoreConfig) -> bool:
        """Whether this run trains LyCORIS adapters."""
        return core.model_type == "lora" and core.lora_type == "lycoris"

    def warnings(self, core: CoreConfig) -> Iterable[str]:
        """Settings that are not used."""
        if self.config.lycoris_config is not None and not self.is_active(core):
            other = "model_type" if core.model_type != "lora" else "lora_type"
            yield f"lycoris_config is not used: {other} is {getattr(core, other)!r}"

    @property
    def settings(self) -> LycorisSettings:
        """The settings, read once. Raises ConfigError where there are none, or wrong ones."""
        if self._settings is None:
            from tuner_lycoris.settings import read

            if self.config.lycoris_config is None:
                raise ConfigError(
                    "lora_type is 'lycoris', and there is no lycoris_config",
                    remedy="name a JSON file of LyCORIS settings, such as config/lycoris_config.json.example",
                )
            self._settings = read(self.config.lycoris_config)
        return self._settings

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse wrong settings and a missing library; say which keys change nothing."""
        if not self.is_active(run.config):
            return
        if find_spec("lycoris") is None:
            raise ConfigError(
                "lora_type is 'lycoris', and the package lycoris-lora is not installed",
                remedy="pip install difftuner[lycoris]",
            )
        settings = self.settings
        self._format(run)
        self._warn = run.log.warning
        idle = sorted(
            each
            for each in run.explicit - SHARED
            if each.startswith("lora_") or each in ("init_lora", "use_dora", "use_rslora")
        )
        if idle:
            run.log.warning("without effect, as lora_type is lycoris: %s", ", ".join(idle))
        run.log.info(
            "LyCORIS: %s, dim %d, alpha %g", settings.algo or "lora", settings.linear_dim, settings.linear_alpha
        )

    def _format(self, run: Run) -> str:
        """The value of ``lora_format``. Raises ConfigError for one that has no names for these tensors."""
        owner = run.plugins.get("lora")
        chosen = str(getattr(owner.config, "lora_format", FORMATS[0])) if owner is not None else FORMATS[0]
        if chosen not in FORMATS:
            raise ConfigError(
                f"lora_format {chosen!r} has no names for LyCORIS: no loader of diffusers reads LoKr or LoHa",
                allowed=FORMATS,
                remedy="save as comfyui, and convert the file to a LoRA for diffusers",
            )
        return chosen

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Parameters of the factors in the blocks, those that are applied to the text apart."""
        if not self.is_active(run.config):
            return {}
        from tuner_lycoris.size import counts

        network = workload.network
        counted = counts(network, self.settings)
        return {
            "adapter_parameters": sum(count for _, _, count in counted),
            "adapter_parameters_on_text": sum(count for linear, _, count in counted if linear.over != "tokens"),
            "adapted_width": sum(linear.inputs * blocks for linear, blocks, _ in counted if linear.over == "tokens")
            // network.blocks,
        }

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Attach factors to every network. Targets that match nothing are refused here, before weights are read."""
        if not self.is_active(run.config):
            return []
        from tuner.model import Stage, Transform
        from tuner_lycoris.adapter import tree
        from tuner_lycoris.targets import choose, resolved

        for network in model.networks.values():
            found = tree(network.module)
            choose(found, self.settings, network.name)
            for theirs, ours in resolved(found, self.settings.targets, network.name)[1].items():
                run.log.info("LyCORIS target %s is %s in network %s", theirs, ours, network.name)
        return [
            Transform(
                stage=Stage.ADAPT,
                name=self.name,
                claims=frozenset({"adapter"}),
                apply=partial(self._attach, run),
            )
        ]

    def _attach(self, run: Run, network: Network) -> Adapter:
        from tuner_lycoris.adapter import attach, tree
        from tuner_lycoris.targets import choose

        chosen: dict[str, Chosen] = choose(tree(network.module), self.settings, network.name)
        return attach(network, chosen, self.settings, run.device)

    @hookimpl
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Callable[[], None]]:
        """Write one file for each network, its tensors checked against the network's matrices."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.adapter_file import save
        from tuner_lycoris import files

        writes, layout = [], self._format(run)
        for network in model.networks.values():
            described = files.described(model.spec, network.spec, self._facts(run))
            tensors, metadata = files.export(network.module, model.spec, layout, described)
            if run.is_main:
                path = directory / files.file_name(network.spec, alone=len(model.networks) == 1)
                taken = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                writes.append(partial(save, taken, metadata, path))
        return writes

    def _facts(self, run: Run) -> dict[str, Any]:
        """What the file's metadata says of the training, beside the model."""
        core, settings = run.config, self.settings
        return {
            "algo": settings.algo or "lora",
            "lycoris_config": self._written(),
            "steps": run.step,
            "seed": core.seed,
            "learning_rate": core.learning_rate,
            "optimizer": core.optimizer,
            "shift": "auto" if core.flow_schedule_auto_shift else core.flow_schedule_shift,
            "title": core.output_dir.name,
        }

    def _written(self) -> str:
        """The settings that are not at their default, as JSON."""
        return json.dumps(self.settings.model_dump(exclude_defaults=True), sort_keys=True)

    def state_dict(self) -> dict[str, Any]:
        """The settings, to which the trained tensors belong."""
        return {} if self._settings is None else {"settings": self._written()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Say it where the settings are others: a scale that changed changes the network."""
        if self._settings is not None and state.get("settings") not in (None, self._written()) and self._warn:
            self._warn("the LyCORIS settings changed since that checkpoint: they were %s", state["settings"])
