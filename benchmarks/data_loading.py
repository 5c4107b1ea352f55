"""How many batches a second the loader reads from the cache, beside reading the same files and nothing else.

    python benchmarks/data_loading.py --frames 81 --width 832 --height 480 --samples 32 --batch-size 1

A training step takes a second or more on these sizes: what counts is that a batch is ready long before it is asked
for. The ratio is to reading the very same bytes from the very same files, one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tuner.builtin.datasets.decode import decode_file
from tuner.builtin.encoding.encodings import Encodings
from tuner.builtin.encoding.store import Store, make_key
from tuner.builtin.epochs.plan import Plan
from tuner.data.loader import Loader
from tuner.data.report import DataReport
from tuner.data.samples import Bucket, Framing, Prepared, Sample, View

CAPTION = "a caption"
TEXT = (120, 4096)
"""Tokens of a caption and their width, as UMT5-XXL gives them."""


def fill(root: Path, samples: int, bucket: Bucket) -> Encodings:
    """A cache of ``samples`` random encodings of Wan 2.1's size, as training reads it."""
    views = (View(Framing(bucket.width, bucket.height, 0, 0)),)
    size = (bucket.width, bucket.height, bucket.frames, 16.0, bucket)
    made = tuple(
        Sample(f"{index:04d}", "d", Path("x"), "0", (CAPTION,), *size, views, root / "vae") for index in range(samples)
    )
    shape = (16, (bucket.frames - 1) // 4 + 1, bucket.height // 8, bucket.width // 8)
    keys = {(sample.sample_id, 0): make_key(sample.sample_id) for sample in made}
    for key in keys.values():
        Store(root / "vae").write(key, {"latents": torch.randn(shape)}, {})
    text = {CAPTION: make_key("text")}
    Store(root / "text").write(text[CAPTION], {"states": torch.randn(TEXT, dtype=torch.bfloat16)}, {})
    prepared = Prepared(made, {}, root / "text", DataReport(()), decode_file)
    return Encodings(prepared, 0, 0, text, keys)


def measure(cached: Encodings, batch_size: int, steps: int) -> tuple[float, float]:
    """(batches a second through the loader, batches a second of reading the files alone)."""
    plan = Plan(cached.samples, seed=0, batch_size=batch_size)
    loader = Loader(cached, plan, seed=0)
    try:
        loader.read_ahead(0, 0)
        began = time.perf_counter()
        for step in range(1, steps + 1):
            loader.load(step, 0)
            loader.read_ahead(step, 0)
        loaded = steps / (time.perf_counter() - began)
    finally:
        loader.close()
    began = time.perf_counter()
    for step in range(1, steps + 1):
        for sample in plan.micro_batches(step)[0].samples:
            Store(sample.cache).path(cached.video_keys[sample.sample_id, 0]).read_bytes()
            Store(cached.prepared.text_cache).path(cached.text_keys[CAPTION]).read_bytes()
    return loaded, steps / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row."""
    parser = argparse.ArgumentParser(description="Batches a second from the cache.")
    for name, default in (("frames", 81), ("width", 832), ("height", 480), ("samples", 32), ("batch-size", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args(arguments)
    bucket = Bucket(options.frames, options.height, options.width)
    with tempfile.TemporaryDirectory() as folder:
        loaded, read = measure(fill(Path(folder), options.samples, bucket), options.batch_size, options.steps)
    table = Table(title=f"{bucket}, batches of {options.batch_size}", title_justify="left")
    for head in ("batches/s", "reading the files alone", "ratio"):
        table.add_column(head, justify="right")
    table.add_row(f"{loaded:.1f}", f"{read:.1f}", f"{loaded / read:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
