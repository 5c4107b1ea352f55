"""Whole runs with streamed blocks leave what runs without leave: two experts in turn, the network itself trained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tuner import pipeline
from tuner.assembly import assemble
from tuner.testing.clips import render_clip
from tuner_wan.tiny import build_tiny

LAYERS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("streamed-runs")
    build_tiny(folder / "one", layers=LAYERS)
    build_tiny(folder / "pair", "t2v-14b-2.2-both", layers=LAYERS)
    (folder / "clips").mkdir()
    for index in range(2):
        render_clip(folder / "clips" / f"clip {index}.mp4", width=48, height=32, frames=5, fps=16, seed=index)
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """Run a config on the clips; returns the output folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def job(name, model, **keys):
        clips = {
            "id": "clips",
            "dataset_type": "video",
            "instance_data_dir": str(home / "clips"),
            "caption_strategy": "filename",
            "resolution": 32,
            "video": {"num_frames": 5},
        }
        config = {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(home / model),
            "output_dir": str(tmp_path / name),
            "cache_dir": str(home / f"cache-{model}"),
            "checkpoint_step_interval": 0,
            "learning_rate": 1e-2,
            "lora_rank": 2,
            "mixed_precision": "no",
            "data_backend_config": [clips, {"id": "text", "dataset_type": "text_embeds", "default": True}],
            **keys,
        }
        pipeline.run(assemble(config))
        return tmp_path / name

    return job


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "train.jsonl").read_text().splitlines()]


def assert_same_files(one, other, pattern):
    names = sorted(path.relative_to(one) for path in one.glob(pattern))
    assert names
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_two_experts_share_the_ring_in_turns(run, monkeypatch):
    """... also while a clip is rendered between steps, which needs both."""
    from tuner_offload import placement

    rings = []
    made = placement.Ring
    monkeypatch.setattr(placement, "Ring", lambda *arguments: rings.append(made(*arguments)) or rings[-1])
    keys = {
        "model_flavour": "t2v-14b-2.2-both",
        "wan_expert_switch_steps": 1,
        "max_train_steps": 4,
        "validation_prompt": "shapes",
        "validation_resolution": "48x32",
        "validation_num_video_frames": 5,
        "validation_num_inference_steps": 2,
        "validation_step_interval": 3,
    }
    streamed = run("streamed", "pair", enable_group_offload=True, group_offload_resident_blocks=1, **keys)
    plain = run("plain", "pair", **keys)
    assert len(rings) == 1
    assert losses(streamed) == losses(plain)
    assert_same_files(streamed, plain, "checkpoint-4/adapter.*.safetensors")
    pictures = sorted(path.relative_to(plain) for path in plain.glob("validation/step-3/*.png"))
    assert pictures
    assert all((streamed / name).read_bytes() == (plain / name).read_bytes() for name in pictures)


def test_the_network_itself_is_trained_saved_and_resumed(run):
    keys = {
        "model_type": "full",
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
        "checkpoint_step_interval": 2,
        "optimizer_config": {"weight_decay": 0.1},
    }
    streamed = run("streamed", "one", enable_group_offload=True, **keys)
    plain = run("plain", "one", **keys)
    assert losses(streamed) == losses(plain)
    assert_same_files(streamed, plain, "checkpoint-*/*.safetensors")
    assert_same_files(streamed, plain, "checkpoint-3/transformer/*.safetensors")
    WanTransformer3DModel.from_pretrained(streamed / "checkpoint-3" / "transformer")

    shutil.rmtree(streamed / "checkpoint-3")
    run("streamed", "one", enable_group_offload=True, resume_from_checkpoint="latest", **keys)
    assert_same_files(streamed, plain, "checkpoint-3/**/*.safetensors")
