"""The tiny model is a real model folder, the same bytes every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from tuner.errors import ModelError
from tuner_wan.tiny import build_tiny_t2v, tiny_pipeline, tiny_tokenizer


def test_a_plain_pipeline_loads_and_renders_it(tiny: Path) -> None:
    pipeline = WanPipeline.from_pretrained(tiny)
    frames = pipeline(
        "两只猫 and a dog", width=32, height=48, num_frames=5, num_inference_steps=2, output_type="np"
    ).frames
    assert frames.shape == (1, 5, 48, 32, 3)
    assert len(pipeline.transformer.blocks) == 4


def test_bytes_depend_on_the_arguments_alone(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_tiny_t2v(tmp_path / "again", layers=4)
    assert torch.equal(torch.get_rng_state(), before)
    files, again = (sorted(path.relative_to(root) for path in root.rglob("*")) for root in (tiny, tmp_path / "again"))
    assert files == again
    files = [path for path in files if (tiny / path).is_file()]
    assert all((tiny / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    assert sum((tiny / path).stat().st_size for path in files) < 1_000_000
    other = build_tiny_t2v(tmp_path / "other", layers=4, seed=1) / "vae" / "diffusion_pytorch_model.safetensors"
    assert other.read_bytes() != (tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_nothing_is_overwritten(tiny: Path) -> None:
    with pytest.raises(ModelError, match="will not overwrite"):
        build_tiny_t2v(tiny)


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner_wan.tiny.sync_file", full)
    with pytest.raises(OSError, match="No space"):
        build_tiny_t2v(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_reads_english_and_chinese() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("A cat 两只猫 🐱").input_ids)
    assert tokens[-1] == "</s>"
    assert {"▁A", "▁cat", "两", "只", "猫", "<unk>"} <= set(tokens)


def test_sizes_can_be_chosen() -> None:
    transformer = tiny_pipeline(layers=1, heads=2, head_dim=64, ffn_dim=256).transformer
    assert transformer.blocks[0].ffn.net[2].weight.shape == (128, 256)


def test_it_can_be_built_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuner_wan.tiny", str(tmp_path / "model"), "--layers", "3"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "model")
    assert (tmp_path / "model" / "model_index.json").is_file()
