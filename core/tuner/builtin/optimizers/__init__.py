"""The optimizers that users know by name, each from the library that keeps it. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import cos, pi
from typing import TYPE_CHECKING, Any, ClassVar

from tuner.config.warnings import unused
from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig, key
from tuner.train.optimizers import OptimizerChoice

if TYPE_CHECKING:
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.workload import Workload

TORCH = {
    "adadelta": 8,
    "adafactor": 0.1,
    "adagrad": 4,
    "adam": 8,
    "adamax": 8,
    "adamw": 8,
    "asgd": 4,
    "muon": 4,
    "nadam": 8,
    "radam": 8,
    "rmsprop": 4,
    "rprop": 8,
    "sgd": 0,
}
"""Classes of ``torch.optim`` by lower-case name, and bytes of state per float32 parameter."""
TORCH_NAMES = {
    "adamw": "AdamW",
    "asgd": "ASGD",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
}
OPTIMI = {"adam": 8, "adamw": 8, "adan": 16, "lion": 4, "radam": 8, "ranger": 12, "sgd": 0, "stableadamw": 8}
OPTIMI_NAMES = {"adamw": "AdamW", "radam": "RAdam", "sgd": "SGD", "stableadamw": "StableAdamW"}
OPTIMI_OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.01},
    "adan": {"weight_decay": 0.02, "kahan_sum": None},
    "stableadamw": {"weight_decay": 0.01},
}
"""Where the library's own default is another than users expect; without a value Kahan summation follows the weights."""
BITSANDBYTES = {
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "lion": "Lion",
    "rmsprop": "RMSprop",
}
PAGED = {"adam", "adamw", "ademamix", "lion"}
STATES = {"adam": 2, "adamw": 2, "ademamix": 3}
"""Moments that they keep; one where they are not named."""
EIGHT_BITS = 1.02
"""Bytes of a moment in 8 bits, its scales included."""
RESTARTED = ("cosine_with_restarts", "sine")
"""Curves that read ``lr_num_cycles``."""
LEVEL = ("constant", "constant_with_warmup")
"""Curves that never fall, and so do not read ``lr_end``."""
LEARNS_ITS_RATE = frozenset({"prodigy"})
BETAS = (0.9, 0.999)
FLOAT32_STATE = frozenset({"bitsandbytes", "torchao"})
"""Libraries whose optimizers keep float32 or quantised state; that of others is of the weights' type."""
NOT_SHARDED = frozenset({"adafactor", "rprop"})
"""Of torch: they compute in place what needs all parts of a tensor."""
KAHAN_BYTES = 2
"""Of the running error that optimi keeps beside each bfloat16 weight."""


class OptimizersConfig(PluginConfig):
    """Keys of learning-rate curves."""

    lr_num_cycles: int = key(1, "Times that `cosine_with_restarts` falls, or that `sine` falls and rises.", ge=1)
    lr_power: float = key(1.0, "Exponent of `polynomial`; 1 is `linear`.", gt=0)


class OptimizersPlugin(Plugin[OptimizersConfig]):
    """Optimizers of torch, optimi, bitsandbytes, torchao, schedulefree and prodigyopt, and learning-rate curves."""

    Config = OptimizersConfig
    levers: ClassVar[tuple[Mapping[str, Any], ...]] = ({"optimizer": "bnb-adamw8bit"},)

    @hookimpl
    def optimizers(self, run: Run) -> Mapping[str, OptimizerChoice]:
        """All of them by name."""
        return dict(_all())

    @hookimpl
    def lr_curves(self, run: Run) -> Mapping[str, Callable[[float], float]]:
        """Heights over the share of the steps that is over; see the docs for the formulas."""
        cycles, power = self.config.lr_num_cycles, self.config.lr_power
        return {
            "constant": lambda share: 1.0,
            "constant_with_warmup": lambda share: 1.0,
            "linear": lambda share: 1 - share,
            "cosine": lambda share: (1 + cos(pi * share)) / 2,
            "cosine_with_restarts": lambda share: 0.0 if share == 1 else (1 + cos(pi * (share * cycles % 1))) / 2,
            "sine": lambda share: (1 + cos(2 * pi * share * cycles)) / 2,
            "polynomial": lambda share: float((1 - share) ** power),
        }

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where the learning rate cannot be meant for an optimizer that finds its own."""
        core = run.config
        for name, curves in (("lr_num_cycles", RESTARTED), ("lr_power", ("polynomial",))):
            for line in unused(self.config, f"lr_scheduler is {core.lr_scheduler}", name):
                if core.lr_scheduler not in curves:
                    run.log.warning("%s", line)
        if core.lr_end and core.lr_scheduler in LEVEL:
            run.log.warning("lr_end does nothing: lr_scheduler is %s", core.lr_scheduler)
        if core.optimizer in LEARNS_ITS_RATE and core.learning_rate < 0.1:
            run.log.warning(
                "optimizer %r finds its own learning rate and multiplies it by learning_rate, which is %g: 1 is usual",
                core.optimizer,
                core.learning_rate,
            )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Bytes of state per trained parameter."""
        name = run.config.optimizer
        chosen = dict(_all()).get(name) or dict(_all()).get(name.lower())
        if chosen is None:
            return {}
        in_bfloat16 = workload.trained == "network" and workload.weight_bytes == 2
        return {"optimizer_bytes": bfloat16_bytes(chosen) if in_bfloat16 else chosen.state_bytes}


def bfloat16_bytes(choice: OptimizerChoice) -> float:
    """Bytes of state per trained bfloat16 parameter."""
    if choice.library in FLOAT32_STATE:
        return choice.state_bytes
    return choice.state_bytes / 2 + (KAHAN_BYTES if choice.module == "optimi" else 0)


def _all() -> Iterator[tuple[str, OptimizerChoice]]:
    yield from _torch()
    for name, size in OPTIMI.items():
        cls, options = OPTIMI_NAMES.get(name, name.capitalize()), OPTIMI_OPTIONS.get(name, {})
        yield f"optimi-{name}", OptimizerChoice("optimi", cls, "torch-optimi", options, size)
    # Kahan summation: bfloat16 weights learn from updates that are smaller than their last bit.
    kahan = {"betas": BETAS, "weight_decay": 0.01, "kahan_sum": True}
    yield "adamw_bf16", OptimizerChoice("optimi", "AdamW", "torch-optimi", kahan, 8)
    yield from _bitsandbytes()
    yield from _torchao()
    yield "adamw_schedulefree", OptimizerChoice("schedulefree", "AdamWScheduleFree", "difftuner[schedulefree]", {}, 8)
    yield "sgd_schedulefree", OptimizerChoice("schedulefree", "SGDScheduleFree", "difftuner[schedulefree]", {}, 4)
    needs: dict[str, Any] = {"needs_all_gradients": True, "steps_shards": False}
    yield "prodigy", OptimizerChoice("prodigyopt", "Prodigy", "difftuner[prodigy]", {}, 16, **needs)


def _torch() -> Iterator[tuple[str, OptimizerChoice]]:
    """``adamw``, ``torch-adamw`` and their like."""
    choices = {
        name: OptimizerChoice(
            "torch.optim",
            TORCH_NAMES.get(name, name.capitalize()),
            "torch",
            {},
            size,
            steps_shards=name not in NOT_SHARDED,
        )
        for name, size in TORCH.items()
    }
    yield from ((f"torch-{name}", choice) for name, choice in choices.items())
    yield from ((name, choices[name]) for name in ("adafactor", "sgd"))
    yield "adamw", OptimizerChoice("torch.optim", "AdamW", "torch", {"betas": BETAS, "weight_decay": 0.01}, 8)
    yield "muon", OptimizerChoice(f"{__name__}.muon", "MuonWithAdamW", "torch", {}, 4)


def _torchao() -> Iterator[tuple[str, OptimizerChoice]]:
    """``ao-adamw8bit`` and its like."""
    for bits, size in (("8bit", 2.05), ("4bit", 1.1), ("fp8", 2.05)):
        module = f"{__name__}.fp8" if bits == "fp8" else "torchao.optim"
        for name, cls, options in (("adam", "Adam", {}), ("adamw", "AdamW", {"weight_decay": 0.01})):
            full = f"{cls}{'Fp8' if bits == 'fp8' else bits}"
            yield (
                f"ao-{name}{bits}",
                OptimizerChoice(module, full, "difftuner[torchao]", options, size, library="torchao"),
            )


def _bitsandbytes() -> Iterator[tuple[str, OptimizerChoice]]:
    """``bnb-lion``, ``bnb-lion8bit``, ``bnb-lion-paged``, ``bnb-lion8bit-paged`` and their like."""
    for name, cls in BITSANDBYTES.items():
        decay = {"weight_decay": 0.01} if name == "adamw" else {}
        for bits in ("", "8bit"):
            for paged in ("", "-paged") if name in PAGED else ("",):
                size = STATES.get(name, 1) * (EIGHT_BITS if bits else 4)
                module = f"{__name__}.paged" if paged else "bitsandbytes.optim"
                full = f"{'Paged' if paged else ''}{cls}{bits}"
                facts: dict[str, Any] = {"library": "bitsandbytes", "steps_shards": False}
                choice = OptimizerChoice(module, full, "difftuner[bitsandbytes]", decay, size, **facts)
                yield f"bnb-{name}{bits}{paged}", choice
