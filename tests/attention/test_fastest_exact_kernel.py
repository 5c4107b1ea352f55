"""The choice of the exact kernel: the fastest that runs, measured once, remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tuner.attention import EXACT, AttentionBackend
from tuner.builtin.exact_attention import ExactAttentionPlugin
from tuner.builtin.exact_attention.measure import fastest, remembered
from tuner.config.keys import CoreConfig
from tuner.run import Run


def timer(**seconds: float):
    def time(name: str) -> float:
        if name not in seconds:
            raise RuntimeError("No available kernel. Aborting execution.")
        return seconds[name]

    return time


def test_the_fastest_that_runs_is_taken() -> None:
    assert fastest(["cudnn", "flash", "native"], timer(cudnn=0.2, flash=0.1, native=0.1)) == "flash"
    assert fastest(["cudnn", "flash", "native"], timer(native=0.3)) == "native"
    assert fastest(["cudnn"], timer()) is None


def test_it_is_measured_once_for_each_device(tmp_path: Path) -> None:
    path, asked = tmp_path / "deep" / "kernels.json", []

    def measure() -> str:
        asked.append(1)
        return "flash"

    assert [remembered(path, key, measure) for key in ("one", "one", "two")] == ["flash"] * 3
    assert len(asked) == 2
    assert json.loads(path.read_text()) == {"one": "flash", "two": "flash"}


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"one": 3}', "null"])
def test_a_file_that_cannot_be_read_costs_only_the_measurement(tmp_path: Path, content: str) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(content)
    assert remembered(path, "one", lambda: "flash") == "flash"
    assert json.loads(path.read_text())["one"] == "flash"
    folder = tmp_path / "folder"
    folder.write_text("a file where the folder should be")
    assert remembered(folder / "kernels.json", "one", lambda: "flash") == "flash"


def test_without_a_cuda_device_torch_chooses_and_nothing_is_measured(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = Run(CoreConfig(attention_mechanism="_native_cudnn"), plugins={})
    plugin = ExactAttentionPlugin("exact_attention", ExactAttentionPlugin.Config())
    plugin.configure(run=run)
    assert "'_native_cudnn' needs a CUDA device" in caplog.text
    offered = plugin.attention_backends(run=run)
    assert offered[EXACT] is None
    assert offered["_native_cudnn"] is None
    assert offered["_native_math"] == AttentionBackend(dispatcher="_native_math", trains=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_one_of_the_candidates_wins() -> None:
    from tuner.builtin.exact_attention.measure import cuda_timer

    candidates = ["_native_cudnn", "_native_flash", "native"]
    assert fastest(candidates, cuda_timer(4096, 128, torch.bfloat16)) in candidates
