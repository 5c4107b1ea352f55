"""torch's allocator is asked for segments that grow, unless its user has said something else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tuner.cli import allocator


@pytest.mark.parametrize("name", allocator.NAMES)
def test_what_the_user_set_stands(name: str) -> None:
    environment = {name: "max_split_size_mb:128"}
    allocator.settle(environment)
    assert environment == {name: "max_split_size_mb:128"}


@pytest.mark.parametrize(("torch", "set_"), [("2.13.0+cu130", True), ("2.13.0", True), ("2.13.0+rocm7.1", False)])
def test_it_is_asked_for_where_there_is_such_a_thing(monkeypatch: pytest.MonkeyPatch, torch: str, set_: bool) -> None:
    monkeypatch.setattr(allocator, "version", lambda name: torch)
    environment: dict[str, str] = {}
    allocator.settle(environment)
    assert environment == ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if set_ else {})


@pytest.mark.gpu
def test_torch_takes_it() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in allocator.NAMES}
    allocator.settle(environment)
    code = (
        "import torch; torch.ones(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
