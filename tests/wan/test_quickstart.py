"""The quickstart's own files, run for two steps: from clips to a LoRA that changes what a plain pipeline renders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import json5
import pytest
import torch
from diffusers import WanPipeline

from tuner import pipeline
from tuner.assembly import assemble
from tuner.config.load import load_config

FILES = Path(__file__).parents[2] / "examples" / "quickstart"
PROGRESSIVE_ROUTES = [(0.1, 2, 8), (0.25, 9, 11), (0.35, 12, 15), (0.25, 16, 23), (0.1, 24, -2)]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository to the quickstart, prepared by its own script."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(FILES, root / "examples" / "quickstart")
    script = load_script(root / "examples" / "quickstart" / "prepare.py")
    script.main()
    return root


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_preparing_again_changes_nothing(root: Path) -> None:
    output = root / "output" / "quickstart"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert len([path for path in before if path.suffix == ".mp4"]) == 8
    config = json.loads((output / "model" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == 30
    load_script(root / "examples" / "quickstart" / "prepare.py").main()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_the_config_shows_what_it_promises() -> None:
    config = json5.loads((FILES / "config.json").read_text(encoding="utf-8"))
    routes = config["tread_config"]["routes"]
    assert [
        (route["selection_ratio"], route["start_layer_idx"], route["end_layer_idx"]) for route in routes
    ] == PROGRESSIVE_ROUTES
    assert config["lora_rank"] == 16
    assert config["output_dir"].startswith("output/quickstart/")


def test_its_check_passes_and_keeps_every_clip(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    pipeline.check(assemble(load_config(Path("examples/quickstart/config.json")), plugins=["wan", "tread"]))
    assert "8 kept" in " ".join(capsys.readouterr().out.split())


def test_its_lora_loads_in_a_plain_pipeline_and_changes_the_output(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    config = load_config(Path("examples/quickstart/config.json"))
    config |= {
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "validation_num_inference_steps": 2,
        "validation_num_video_frames": 5,
    }
    pipeline.run(assemble(config, plugins=["wan", "tread"]))
    output = root / "output" / "quickstart" / "run"
    videos = list((output / "validation" / "step-2").glob("*.mp4"))
    assert {path.stem for path in videos} == {"red_circle", "blue_square_zh"}
    assert len((output / "train.jsonl").read_text().splitlines()) >= 2

    plain = WanPipeline.from_pretrained(root / "output" / "quickstart" / "model")
    plain.set_progress_bar_config(disable=True)
    before = render(plain)
    plain.load_lora_weights(output / "checkpoint-2", weight_name=LORA)
    assert not torch.equal(render(plain), before)
    plain.unload_lora_weights()
    assert torch.equal(render(plain), before)


def render(plain: WanPipeline) -> torch.Tensor:
    seeded = torch.Generator().manual_seed(0)
    made = plain(
        "A red circle", width=32, height=32, num_frames=5, num_inference_steps=2, generator=seeded, output_type="latent"
    )
    return made.frames
