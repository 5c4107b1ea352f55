"""A family from outside: built as a wheel, installed next to the core, found, trained with features unknown to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuner.testing.clips import render_clip

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "tuner-ltx"
WIDTH, HEIGHT, FRAMES = 544, 1024, 9
TOKENS = 2 * (WIDTH // 32) * (HEIGHT // 32)
"""More than the 1024 that a chunk of the feed-forward has at least."""
STEPS, LAYERS = 3, 4

TRAIN = """
import json, sys
from collections import Counter
from pathlib import Path
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
import tuner, tuner_ltx.tiny
from tuner import pipeline
from tuner.assembly import assemble
from tuner_offload.streaming import BlockStreaming

torch.set_num_threads(1)
seen = {"blocks": Counter(), "chunks": Counter(), "streamed": 0}

def watched(owner, name, note):
    plain = getattr(owner, name)
    def watch(self, *arguments, **named):
        note(*arguments)
        return plain(self, *arguments, **named)
    setattr(owner, name, watch)

watched(LTXVideoTransformerBlock, "forward", lambda tokens, *_: seen["blocks"].update([tokens.shape[1]]))
watched(FeedForward, "forward", lambda tokens, *_: seen["chunks"].update([tokens.shape[1]]))
watched(BlockStreaming, "enter", lambda index: seen.update(streamed=seen["streamed"] + 1))
keys = json.loads(Path(sys.argv[1]).read_text())
tuner_ltx.tiny.build_tiny(Path(keys["pretrained_model_name_or_path"]), layers=int(sys.argv[2]))
assembly = assemble(keys)
pipeline.run(assembly)
seen["plugins"] = sorted(assembly.plugins)
seen["from"] = [tuner.__file__, tuner_ltx.__file__]
print(json.dumps(seen))
"""


def run(*command: object, **options: Any) -> str:
    """What a command prints. Raises AssertionError when it fails."""
    done = subprocess.run([*map(str, command)], **options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def python(site: Path, *arguments: object) -> str:
    """What a fresh interpreter prints that finds ``site`` before all else."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return run(sys.executable, *arguments, env=environment, cwd=site)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder with the wheels of the core and of the family installed in it."""
    root = tmp_path_factory.mktemp("wheels")
    target = root / "site"
    for project in (ROOT, PACKAGE):
        run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", root, cwd=project)
    wheels = sorted(root.glob("*.whl"))
    assert len(wheels) == 2
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, *wheels)
    return target


def config(folder: Path) -> dict[str, Any]:
    clips = folder / "clips"
    clips.mkdir()
    for index in range(2):
        render_clip(clips / f"{index}.mp4", width=WIDTH, height=HEIGHT, frames=FRAMES, fps=25, seed=index)
        (clips / f"{index}.txt").write_text("a red circle moves", encoding="utf-8")
    video = {
        "id": "clips",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": str(clips),
        "cache_dir_vae": str(folder / "cache" / "vae"),
        "caption_strategy": "textfile",
        "resolution": WIDTH,
        "resolution_type": "pixel",
        "video": {"num_frames": FRAMES, "min_frames": FRAMES},
    }
    text = {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": str(folder / "cache" / "text")}
    return {
        "model_family": "ltx",
        "pretrained_model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "output"),
        "mixed_precision": "no",
        "max_train_steps": STEPS,
        "train_batch_size": 1,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_format": "diffusers",
        "tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]},
        "enable_chunked_feed_forward": True,
        "feed_forward_chunk_size": 1,
        "enable_group_offload": True,
        "data_backend_config": [video, {**text, "type": "local"}],
    }


def test_it_trains_with_features_that_do_not_know_it(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(tmp_path)), encoding="utf-8")
    seen = json.loads(python(site, "-c", TRAIN, path, LAYERS).splitlines()[-1])
    assert all(Path(each).is_relative_to(site) for each in seen["from"])
    assert {"ltx", "tread", "chunked_ff", "offload"} <= set(seen["plugins"])
    # Each block runs in forward and again in backward; the middle ones see half of the tokens.
    assert seen["blocks"] == {str(TOKENS): STEPS * 2 * 2, str(TOKENS // 2): STEPS * 2 * (LAYERS - 2)}
    assert str(TOKENS) not in seen["chunks"]
    assert seen["chunks"][str(TOKENS // 2)] > seen["blocks"][str(TOKENS // 2)]
    assert seen["streamed"] == STEPS * 2 * LAYERS
    log = [json.loads(line) for line in (tmp_path / "output" / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
    check_lora(tmp_path / "output" / f"checkpoint-{STEPS}", tmp_path / "model")


def check_lora(checkpoint: Path, model: Path) -> None:
    """diffusers' own pipeline takes the LoRA, every attention of it trained."""
    from diffusers import LTXPipeline
    from safetensors.torch import load_file

    path = checkpoint / "pytorch_lora_weights.safetensors"
    tensors = {name: each for name, each in load_file(path).items() if ".lora_" in name}
    assert len(tensors) == LAYERS * 2 * 4 * 2  # blocks, attentions, projections, A and B
    assert all(each.abs().max() > 0 for each in tensors.values())
    pipeline = LTXPipeline.from_pretrained(model)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    adapted = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(adapted) == len(tensors)


def test_its_own_tests_pass_where_it_is_installed(site: Path) -> None:
    """Contract kit, and equality with diffusers, against the installed wheels."""
    python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", PACKAGE, PACKAGE / "tests")
