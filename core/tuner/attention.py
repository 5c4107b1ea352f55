"""What an attention plugin offers to the core's registry, and which kernel a run uses when. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tuner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

EXACT = "auto"
"""The name under which the best exact kernel of the device is registered."""
EXACT_NAMES = frozenset({EXACT, "diffusers"})
"""Values of ``attention_mechanism`` that mean it."""
Usage = Literal["training", "inference", "both"]
Kernel = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(query, key, value), each (B, tokens, heads, head_dim) -> (B, query tokens, heads, head_dim); no mask."""


@dataclass(frozen=True)
class AttentionBackend:
    """One attention kernel: one of the diffusers dispatcher's, by the name it knows it by, or a function of our own.

    ``trains`` says whether gradients flow through it: a kernel without a backward is used in validation only,
    and training keeps the exact kernel.
    """

    dispatcher: str | None = None
    kernel: Kernel | None = None
    trains: bool = False
    training: Kernel | None = None
    """The kernel with a backward, for who asks to train with one that has none of its own."""


@dataclass(frozen=True)
class Attention:
    """The kernels of a run; None is what torch chooses by itself."""

    training: AttentionBackend | None = None
    inference: AttentionBackend | None = None


def choose(name: str, usage: Usage | None, backends: Mapping[str, AttentionBackend | None]) -> Attention:
    """The kernels that ``attention_mechanism`` and ``attention_usage`` mean.

    ``backends`` are those that the plugins offer; None where this machine cannot run one. Raises ConfigError for
    training with a kernel that has no backward.
    """
    exact = backends.get(EXACT)
    chosen = exact if name in EXACT_NAMES else backends[name]
    if chosen is None or chosen is exact:
        return Attention(exact, exact)
    usage = usage or ("both" if chosen.trains else "inference")
    training = exact if usage == "inference" else chosen
    if training is chosen and not chosen.trains:
        if chosen.training is None:
            raise ConfigError(
                f"attention_mechanism {name!r} has no backward, so nothing would be trained through it",
                where=f"attention_usage: {usage}",
                remedy="set attention_usage to inference: training then uses the exact kernel",
            )
        training = AttentionBackend(kernel=chosen.training, trains=True)
    return Attention(training, exact if usage == "training" else chosen)
