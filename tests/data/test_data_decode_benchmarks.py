"""The benchmarks of probing, decoding and loading run, and say what they are there to say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "data_decode": (["--width", "96", "--height", "48", "--frames", "17", "--rounds", "1"], "96x48"),
    "data_loading": (["--width", "96", "--height", "48", "--frames", "9", "--samples", "2", "--steps", "3"], "96x48"),
    "data_probe": (["--files", "20", "--clips", "3", "--rounds", "1"], "20 files"),
}


@pytest.mark.parametrize("name", TINY)
def test_benchmark(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments, shown = TINY[name]
    module.main(arguments)
    assert shown in capsys.readouterr().out
