"""LoRA on the frozen base, by PEFT, and the files that other programs load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.errors import ConfigError, nearest
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.config.keys import CoreConfig
    from tuner.model import Adapter, Model, Network, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

INITIALISATIONS = ("default", "gaussian")
LATER_INITIALISATIONS = ("pissa", "olora", "loftq", "eva", "corda", "orthogonal")
"""What PEFT knows beside, and this plugin does not offer yet."""


class LoraConfig(PluginConfig):
    """Keys of LoRA."""

    lora_rank: int = key(16, "Rank r of the LoRA matrices.", ge=1)
    lora_alpha: float | None = key(
        None, "Scale: the update is alpha/rank times B·A. The rank when absent, so that the scale is 1.", gt=0
    )
    lora_dropout: float = key(0.0, "Dropout in front of A while training.", ge=0, lt=1)
    lora_init_type: str = key(
        "default", "How A starts: `default` (Kaiming uniform) or `gaussian` (deviation 1/rank). B starts at 0."
    )
    lora_target_modules: list[str] | None = key(
        None, "Module name suffixes to adapt, such as `to_q`; the model's own choice when absent.", min_length=1
    )
    lora_format: Literal["comfyui", "diffusers", "kohya", "lycoris"] = key(
        "comfyui",
        "Key names in the saved file: the original model's (`comfyui`), diffusers' own, musubi-tuner's (`kohya`), or "
        "those of the LyCORIS library (`lycoris`, for `lora_type: lycoris` only).",
    )


class LoraPlugin(Plugin[LoraConfig]):
    """LoRA: trains low-rank updates of the model's matrices (arXiv:2106.09685)."""

    Config = LoraConfig

    def __init__(self, name: str, config: LoraConfig) -> None:
        super().__init__(name, config)
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def is_active(self, core: CoreConfig) -> bool:
        """Whether this run trains a PEFT LoRA."""
        return core.model_type == "lora" and core.lora_type == "standard"

    @property
    def alpha(self) -> float:
        """The scale's numerator; the rank unless it was set."""
        return float(self.config.lora_rank if self.config.lora_alpha is None else self.config.lora_alpha)

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse ways to initialise that are not offered, and names of files of another kind of adapter."""
        if self.is_active(run.config) and self.config.lora_format == "lycoris":
            raise ConfigError(
                "lora_format 'lycoris' is for lora_type: lycoris",
                where=f"lora_type: {run.config.lora_type}",
                remedy="use comfyui, diffusers or kohya",
            )
        value = self.config.lora_init_type
        if not self.is_active(run.config) or value in INITIALISATIONS:
            return
        known = value.split("_")[0] in LATER_INITIALISATIONS
        raise ConfigError(
            f"lora_init_type {value!r} {'is not offered yet' if known else 'is unknown'}",
            allowed=INITIALISATIONS,
            nearest=nearest(value, INITIALISATIONS),
            remedy="use one of the allowed values",
        )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Parameters of the LoRA matrices, those that are applied to the text apart."""
        if not self.is_active(run.config):
            return {}
        targets = tuple(self.config.lora_target_modules or spec.adapter_targets)
        network, rank = workload.network, self.config.lora_rank
        counted = [
            (linear, rank * (linear.inputs + linear.outputs) * _adapted_blocks(linear.name, targets, network.blocks))
            for linear in network.matrices
        ]
        inputs: dict[str, int] = {}
        for linear, count in counted:
            if count and linear.over == "tokens":
                kept = linear.inputs * _adapted_blocks(linear.name, targets, network.blocks)
                inputs[linear.input or linear.name] = max(kept, inputs.get(linear.input or linear.name, 0))
        return {
            "adapter_parameters": sum(count for _, count in counted),
            "adapter_parameters_on_text": sum(count for linear, count in counted if linear.over != "tokens"),
            "adapted_width": round(sum(inputs.values()) / network.blocks),
            "adapted_inputs": frozenset(inputs),
        }

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Attach LoRA to every network. A target that matches nothing is refused here, before weights are read."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.lora.adapter import check_targets
        from tuner.model import Stage, Transform

        for network in model.networks.values():
            check_targets(network, self._targets(model))
        return [
            Transform(
                stage=Stage.ADAPT,
                name=self.name,
                claims=frozenset({"adapter"}),
                apply=lambda network: self._attach(run, network, self._targets(model)),
            )
        ]

    def _targets(self, model: Model) -> tuple[str, ...]:
        return tuple(self.config.lora_target_modules or model.spec.adapter_targets)

    def _attach(self, run: Run, network: Network, targets: tuple[str, ...]) -> Adapter:
        from tuner.builtin.lora import files as lora_files
        from tuner.builtin.lora.adapter import LoraSettings, attach

        self._shapes[network.name] = lora_files.weight_shapes(network.module)
        return attach(network, LoraSettings.of(self.config, self.alpha, targets), run.device)

    @hookimpl
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Path]:
        """Write one LoRA file for each network, its keys checked against the network's modules."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.lora import files as lora_files

        written = []
        for network in model.networks.values():
            if network.adapter is None:
                continue
            facts = self._facts(run) | lora_files.model_facts(model.spec, network.spec)
            file = lora_files.export(network.adapter, model.spec, self.config.lora_format, facts)
            lora_files.verify(file.tensors, self._shapes[network.name], model.spec, self.config.lora_format)
            if run.is_main:
                path = directory / lora_files.file_name(network.spec, alone=len(model.networks) == 1)
                lora_files.write(file, path)
                written.append(path)
        return written

    def _facts(self, run: Run) -> dict[str, Any]:
        """What the file's metadata says of the training, beside model and adapter."""
        core = run.config
        return {
            "steps": run.step,
            "seed": core.seed,
            "learning_rate": core.learning_rate,
            "optimizer": core.optimizer,
            "shift": "auto" if core.flow_schedule_auto_shift else core.flow_schedule_shift,
            "title": core.output_dir.name,
        }


def _adapted_blocks(name: str, targets: Sequence[str], blocks: int) -> int:
    """In how many blocks the matrix ``name`` is adapted: in all of which a target names the end, or one by one."""
    if any(name == target or name.endswith("." + target) for target in targets):
        return blocks
    return len({target for target in targets if target.endswith("." + name)})
