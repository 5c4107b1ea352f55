"""How numbers are written in the log and on the page."""

from __future__ import annotations


def figures(value: float) -> str:
    """Three digits, and all of those before the point: ``1153``, ``86.2``, ``0.00123``."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def tera(flops: float) -> str:
    """FLOP as TFLOP."""
    return f"{figures(flops / 1e12)} TFLOP"


def seconds(value: float) -> str:
    """A time."""
    return f"{figures(value)} s"
