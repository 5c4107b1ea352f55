"""How fast clips are decoded, against PyAV alone: frames per second, and the ratio in the same run.

    python benchmarks/data_decode.py --width 1280 --height 720 --frames 81

*plain PyAV* decodes with frame threads and calls ``to_ndarray(format="rgb24")`` with PyAV's own interpolation
(bilinear); *with the same resizing* gives it what ``tuner`` resizes with. What is timed of ``tuner`` is all of
``decode_file``: float32 in [-1, 1], channels first. The ways take turns; the best of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
from rich.console import Console
from rich.table import Table

from tuner.builtin.datasets.decode import SWSCALE, decode_file
from tuner.data.samples import Bucket, Framing, View
from tuner.testing.clips import Encoding, render_clip

CLIP = Encoding("libx264", options={"crf": "20", "preset": "fast", "bf": "2", "g": "48"})
GOAL = 0.9


def seconds_of_each(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The shortest time of each way, over rounds in which each has its turn."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, taken in zip(ways, times, strict=True):
            began = time.perf_counter()
            way()
            taken.append(time.perf_counter() - began)
    return [min(taken) for taken in times]


def plain(path: Path, width: int, height: int, interpolation: int | None) -> None:
    """All frames as RGB by PyAV alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        pictures = [
            frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=interpolation)
            for frame in container.decode(stream)
        ]
    assert len(pictures)


def compare_sizes(path: Path, frames: int, sizes: Sequence[tuple[int, int]], rounds: int) -> Table:
    """A row for each size (width, height) that the clip is decoded to."""
    table = Table("decoded to", "plain PyAV", "with the same resizing", "tuner", "ratios", title="frames/s")
    for width, height in sizes:
        view, bucket = View(Framing(width, height, 0, 0)), Bucket(frames, height, width)
        bilinear, same, ours = seconds_of_each(
            [
                lambda w=width, h=height: plain(path, w, h, None),
                lambda w=width, h=height: plain(path, w, h, SWSCALE),
                lambda v=view, b=bucket: decode_file(path, v, b),
            ],
            rounds,
        )
        ratios = f"{bilinear / ours:.2f} and {same / ours:.2f}"
        table.add_row(f"{width}x{height}", *(f"{frames / each:.0f}" for each in (bilinear, same, ours)), ratios)
    return table


def compare_starts(path: Path, frames: int, width: int, height: int, rounds: int) -> Table:
    """The last eight frames of a clip, found by its keyframes or by decoding all before them."""
    table = Table("the last frames", "seconds", title="seeking")
    size, count = Framing(width, height, 0, 0), min(8, frames)
    ways: dict[str, Callable[[], object]] = {
        "as views ask for them": lambda: decode_file(path, View(size, frames - count), Bucket(count, height, width)),
        "the whole clip": lambda: decode_file(path, View(size), Bucket(frames, height, width)),
    }
    for name, taken in zip(ways, seconds_of_each(list(ways.values()), rounds), strict=True):
        table.add_row(name, f"{taken:.3f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        render_clip(path, width=given.width, height=given.height, frames=given.frames, fps=24, seed=1, encoding=CLIP)
        sizes = [(given.width * share // 24 * 2, given.height * share // 24 * 2) for share in (12, 8, 4)]
        console = Console()
        console.print(compare_sizes(path, given.frames, sizes, given.rounds))
        console.print(f"the goal is {GOAL} of PyAV at the same size, the second ratio")
        console.print(compare_starts(path, given.frames, *sizes[-1], given.rounds))


if __name__ == "__main__":
    main()
