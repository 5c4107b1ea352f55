"""The plugin that the tutorial makes is complete: found, held to the contract, and it does what the page says."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin import BUILTINS
from tuner.cli.plugins.scaffold import files
from tuner.selection import discover
from tuner.testing.plugin_env import importable, write_distribution

PAGES = Path(__file__).parents[2] / "docs" / "plugins"
TUTORIAL = (PAGES / "tutorial.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|toml)\n# tuner-drift/(\S+)\n(.*?)```", TUTORIAL, re.DOTALL))


def test_the_page_quotes_what_the_generator_writes() -> None:
    written = files("drift", "feature")
    assert {"pyproject.toml", "tuner_drift/__init__.py", "tuner_drift/contract.py"} <= FILES.keys()
    for name, quote in FILES.items():
        assert written[name].startswith(quote), name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path of Python, with the tutorial's plugin in it."""
    folder = tmp_path_factory.mktemp("site")
    plugins = tomllib.loads(FILES["pyproject.toml"])["project"]["entry-points"]["tuner.plugins"]
    module = FILES["tuner_drift/__init__.py"]
    return write_distribution(folder, "tuner-drift", plugins, modules={"tuner_drift": module})


def test_it_measures_how_far_the_weights_moved_and_goes_on_after_a_resume(job, site) -> None:
    keys = {"drift_interval": 2, "checkpoint_step_interval": 3, "resume_from_checkpoint": "latest"}
    with importable(job.distribution, site):
        whole = assemble(job.config("drift-whole", **keys, max_train_steps=4))
        assert whole.found["drift"].package == "tuner-drift"
        pipeline.run(whole)
        for steps in (3, 4):
            pipeline.run(assemble(job.config("drift-halves", **keys, max_train_steps=steps)))
        assert "drift" not in assemble(job.config("drift-without")).plugins
    logs = [measured(job.folder / name) for name in ("drift-whole", "drift-halves")]
    assert sorted(logs[0]) == [2, 4]
    assert all(0 < distance < math.inf for distance in logs[0].values())
    assert logs[0] == logs[1]


def measured(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    return {line["step"]: line["drift/distance"] for line in lines if "drift/distance" in line}


def test_the_table_of_plugins_has_all_of_them() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \| (\[.+\]\(.+\)) \|$", (PAGES / "README.md").read_text(), re.MULTILINE)
    named = [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)]
    ours = {name for name, found in discover().items() if found.builtin or found.package == "difftuner"}
    assert sorted(named) == sorted(ours)
    assert set(BUILTINS) <= set(named)
