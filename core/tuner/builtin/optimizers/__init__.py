"""The optimizers that users know by name, each from the library that keeps it. Importing this imports none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig
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
TORCH_NAMES = {"rmsprop": "RMSprop", "sgd": "SGD", "asgd": "ASGD"}
OPTIMI = {"adamw": 8, "adan": 16, "lion": 4, "radam": 8, "ranger": 12, "sgd": 0, "stableadamw": 8}
OPTIMI_NAMES = {"adamw": "AdamW", "radam": "RAdam", "sgd": "SGD", "stableadamw": "StableAdamW"}
DECAY = {"adamw": 0.01, "adan": 0.02, "stableadamw": 0.01}
"""Weight decay where the library's own default is another than users expect."""
BITSANDBYTES = {
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamw": "AdamW",
    "ademamix": "AdEMAMix",
    "lamb": "LAMB",
    "lion": "Lion",
    "rmsprop": "RMSprop",
}
PAGED = {"adam", "adamw", "ademamix", "lion"}
STATES = {"adam": 2, "adamw": 2, "ademamix": 3, "lamb": 2}
"""Moments that they keep; one where they are not named."""
EIGHT_BITS = 1.02
"""Bytes of a moment in 8 bits, its scales included."""
LEARNS_ITS_RATE = frozenset({"prodigy"})
BETAS = (0.9, 0.999)


class OptimizersPlugin(Plugin[PluginConfig]):
    """Optimizers of torch, optimi, bitsandbytes, torchao, schedulefree and prodigyopt."""

    @hookimpl
    def optimizers(self, run: Run) -> Mapping[str, OptimizerChoice]:
        """All of them by name."""
        return dict(_all())

    @hookimpl
    def configure(self, run: Run) -> None:
        """Say so where the learning rate cannot be meant for an optimizer that finds its own."""
        core = run.config
        if core.optimizer in LEARNS_ITS_RATE and core.learning_rate < 0.1:
            run.log.warning(
                "optimizer %r finds its own learning rate and multiplies it by learning_rate, which is %g: 1 is usual",
                core.optimizer,
                core.learning_rate,
            )

    @hookimpl
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Bytes of state per trained parameter."""
        chosen = dict(_all()).get(run.config.optimizer)
        return {} if chosen is None else {"optimizer_bytes": chosen.state_bytes}


def _all() -> Iterator[tuple[str, OptimizerChoice]]:
    for name, size in TORCH.items():
        cls = TORCH_NAMES.get(name, {"adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam"}.get(name, name.capitalize()))
        yield f"torch-{name}", OptimizerChoice("torch.optim", cls, "torch", {}, size)
    yield "adamw", OptimizerChoice("torch.optim", "AdamW", "torch", {"betas": BETAS, "weight_decay": 0.01}, 8)
    for alias in ("adafactor", "muon", "sgd"):
        yield (
            alias,
            OptimizerChoice("torch.optim", TORCH_NAMES.get(alias, alias.capitalize()), "torch", {}, TORCH[alias]),
        )
    for name, size in OPTIMI.items():
        decay = {"weight_decay": DECAY[name]} if name in DECAY else {}
        cls = OPTIMI_NAMES.get(name, name.capitalize())
        yield f"optimi-{name}", OptimizerChoice("optimi", cls, "torch-optimi", decay, size)
    # Kahan summation: bfloat16 weights learn from updates that are smaller than their last bit.
    kahan = {"betas": BETAS, "weight_decay": 0.01, "kahan_sum": True}
    yield "adamw_bf16", OptimizerChoice("optimi", "AdamW", "torch-optimi", kahan, 8)
    yield from _bitsandbytes()
    for name, cls, size in (
        ("adamw8bit", "AdamW8bit", 2.05),
        ("adamw4bit", "AdamW4bit", 1.1),
        ("adamwfp8", "AdamWFp8", 2.05),
    ):
        yield f"ao-{name}", OptimizerChoice("torchao.optim", cls, "difftuner[torchao]", {"weight_decay": 0.01}, size)
    yield "adamw_schedulefree", OptimizerChoice("schedulefree", "AdamWScheduleFree", "difftuner[schedulefree]", {}, 8)
    yield "sgd_schedulefree", OptimizerChoice("schedulefree", "SGDScheduleFree", "difftuner[schedulefree]", {}, 4)
    yield "prodigy", OptimizerChoice("prodigyopt", "Prodigy", "difftuner[prodigy]", {}, 16)


def _bitsandbytes() -> Iterator[tuple[str, OptimizerChoice]]:
    """``bnb-lion``, ``bnb-lion8bit``, ``bnb-lion-paged``, ``bnb-lion8bit-paged`` and their like."""
    for name, cls in BITSANDBYTES.items():
        decay = {"weight_decay": 0.01} if name == "adamw" else {}
        for bits in ("", "8bit"):
            for paged in ("", "-paged") if name in PAGED else ("",):
                size = STATES.get(name, 1) * (EIGHT_BITS if bits else 4)
                full = f"{'Paged' if paged else ''}{cls}{bits}"
                choice = OptimizerChoice("bitsandbytes.optim", full, "difftuner[bitsandbytes]", decay, size)
                yield f"bnb-{name}{bits}{paged}", choice
