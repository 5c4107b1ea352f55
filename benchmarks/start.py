"""From starting `tuner run` to its first step, part by part, beside the least that these libraries need.

    python benchmarks/start.py --page docs/benchmarks/start.md

A tiny Wan with a warm cache: what is measured is the program, not the weights. Each start is a process of its own; the
two programs take turns, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CLOCK = '''
"""Notes when a run comes to each of its parts."""
import json, os, sys, time
import psutil
from tuner import Plugin, PluginConfig, hookimpl

BEGAN = psutil.Process().create_time()
SEEN = {}


def note(name):
    SEEN.setdefault(name, time.time() - BEGAN)


class ClockPlugin(Plugin[PluginConfig]):
    """A clock."""

    @hookimpl
    def configure(self, run):
        note("config")

    @hookimpl(trylast=True)
    def data_ready(self, run, spec, data, plan):
        note("data")

    @hookimpl
    def model_transforms(self, run, model):
        note("libraries")
        return []

    @hookimpl
    def on_train_start(self, run, model):
        note("weights, cache and LoRA")

    @hookimpl
    def on_step_end(self, run, model, metrics):
        if "first step" not in SEEN:
            note("first step")
            unwanted = ("diffusers.pipelines.wan", "transformers.models.umt5")
            heavy = [name for name in sys.modules if name.startswith(unwanted)]
            with open(os.environ["TUNER_CLOCK"], "w") as file:
                json.dump({"seen": SEEN, "heavy": heavy, "cpu": time.process_time()}, file)
'''
BARE = '''
"""The least that a program on these libraries needs: import, load, attach, one step."""
import json, sys, time
import psutil
import torch
from accelerate import Accelerator
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft import LoraConfig

imported = time.time()
accelerator = Accelerator(cpu=True)
network = WanTransformer3DModel.from_pretrained(sys.argv[1], subfolder="transformer").requires_grad_(False)
network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
optimizer = torch.optim.AdamW([each for each in network.parameters() if each.requires_grad], lr=1e-4)
config = network.config
latents = torch.randn(1, config.in_channels, 3, 8, 8)
text = torch.randn(1, 512, config.text_dim)
prediction = network(latents, torch.tensor([500.0]), text, return_dict=False)[0]
prediction.square().mean().backward()
optimizer.step()
began = psutil.Process().create_time()
print(json.dumps({"imports": imported - began, "first step": time.time() - began, "cpu": time.process_time()}))
'''
PARTS = ("config", "data", "libraries", "weights, cache and LoRA", "first step")


def main() -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--page", type=Path, help="write the page here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), chosen.pairs)
    page = written(figures)
    if chosen.page is None:
        print(page)
    else:
        chosen.page.write_text(page, encoding="utf-8")


def measure(folder: Path, pairs: int) -> dict[str, Any]:
    """Starts of both programs, in turns."""
    config, environment = prepare(folder)
    run(config, environment, folder / "first")  # fills the cache
    ours, bare, helps = [], [], []
    for number in range(pairs):
        ours.append(run(config, environment, folder / f"run-{number}"))
        bare.append(one_bare(folder / "model"))
        helps.append(one_help())
    return {"ours": ours, "bare": bare, "help": helps}


def prepare(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A model, clips, a config, and an environment in which the clock is a plugin."""
    from tuner.testing.clips import render_clip
    from tuner.testing.plugin_env import write_distribution
    from tuner_wan.tiny import build_tiny_t2v

    build_tiny_t2v(folder / "model")
    for seed in range(2):
        render_clip(folder / "clips" / f"clip {seed}.mp4", width=64, height=64, frames=9, fps=16, seed=seed)
    site = write_distribution(
        folder / "site", "tuner-clock", {"clock": "tuner_clock:ClockPlugin"}, modules={"tuner_clock": CLOCK}
    )
    config = {
        "model_family": "wan",
        "plugins": ["wan", "clock"],
        "pretrained_model_name_or_path": str(folder / "model"),
        "cache_dir": str(folder / "cache"),
        "mixed_precision": "no",
        "max_train_steps": 1,
        "lora_rank": 4,
        "data_backend_config": [
            {
                "id": "clips",
                "dataset_type": "video",
                "instance_data_dir": str(folder / "clips"),
                "caption_strategy": "filename",
                "resolution": 64,
                "resolution_type": "pixel",
                "video": {"num_frames": 9},
            },
            {"id": "text", "dataset_type": "text_embeds", "default": True},
        ],
    }
    return config, {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), "HF_HUB_OFFLINE": "1"}


def run(config: dict[str, Any], environment: dict[str, str], output: Path) -> dict[str, Any]:
    """When one `tuner run` came to each of its parts, in seconds since its process was started."""
    path, clock = output.with_suffix(".json"), output.with_suffix(".clock")
    path.write_text(json.dumps({**config, "output_dir": str(output)}), encoding="utf-8")
    command = [sys.executable, "-m", "tuner", "run", "--config", str(path)]
    subprocess.run(command, env={**environment, "TUNER_CLOCK": str(clock)}, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(clock.read_text(encoding="utf-8"))
    return found


def one_bare(model: Path) -> dict[str, float]:
    """The same of the bare program."""
    done = subprocess.run([sys.executable, "-c", BARE, str(model)], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_help() -> float:
    """Seconds of ``tuner --help``."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tuner", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def written(figures: dict[str, Any]) -> str:
    """The page."""
    ours, bare = figures["ours"], figures["bare"]
    ends = {part: statistics.median(each["seen"][part] for each in ours) for part in PARTS}
    begins = [0.0, *ends.values()]
    least = {name: statistics.median(each[name] for each in bare) for name in ("imports", "first step")}
    pairs = [one["seen"]["first step"] / other["first step"] for one, other in zip(ours, bare, strict=True)]
    cpu = statistics.median(one["cpu"] / other["cpu"] for one, other in zip(ours, bare, strict=True))
    heavy = sorted({name for each in ours for name in each["heavy"]})
    rows = [f"| {part} | {end - begin:.2f} |" for (part, end), begin in zip(ends.items(), begins, strict=False)]
    total = ends["first step"]
    return "\n".join(
        [
            "# From the command to the first step",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}: `python benchmarks/start.py`, {len(ours)} starts of each program in turns, "
            "medians. A tiny Wan with a warm cache, on the CPU.",
            "",
            "| part of `tuner run` | seconds |",
            "|---|---|",
            *rows,
            f"| **all** | **{total:.2f}** |",
            "",
            "*config*: the interpreter, the command line, plugins, keys. *data*: the model's facts, probing, buckets, "
            "the order of training. *libraries*: torch, diffusers' network class, PEFT, Accelerate. The others are "
            "what they say.",
            "",
            "| | seconds |",
            "|---|---|",
            f"| bare program: imports of torch, the network class, PEFT, Accelerate | {least['imports']:.2f} |",
            f"| bare program: with weights, LoRA and one step | {least['first step']:.2f} |",
            f"| `tuner run` / bare program (goal 1.3) | {statistics.median(pairs):.2f} |",
            f"| the same in CPU seconds | {cpu:.2f} |",
            f"| `tuner --help` (goal 0.15) | {statistics.median(figures['help']):.2f} |",
            "",
            "Pipelines and encoders imported before the first step: " + (", ".join(heavy) or "none") + ".",
            "",
        ]
    )


if __name__ == "__main__":
    main()
