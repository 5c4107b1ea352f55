"""Config files people already have pass ``tuner check`` with nothing replaced but the paths of model and clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tuner import pipeline
from tuner.assembly import assemble
from tuner.config.load import load_config
from tuner.testing.clips import render_clip
from tuner_wan.tiny import build_tiny_t2v

SEED = Path(__file__).parents[1] / "config" / "seed"
BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
ROUTES = ["tread-simple.fragment.json", "tread-progressive.fragment.json"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: config/, datasets/ with clips large and long enough, and a model of 30 blocks."""
    folder = tmp_path_factory.mktemp("users")
    build_tiny_t2v(folder / "model", layers=30)
    clips = folder / "datasets" / "disney-black-and-white"
    clips.mkdir(parents=True)
    caption = render_clip(clips / "steamboat.mp4", width=832, height=480, frames=80, fps=16, seed=0)
    shutil.copy(clips / "steamboat.mp4", clips / "willie.mp4")  # a step takes two
    for name in ("steamboat", "willie"):
        (clips / f"{name}.txt").write_text(caption, encoding="utf-8")
    (folder / "config" / "wan").mkdir(parents=True)
    text = (SEED / "config.json").read_text(encoding="utf-8").replace(BASE, str(folder / "model"))
    (folder / "config" / "config.json").write_text(text, encoding="utf-8")
    datasets = (SEED / "multidatabackend.json").read_text(encoding="utf-8")
    (folder / "config" / "wan" / "multidatabackend.json").write_text(datasets, encoding="utf-8")
    return folder


def check(**more) -> None:
    pipeline.check(assemble({**load_config(None), **more}))


def test_the_users_config_passes_check_as_it_is(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    check()
    out = capsys.readouterr().out
    assert "2 kept" in out
    assert "624x368, 73 frames" in out
    assert "num_frames 75 becomes 73" in out
    assert "400000 steps of 2 samples" in out
    assert "there is no warm-up" in out
    written = [path.name for path in (workplace / "output").rglob("*") if path.is_file()]
    assert written == ["data_report.html"]  # nothing else where the run will write


@pytest.mark.parametrize("fragment", ROUTES)
def test_the_users_routes_pass_check(workplace, monkeypatch, fragment):
    monkeypatch.chdir(workplace)
    check(**json.loads((SEED / fragment).read_text()))


def test_the_quantised_fragment_passes_check(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    fragment = json.loads("{" + (SEED / "quantised.fragment.json").read_text().strip().rstrip(",") + "}")
    assert fragment["base_model_precision"] == "int8-quanto"
    check(**fragment)
