"""LoRA on the frozen base, by PEFT, and the files that other programs load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuner.errors import ConfigError, nearest
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key

if TYPE_CHECKING:
    from tuner.builtin.adapter_file import Update
    from tuner.builtin.lora.adapter import LoraSettings
    from tuner.builtin.lora.names import Targets
    from tuner.config.keys import CoreConfig
    from tuner.model import Adapter, Model, Network, Transform
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

INITIALISATIONS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora")
NOT_OFFERED = {
    "loftq": "it is for a base that PEFT itself quantises",
    "eva": "it needs a pass over the data first",
    "corda": "it needs a pass over the data first",
    "lora_ga": "it needs gradients of the base first",
}
"""What PEFT knows beside, and why it is not offered."""
WITH_DORA = ("diffusers",)
"""Formats whose readers keep DoRA's norms."""


class LoraConfig(PluginConfig):
    """Keys of LoRA."""

    lora_rank: int = key(16, "Rank r of the LoRA matrices.", ge=1)
    lora_alpha: float | None = key(
        None, "Scale: the update is alpha/rank times B·A. The rank when absent, so that the scale is 1.", gt=0
    )
    lora_dropout: float = key(0.0, "Dropout in front of A while training.", ge=0, lt=1)
    lora_init_type: str = key(
        "default",
        "How it starts: `default` (A Kaiming uniform, B zero), `gaussian` (A of deviation 1/rank), `orthogonal`, "
        "`pissa`, `pissa_niter_N` (N iterations of a fast SVD) or `olora`.",
    )
    lora_target_modules: list[str] | None = key(
        None,
        "What to adapt: ends of module names, such as `to_q`; `re:` and a pattern for whole names; `all-linear` for "
        "every matrix of the blocks, feed-forward included. The model's own choice (attention) when absent.",
        min_length=1,
    )
    lora_exclude_modules: list[str] = key([], "What of these to leave out, named likewise.")
    lora_rank_pattern: dict[str, int] = key({}, "Other ranks, by end of a module name or `re:` pattern.")
    lora_alpha_pattern: dict[str, float] = key({}, "Other alphas, likewise.")
    use_dora: bool = key(False, "DoRA: also train the norm of each row of the weight (arXiv:2402.09353).")
    use_rslora: bool = key(False, "rsLoRA: scale by alpha over the root of the rank (arXiv:2312.03732).")
    lora_dtype: Literal["fp32", "bf16"] = key("fp32", "Precision that the LoRA matrices are kept and trained in.")
    init_lora: Path | None = key(
        None,
        "Start from this LoRA: a .safetensors file of any known format, or a folder with the files of two experts.",
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
        self._begun: dict[str, Mapping[str, Update]] = {}
        """What a network's LoRA starts from."""

    def is_active(self, core: CoreConfig) -> bool:
        """Whether this run trains a PEFT LoRA."""
        return core.model_type == "lora" and core.lora_type == "standard"

    @hookimpl
    def configure(self, run: Run) -> None:
        """Refuse what cannot be had, before the model is described."""
        if not self.is_active(run.config):
            return
        if self.config.lora_format == "lycoris":
            raise ConfigError(
                "lora_format 'lycoris' is for lora_type: lycoris",
                where=f"lora_type: {run.config.lora_type}",
                remedy="use comfyui, diffusers or kohya",
            )
        self._check_start(run.config.base_model_precision)
        self._check_patterns()
        if self.config.use_dora and self.config.lora_format not in WITH_DORA:
            raise ConfigError(
                f"use_dora is set, and readers of lora_format {self.config.lora_format!r} compute DoRA otherwise than "
                "it is trained: they divide by the norms of the base's rows, not of the sum's",
                where="lora_format",
                allowed=WITH_DORA,
                remedy="set lora_format: diffusers",
            )
        if self.config.init_lora is not None and not self.config.init_lora.exists():
            raise ConfigError("init_lora does not exist", where=self.config.init_lora)

    def _check_start(self, precision: str) -> None:
        """Refuse ways to start that are unknown, or that the base does not allow."""
        value, allowed = self.config.lora_init_type, INITIALISATIONS
        if reason := NOT_OFFERED.get(value.partition("_niter")[0]):
            raise ConfigError(f"lora_init_type {value!r} is not offered: {reason}", allowed=allowed)
        if value not in allowed and not re.fullmatch(r"pissa_niter_[1-9]\d*", value):
            raise ConfigError(
                f"lora_init_type {value!r} is unknown",
                allowed=allowed,
                nearest=nearest(value, allowed),
                remedy="use one of the allowed values",
            )
        from_base = value.startswith(("pissa", "olora"))
        what = "use_dora" if self.config.use_dora else f"lora_init_type {value!r}"
        if (from_base or self.config.use_dora) and precision != "no_change":
            raise ConfigError(
                f"{what} is computed from the base's weights, and base_model_precision is {precision!r}",
                remedy="leave one of them out",
            )
        if from_base and self.config.use_dora:
            raise ConfigError(
                f"use_dora and lora_init_type {value!r} do not go together", remedy="leave one of them out"
            )
        if from_base and self.config.init_lora is not None:
            raise ConfigError(f"init_lora and lora_init_type {value!r} are two starts", remedy="leave one of them out")
        odd = [rank for rank in (self.config.lora_rank, *self.config.lora_rank_pattern.values()) if rank % 2]
        if value == "orthogonal" and odd:
            raise ConfigError(f"lora_init_type 'orthogonal' needs even ranks, and one is {odd[0]}")

    def _check_patterns(self) -> None:
        from tuner.builtin.lora.names import check_patterns

        keys = self.config
        check_patterns("lora_target_modules", keys.lora_target_modules or ())
        check_patterns("lora_exclude_modules", keys.lora_exclude_modules)
        check_patterns("lora_rank_pattern", keys.lora_rank_pattern)
        check_patterns("lora_alpha_pattern", keys.lora_alpha_pattern)
        for pattern, rank in keys.lora_rank_pattern.items():
            if rank < 1:
                raise ConfigError(f"lora_rank_pattern gives {pattern!r} rank {rank}", allowed="1 and more")
        for pattern, alpha in keys.lora_alpha_pattern.items():
            if alpha <= 0:
                raise ConfigError(f"lora_alpha_pattern gives {pattern!r} alpha {alpha}", allowed="more than 0")

    @hookimpl
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Hold targets against the names of the model's matrices, where its family knows them. Raises ConfigError."""
        from tuner.builtin.lora.names import check_used

        for network in spec.networks if self.is_active(run.config) else ():
            matrices = [name for name, shape in network.weights.items() if len(shape) > 1]
            if matrices:
                check_used("lora_target_modules", self._targets(spec).names, matrices, network.name, "matrix")
                check_used("lora_exclude_modules", self.config.lora_exclude_modules, matrices, network.name, "matrix")

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Parameters of the LoRA matrices, those that are applied to the text apart."""
        if not self.is_active(run.config):
            return {}
        from tuner.builtin.lora.count import counted

        return counted(self._targets(spec), workload.network, dora=self.config.use_dora)

    @hookimpl
    def model_transforms(self, run: Run, model: Model) -> Iterable[Transform]:
        """Attach LoRA to every network. A target that matches nothing is refused here, before weights are read."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.lora.adapter import LoraSettings, adapted
        from tuner.model import Stage, Transform

        settings = LoraSettings.of(self.config, self._targets(model.spec).names)
        for network in model.networks.values():
            modules = adapted(network, settings)
            if self.config.init_lora is not None:
                self._begun[network.name] = self._read(model, network, modules)
        return [
            Transform(
                stage=Stage.ADAPT,
                name=self.name,
                claims=frozenset({"adapter"}),
                apply=lambda network: self._attach(run, network, settings),
            )
        ]

    def _targets(self, spec: ModelSpec) -> Targets:
        from tuner.builtin.lora.names import Targets

        keys = self.config
        return Targets(
            tuple(keys.lora_target_modules or spec.adapter_targets),
            keys.lora_rank,
            keys.lora_alpha,
            tuple(keys.lora_exclude_modules),
            keys.lora_rank_pattern,
            keys.lora_alpha_pattern,
        )

    def _read(self, model: Model, network: Network, modules: Mapping[str, tuple[int, float]]) -> Mapping[str, Update]:
        """What ``init_lora`` has for ``network``."""
        from tuner.builtin.adapter_file import read
        from tuner.builtin.adapter_names import FORMATS
        from tuner.builtin.lora.begin import check_file
        from tuner.builtin.lora.files import file_name, weight_shapes

        path = self.config.init_lora
        assert path is not None
        alone = len(model.networks) == 1
        if path.is_dir():
            path = path / file_name(network.spec, alone=alone)
            if not path.exists():
                raise ConfigError(f"init_lora has no file for network {network.name!r}", where=path)
        elif not alone:
            raise ConfigError(
                "init_lora is one file, and this run trains two networks",
                where=path,
                remedy="name a folder with "
                + " and ".join(file_name(each.spec, alone=False) for each in model.networks.values()),
            )
        updates = read(path, model.spec, weight_shapes(network.module), FORMATS).updates
        check_file(path, updates, modules)
        return updates

    def _attach(self, run: Run, network: Network, settings: LoraSettings) -> Adapter:
        from tuner.builtin.lora import files as lora_files
        from tuner.builtin.lora.adapter import attach
        from tuner.builtin.lora.begin import take_over

        self._shapes[network.name] = lora_files.weight_shapes(network.module)
        adapter = attach(network, settings, run.device)
        if (updates := self._begun.get(network.name)) is not None:
            take_over(adapter.groups[0].parameters, updates, adapter.settings["alphas"])
        return adapter

    @hookimpl
    def save(self, run: Run, model: Model, directory: Path) -> Iterable[Callable[[], None]]:
        """Write one LoRA file for each network, its keys checked against the network's modules."""
        if not self.is_active(run.config):
            return []
        from tuner.builtin.lora import files as lora_files

        writes = []
        for network in model.networks.values():
            if network.adapter is None:
                continue
            facts = self._facts(run) | lora_files.model_facts(model.spec, network.spec)
            file = lora_files.export(network.adapter, model.spec, self.config.lora_format, facts)
            lora_files.verify(file.tensors, self._shapes[network.name], model.spec, self.config.lora_format)
            if run.is_main:
                path = directory / lora_files.file_name(network.spec, alone=len(model.networks) == 1)
                writes.append(partial(lora_files.write, file, path))
        return writes

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
