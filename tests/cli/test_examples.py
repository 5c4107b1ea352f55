"""What lies in `examples/` can be used as it is: checked, within the card it names, and trained on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.planner.cards import CARDS
from tuner.cli import app
from tuner.cli.flags import read_settings
from tuner.config.load import plain_data
from tuner.testing.clips import render_clip
from tuner_offload import room

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted({path.parent.name for path in (ROOT / "examples").glob("*/config.json")} - {"quickstart"})
DEVICE_GIB = {"1.3b-12gb": 9, "14b-24gb": 17, "2.2-i2v-both-experts": 16, "images-only": 9, "lowest-vram": 2.5}
"""At most, by the pages that describe them."""
HOST_GIB = 64
"""What the largest of them ask for."""
TINY = {
    "lowest-vram": "t2v-480p-1.3b-2.1",
    "2.2-i2v-both-experts": "i2v-14b-2.2-both",
    "images-only": "t2v-480p-1.3b-2.1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, a long clip and two pictures, as a person has them."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "examples", folder / "examples")
    videos, pictures = folder / "datasets" / "my-videos", folder / "datasets" / "my-pictures"
    pictures.mkdir(parents=True)
    caption = render_clip(videos / "clip.mp4", width=640, height=640, frames=83, fps=16, seed=0)
    (videos / "clip.txt").write_text(caption, encoding="utf-8")
    for index in range(2):
        Image.new("RGB", (640, 640), (99 * index, 99, 99)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _in_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(room, "available", lambda: HOST_GIB * 2**30)


def test_there_is_one_for_each_page() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "quickstart").glob("*.md")} - {"README"}
    assert pages == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_passes_check_and_fits_its_card(name: str) -> None:
    config = f"examples/{name}/config.json"
    checked = CliRunner().invoke(app, ["check", "--config", config])
    assert checked.exception is None, checked.exception
    spoiled = [line for line in checked.output.splitlines() if "warning" in line.lower() or "nothing" in line]
    assert not spoiled
    planned = CliRunner().invoke(app, ["plan", "--config", config, "--json"])
    assert planned.exception is None, planned.exception
    peak = json.loads(planned.stdout)["peak"]["device"]["bytes"] / 2**30
    card = CARDS[str(read_settings(Path(config), [], {})["plan_card"])]
    assert peak < min(card.memory, DEVICE_GIB.get(name, card.memory))


@pytest.mark.parametrize("name", TINY)
def test_it_trains_a_tiny_model(name: str, place: Path) -> None:
    from tuner_wan.tiny import build_tiny

    model = build_tiny(place / "models" / name, TINY[name], layers=5)
    settings: dict[str, Any] = dict(read_settings(Path(f"examples/{name}/config.json"), [], {}))
    datasets = plain_data(Path(str(settings["data_backend_config"])))
    datasets[0] |= {"resolution": 32, "minimum_image_size": 0}
    if "video" in datasets[0]:
        datasets[0]["video"] |= {"num_frames": 5, "min_frames": 5}
    small = {"max_train_steps": 2, "wan_expert_switch_steps": 1, "validation_prompt": None, "optimizer": "adamw"}
    changed = {key: value for key, value in small.items() if key in settings}
    settings |= changed | {"pretrained_model_name_or_path": str(model), "data_backend_config": datasets}
    pipeline.run(assemble(settings))
    log = [json.loads(line) for line in (place / "output" / name / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2]
    assert list((place / "output" / name / "checkpoint-2").glob("pytorch_lora_weights*.safetensors"))
