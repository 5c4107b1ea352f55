"""The plugin that the guide shows is complete: it installs, loads and does what it says."""

from __future__ import annotations

import logging
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner.assembly import assemble, new_run
from tuner.testing.plugin_env import importable, write_distribution

GUIDE = Path(__file__).parents[2] / "docs/plugins.md"


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_guides_plugin_loads_from_its_config_key_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = tomllib.loads(block("toml"))["project"]["entry-points"]["tuner.plugins"]
    folder = write_distribution(tmp_path, "update-norm", entries, modules={"update_norm": block("python")})
    with importable(folder):
        assembly = assemble({"model_family": "wan", "update_norm_every": 2})
        assert assembly.found["update_norm"].package == "update-norm"
        run = new_run(assembly)
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.constant_(layer.weight, 3.0)
        model: Any = SimpleNamespace(network=SimpleNamespace(module=layer))
        with caplog.at_level(logging.INFO, logger="tuner"):
            for run.step in (1, 2):
                assembly.manager.hook.on_step_end(run=run, model=model, metrics={"stages": {}})
        told = [record.message for record in caplog.records if "weight norm" in record.message]
        assert told == ["step 2: weight norm 4.2426"]
        assert "update_norm" not in assemble({"model_family": "wan"}).plugins
