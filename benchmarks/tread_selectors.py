"""What dropping tokens does to learning: the toy family trained unrouted, routed, with ramps, with other selectors.

    python benchmarks/tread_selectors.py --seeds 4

Two parts, each with the same clips, batches, noise and noise levels for all of its runs, so that runs of one seed are
compared pair by pair:

1. from random weights, all weights trained, on clips of shapes that move straight;
2. a LoRA on what the unrouted run of part 1 came to, on clips of shapes that move diagonally.

The loss is that of held-out clips, without routes. It says nothing of what a model of real size would do, nor of how
its clips would look.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tuner import pipeline
from tuner.assembly import assemble
from tuner.builtin.full.adapter import WEIGHTS
from tuner.testing.clips import render_clip, scene
from tuner.testing.plugin_env import importable, toy_distribution
from tuner.testing.toy import build_toy

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "unrouted": {},
    "uniform": {"tread_config": ROUTES},
    "uniform, linear ramp": {"tread_config": ROUTES, "tread_ratio_schedule": "linear"},
    "motion": {"tread_config": ROUTES, "tread_selector": "motion"},
    "salience": {"tread_config": ROUTES, "tread_selector": "salience"},
}
EARLY = 10
"""Steps whose mean training loss is the one right after the start."""
TRAINED, HELD_OUT, SIZE, FRAMES = 24, 8, 64, 17
Curve = dict[int, dict[str, float]]
"""Step -> what its line of the log says."""


def seeds(diagonal: bool) -> Iterator[int]:
    """Seeds of scenes in which something moves diagonally, or nothing does."""
    for seed in count():
        if any(shape.direction == "diagonally" for shape in scene(seed).shapes) is diagonal:
            yield seed


def render(folder: Path, diagonal: bool) -> None:
    """Clips to train on and clips to hold out."""
    scenes = seeds(diagonal)
    for part, number in (("trained", TRAINED), ("held out", HELD_OUT)):
        for index in range(number):
            path = folder / part / f"clip {index:02d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            caption = render_clip(path, width=SIZE, height=SIZE, frames=FRAMES, fps=16, seed=next(scenes))
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def train(output: Path, model: Path, clips: Path, **keys: Any) -> Curve:
    """Run a config to its end; the log's lines by step."""
    kinds = {"trained": "video", "held out": "eval"}
    datasets = [
        {
            "id": name.replace(" ", "_"),
            "dataset_type": kind,
            "instance_data_dir": str(clips / name),
            "resolution": SIZE,
            "video": {"num_frames": FRAMES},
        }
        for name, kind in kinds.items()
    ]
    settings = {
        "model_family": "toy",
        "pretrained_model_name_or_path": str(model),
        "output_dir": str(output),
        "cache_dir": str(clips / "cache"),
        "train_batch_size": 4,
        "mixed_precision": "no",
        "lr_scheduler": "constant",
        "caption_dropout_probability": 0.0,
        "flow_schedule_shift": 3.0,
        "data_backend_config": [*datasets, {"id": "text", "dataset_type": "text_embeds", "default": True}],
        **keys,
    }
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        pipeline.run(assemble(settings))
    lines = [json.loads(line) for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines}


def trained_model(toy: Path, output: Path, steps: int) -> Path:
    """The model ``toy`` with the denoiser that a run of ``model_type: full`` came to."""
    folder = output / "model"
    shutil.copytree(toy, folder)
    shutil.copyfile(
        output / f"checkpoint-{steps}" / "transformer" / WEIGHTS, folder / "transformer" / "model.safetensors"
    )
    return folder


def both_parts(home: Path, seed: int, steps: Sequence[int]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """The curves of every way, from random weights and of a LoRA, with one seed."""
    root = home / str(seed)
    toy = build_toy(root / "toy", seed=seed, blocks=6)
    first, second = ({"seed": seed, "max_train_steps": length, "eval_steps_interval": length // 5} for length in steps)
    scratch = {
        name: train(
            root / "scratch" / name, toy, home / "straight", model_type="full", learning_rate=3e-3, **first, **way
        )
        for name, way in WAYS.items()
    }
    base = trained_model(toy, root / "scratch" / "unrouted", steps[0])
    lora = {
        name: train(root / "lora" / name, base, home / "diagonal", lora_rank=8, learning_rate=3e-3, **second, **way)
        for name, way in WAYS.items()
    }
    return scratch, lora


def early(curve: Curve) -> float:
    """Mean training loss of the first steps, routed as they are."""
    return statistics.fmean(curve[step]["loss"] for step in range(1, EARLY + 1))


def held_out(curve: Curve, step: int) -> float:
    """The loss of held-out clips after a step, without routes."""
    return curve[step]["evaluation/loss"]


def table(title: str, runs: Sequence[dict[str, Curve]], steps: int) -> Table:
    """Means over the seeds; beside those of routed runs the difference to unrouted, pair by pair."""
    first = steps // 5
    measures = {
        f"training, steps 1 to {EARLY}": early,
        f"held out, step {first}": lambda curve: held_out(curve, first),
        f"held out, step {steps}": lambda curve: held_out(curve, steps),
    }
    grid = Table(title=title)
    for name in ("", *measures):
        grid.add_column(name)
    for way in WAYS:
        cells = []
        for measure in measures.values():
            values = [measure(run[way]) for run in runs]
            cell = f"{statistics.fmean(values):.4f}"
            if way != "unrouted":
                differences = [value - measure(run["unrouted"]) for value, run in zip(values, runs, strict=True)]
                cell += f" ({statistics.fmean(differences):+.4f} ± {statistics.stdev(differences):.4f})"
            cells.append(cell)
        grid.add_row(way, *cells)
    return grid


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each way, at least 2")
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 150), help="optimizer steps of the two parts")
    options = parser.parse_args()
    logging.getLogger("tuner").setLevel(logging.ERROR)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        render(home / "straight", diagonal=False)
        render(home / "diagonal", diagonal=True)
        with importable(toy_distribution(home / "site")):
            runs = [both_parts(home, seed, options.steps) for seed in range(options.seeds)]
    console = Console(width=160)
    for index, title in enumerate(("From random weights, all weights trained", "A LoRA on the trained model")):
        console.print(table(title, [run[index] for run in runs], options.steps[index]))
    console.print(
        f"mean of {options.seeds} seeds (difference to unrouted of the same seed: mean ± standard deviation), "
        f"{torch.get_num_threads()} threads, {time.perf_counter() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
