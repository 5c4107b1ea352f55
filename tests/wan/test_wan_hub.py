"""Models from the hub: fetched whole, fetched once, taken up again where the connection broke, and offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.testing.hub import Hub

CODE = """
import sys, torch, huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000  # else all of a tiny file is one piece
from tuner.config.keys import CoreConfig
from tuner.errors import TunerError
from tuner.materialise import materialise
from tuner.run import Run
from tuner_wan import WanPlugin
for _ in range(int(sys.argv[2])):
    plugin = WanPlugin("wan", WanPlugin.Config())
    run = Run(CoreConfig(pretrained_model_name_or_path=sys.argv[1]), {})
    try:
        run.spec = plugin.describe_model(run)
        run.place(torch.device("cpu"), torch.float32)
        try:
            model = plugin.load_model(run)
        except TunerError as error:
            if "start again" not in str(error):
                raise
            run.spec = plugin.describe_model(run)  # a second start: the real config is read now
            model = plugin.load_model(run)
        materialise(model.network, device=run.device)
        with model.use("vae", "text_encoder"):
            print("whole", run.spec.networks[0].blocks)
    except TunerError as error:
        print(error)
"""
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in tiny.rglob("*") if path.is_file()}
    server = Hub({"anna/tiny-wan": files | {"README.md": b"hello", "extra/big.safetensors": b"0" * 99}})
    yield server
    server.stop()


def start(hub: Hub, cache: Path, *, times: int = 1, offline: bool = False) -> str:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CODE, "anna/tiny-wan", str(times)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_a_model_is_fetched_from_the_endpoint_once_and_then_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    assert "cannot fetch 'anna/tiny-wan'" in start(hub, tmp_path, offline=True)
    assert start(hub, tmp_path, times=2) == "whole 4\n" * 2
    assert hub.sent.count(WEIGHTS) == 1
    assert len(hub.sent) == len(set(hub.sent)), "what is there is not fetched again"
    assert not {"README.md", "extra/big.safetensors"} & set(hub.sent), "only what is read is fetched"
    assert start(hub, tmp_path, offline=True) == "whole 4\n"


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.breaks[WEIGHTS] = 20_000
    assert start(hub, tmp_path) == "whole 4\n"
    assert (WEIGHTS, 20_000) in hub.ranges
