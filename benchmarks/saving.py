"""How long a checkpoint keeps training waiting, and what it costs in all.

    python benchmarks/saving.py --page docs/benchmarks/saving.md

The state is that of a LoRA of rank 16 on Wan 2.1 1.3B: 11.8 million parameters with AdamW's averages, 142 MB. Training
goes on while a checkpoint is written, so two things are measured: the time for which the loop waits, both where it
begins a checkpoint and where its optimizer waits for the copies, and how much longer steps take while one is written.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RANK = 2480
"""On the tiny model as many parameters as rank 16 has on 1.3B."""
INTERVAL = 500
"""Steps between checkpoints by default."""
STEP_SECONDS = 0.5
"""Of a short step: on an H100 one of 1.3B at 18 900 tokens takes nearly twice as long."""


def main() -> None:
    """Measure, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--page", type=Path, help="write the page here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), chosen.saves)
    page = written(figures)
    if chosen.page is None:
        print(page)
    else:
        chosen.page.write_text(page, encoding="utf-8")


def measure(folder: Path, saves: int) -> dict[str, Any]:
    """Waiting, whole and step times of ``saves`` checkpoints, in seconds."""
    from safetensors.torch import save_file

    from tuner.testing.opened import opened
    from tuner.train.saving import Saving
    from tuner.train.step import train_step

    with opened(config(folder)) as session:
        train_step(session)  # the optimizer's averages are there from now on
        contents = session.contents()
        size = sum(each.nbytes for each in contents.values())
        raw = {name: tensor for each in contents.values() for name, tensor in each.tensors.items()}
        saving = Saving(session)
        session.copied = copied = Watched()
        copied.set()
        waits, whole, plain, calm, busy = [], [], [], [], []
        for number in range(saves):
            session.run.step = number + 1
            calm.append(timed(lambda: train_step(session)))
            began = time.perf_counter()
            waits.append(timed(saving.start))
            copied.seconds = 0.0
            busy.append(timed(lambda: train_step(session)))
            waits[-1] += copied.seconds
            saving.finish()
            whole.append(time.perf_counter() - began)
            plain.append(timed(lambda number=number: save_file(raw, folder / f"plain-{number}.safetensors")))
    return {"bytes": size, "waits": waits, "whole": whole, "plain": plain, "calm": calm, "busy": busy}


class Watched(threading.Event):
    """An event that counts the seconds for which somebody waited for it."""

    seconds = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """As ever."""
        began = time.perf_counter()
        found = super().wait(timeout)
        self.seconds += time.perf_counter() - began
        return found


def timed(action: Callable[[], Any]) -> float:
    """Seconds that ``action`` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def config(folder: Path) -> dict[str, Any]:
    """A config over a tiny Wan with a LoRA as large as that of 1.3B."""
    from tuner.testing.clips import render_clip
    from tuner.testing.project import flat_config
    from tuner_wan.tiny import build_tiny_t2v

    build_tiny_t2v(folder / "model", layers=3, heads=2, head_dim=50)
    render_clip(folder / "clips" / "clip.mp4", width=64, height=64, frames=9, fps=16, seed=1)
    return flat_config(folder, family="wan", max_train_steps=1000, lora_rank=RANK, checkpoints_total_limit=2)


def written(figures: dict[str, Any]) -> str:
    """The page."""

    def middle(name: str) -> float:
        return statistics.median(figures[name])

    slower = max(
        0.0, statistics.median(one - other for one, other in zip(figures["busy"], figures["calm"], strict=True))
    )
    lost = (middle("waits") + slower) / (INTERVAL * STEP_SECONDS)
    rows = [
        ("the loop waits (goal 20)", middle("waits")),
        ("the step that runs meanwhile", middle("busy")),
        ("it takes longer than the one before by", slower),
        ("until it is whole and on the disk", middle("whole")),
        ("safetensors' `save_file` of the same tensors, not flushed", middle("plain")),
    ]
    return "\n".join(
        [
            "# Saving",
            "",
            f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores: `benchmarks/saving.py`, "
            f"{len(figures['waits'])} checkpoints of {figures['bytes'] / 1e6:.0f} MB, medians.",
            "",
            "| | milliseconds |",
            "|---|---|",
            *(f"| {what} | {1000 * seconds:.0f} |" for what, seconds in rows),
            "",
            f"At the default of a checkpoint every {INTERVAL} steps, and steps of {STEP_SECONDS} s, saving takes "
            f"{100 * lost:.3f} % of the run (goal 1 %).",
            "",
            "The loop takes what goes into files for other programs. All else is a thread's: copying what the "
            "optimizer changes, which is done before the step comes to it, hashing, writing and flushing. Here the "
            "thread shares the cores that compute the step; beside a GPU it does not.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
