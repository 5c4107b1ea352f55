"""The tiny autoencoder from a hub: the file that is named, or the only one of its repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.testing.hub import Hub

CODE = """
import sys
from tuner.errors import TunerError
from tuner_preview.source import locate
for wish in sys.argv[1:]:
    try:
        print(locate(wish).fetch().read_bytes().decode())
    except TunerError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    one = {"tiny.safetensors": b"the only one", "tiny.pth": b"other", "README.md": b"hello"}
    server = Hub({"anna/one": one, "anna/two": {"a.safetensors": b"a", "deep/b.safetensors": b"b"}})
    yield server
    server.stop()


def ask(hub: Hub, cache: Path, *wishes: str, offline: bool = False) -> list[str]:
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CODE, *wishes]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_file_is_fetched_once_and_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    found = ask(
        hub, tmp_path, "anna/one", "anna/two/deep/b.safetensors", "anna/two", "anna/two/c.safetensors", "no/body"
    )
    assert found[:2] == ["the only one", "b"]
    assert sorted(hub.sent) == ["deep/b.safetensors", "tiny.safetensors"]
    assert found[2].startswith("ConfigError anna/two has 2 .safetensors files")
    assert "anna/two/a.safetensors, anna/two/deep/b.safetensors" in found[2]
    assert found[3].startswith("ConfigError anna/two has no file 'c.safetensors'")
    assert found[4].startswith("ConfigError there is no repository no/body")
    named, unnamed = ask(hub, tmp_path, "anna/two/deep/b.safetensors", "anna/one", offline=True)
    assert named == "b"
    assert unnamed.startswith("ModelError anna/one cannot be had from the hub: ")
