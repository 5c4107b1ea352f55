"""A package that `tuner plugins new` writes is built, installed where nothing of it was, passes and trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tuner.cli import app
from tuner.errors import PluginError
from tuner.testing.clips import render_clip
from tuner.testing.project import flat_config

PROGRAM = """
import sys, pytest
from tuner_dreamer import build_dreamer
from tuner.cli import main
assert pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", *sys.argv[2:]]) == 0
build_dreamer("model")
sys.argv = ["tuner", "run", "--config", sys.argv[1], "--far_off_interval", "2"]
main()
"""


def new(*words: str) -> Result:
    return CliRunner().invoke(app, ["plugins", "new", *words])


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for name, kind in (("far_off", "feature"), ("dreamer", "family")):
        result = new(name, "--kind", kind, "--folder", str(folder / name))
        assert result.exit_code == 0, result.output
        assert f"tuner plugins check {name}" in result.output
    return folder


def test_both_kinds_are_built_installed_tested_and_trained(packages: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name in ("far_off", "dreamer"):
        build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
        subprocess.run(build, cwd=packages / name, check=True, capture_output=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, *map(str, tmp_path.glob("*.whl"))], check=True)
    render_clip(tmp_path / "clips" / "a circle.mp4", width=64, height=64, frames=9, fps=16, seed=0)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(flat_config(tmp_path, family="dreamer", max_train_steps=2)))
    tests = [str(packages / name / "tests") for name in ("far_off", "dreamer")]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(config), *tests]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "output" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("far_off/distance", 0) > 0] == [2]


def test_what_is_written_is_tidy(packages: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        for name in ("far_off", "dreamer"):
            ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
            done = subprocess.run(ruff, cwd=packages / name, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
    for path in packages.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            words = path.read_text(encoding="utf-8").lower()
            assert "drift" not in words
            assert "toy" not in words


def test_what_is_written_is_typed(packages: Path) -> None:
    # Its imports are not followed, which would take most of a minute: what comes from them has no type here.
    relaxed = ["--follow-imports=skip", "--allow-untyped-decorators", "--no-warn-return-any", "--cache-dir", os.devnull]
    names = ["-p", "tuner_far_off", "-p", "tuner_dreamer"]
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(packages / "dreamer" / "pyproject.toml")]
    path = os.pathsep.join(str(packages / name) for name in ("far_off", "dreamer"))
    environment = {**os.environ, "MYPYPATH": path}
    done = subprocess.run([*mypy, *relaxed, *names], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["feature", "family"])
def test_a_long_name_makes_no_long_lines(tmp_path: Path, kind: str) -> None:
    new("a_rather_long_name_for_a_plugin", "--kind", kind, "--folder", str(tmp_path / "long"))
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(ruff, cwd=tmp_path / "long", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "thoughts.txt").write_text("keep")
    result = new("mine", "--folder", str(place))
    assert isinstance(result.exception, PluginError)
    assert "already" in str(result.exception)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thoughts.txt"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tread", "there is a plugin 'tread' already"),
        ("quantization", "there is a package 'tuner_quantization' already"),
        ("My-Plugin", "did you mean 'my_plugin'?"),
        ("class", "no word of Python's"),
        ("2fast", "did you mean 'fast'?"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, told: str) -> None:
    result = new(name, "--folder", str(tmp_path / "x"))
    assert isinstance(result.exception, PluginError)
    assert told in str(result.exception)
    assert not list(tmp_path.iterdir())
