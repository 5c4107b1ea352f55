"""What known cards reach: rates for the estimate of a step's time.

Only the H100's are measured. The others are the makers' peaks times what kernels usually reach of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import ConfigError, nearest

MATMUL_SHARE, ATTENTION_SHARE, BACKWARD_SHARE, BANDWIDTH_SHARE = 0.8, 0.65, 0.55, 0.88
"""Of the peak, where nothing was measured."""
PCIE4, PCIE5 = 25.0, 50.0
"""GB/s from pinned host memory to the card, sixteen lanes, assumed."""
HOPPER = "matmul measured; attention: cuDNN, FlashAttention-3 paper (arXiv:2407.08608), figures 5 and 6"
VARIANTS = re.compile(r"\b(ti|super|d|laptop|max q|nvl|h100 pcie)\b")


@dataclass(frozen=True)
class Card:
    """Rates that large bf16 kernels reach."""

    name: str
    matmul: float
    """TFLOP/s"""
    attention: float
    """TFLOP/s of attention's forward, 128 wide heads"""
    attention_backward: float
    """TFLOP/s"""
    bandwidth: float
    """TB/s of the card's memory, read and written"""
    memory: float
    """GiB"""
    pcie: float = PCIE4
    """GB/s from the host"""
    source: str = ""
    """Where the rates are from."""


def _scaled(name: str, peak: float, bandwidth: float, memory: float, pcie: float = PCIE4) -> Card:
    """A card of which nothing was measured.

    Arguments
        peak: dense bf16 TFLOP/s with float32 accumulation, as the maker says.
        bandwidth: TB/s, as the maker says.
    """
    return Card(
        name,
        matmul=peak * MATMUL_SHARE,
        attention=peak * ATTENTION_SHARE,
        attention_backward=peak * BACKWARD_SHARE,
        bandwidth=bandwidth * BANDWIDTH_SHARE,
        memory=memory,
        pcie=pcie,
        source=f"peak {peak:g} TFLOP/s x {MATMUL_SHARE}, {ATTENTION_SHARE} and {BACKWARD_SHARE}, not measured",
    )


CARDS = {
    card.name: card
    for card in (
        _scaled("B200", 2250, 8.0, 178, PCIE5),
        Card("H200", 798, 595, 516, 4.2, 139, PCIE5, f"{HOPPER}, both on an H100"),
        Card("H100", 798, 595, 516, 3.0, 79, PCIE5, HOPPER),
        _scaled("A100-80", 312, 2.04, 79),
        _scaled("A100-40", 312, 1.56, 39),
        _scaled("L40S", 362, 0.864, 44),
        _scaled("L4", 121, 0.3, 22),
        _scaled("RTX PRO 6000", 503, 1.79, 95, PCIE5),
        _scaled("RTX 6000 Ada", 364, 0.96, 47),
        _scaled("RTX A6000", 155, 0.768, 47),
        _scaled("RTX 5090", 209, 1.79, 31, PCIE5),
        _scaled("RTX 4090", 165, 1.01, 23.5),
        _scaled("RTX 4080", 97, 0.717, 15.5),
        _scaled("RTX 3090", 71, 0.936, 23.5),
        _scaled("RTX 3060", 25, 0.36, 11.5),
    )
}
"""By the name that ``plan_card`` and ``--card`` take."""


MEASURED = {
    "matmul_tflops": "matmul",
    "attention_forward_tflops": "attention",
    "attention_backward_tflops": "attention_backward",
    "copy_tb_per_s": "bandwidth",
    "host_to_device_gb_per_s": "pcie",
}
"""Names in the file that `make gpu PART=ceilings` writes, and the rates that they are."""


def measured(path: Path, where: str) -> Card:
    """A card by rates that were measured on it. Raises ConfigError for a file that has none.

    Arguments
        where: the key that names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rates = {ours: float(found[name]) for name, ours in MEASURED.items()}
        device = str(found["device"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is no file of measured rates: {type(error).__name__}: {error}",
            where=where,
            allowed=f"a JSON object with device and the numbers {', '.join(MEASURED)}",
            remedy="write it with `make gpu PART=ceilings`, or leave the key out",
        ) from None
    if wrong := [name for name, ours in MEASURED.items() if not 0 < rates[ours] < float("inf")]:
        raise ConfigError(f"{path}: {', '.join(wrong)} must be above 0", where=where, remedy="measure again")
    known = of_device(device, 0)
    return Card(device, **rates, memory=known.memory if known else float("inf"), source=f"measured: {path}")


def named(name: str, where: str = "plan_card") -> Card:
    """The card called ``name``, in any case. Raises ConfigError with the nearest name for another."""
    by_name = {known.casefold(): card for known, card in CARDS.items()}
    if card := by_name.get(name.casefold()):
        return card
    raise ConfigError(
        f"no rates are known for a card {name!r}",
        where=where,
        allowed=CARDS,
        nearest=nearest(name, CARDS),
        remedy="leave it out: work is then given in FLOP, without times",
    )


def of_device(name: str, gibibytes: float) -> Card | None:
    """The card that a driver calls ``name``, such as ``NVIDIA H100 80GB HBM3``, and gives that much memory; or None.

    Variants that share a card's name and not its speed are other cards, of which no rates are known.
    """
    words = name.casefold().replace("-", " ")
    if VARIANTS.search(words):
        return None
    alike = [card for card in CARDS.values() if f" {card.name.casefold().split('-')[0]} " in f" {words} "]
    return min(alike, key=lambda card: abs(card.memory - gibibytes), default=None)
