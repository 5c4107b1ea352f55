"""What the cache costs: packing entries with zstd, and looking them up at a start.

    python benchmarks/data_cache.py --frames 81 --width 832 --height 480 --entries 500

Latents are those of a rendered clip by a tiny Wan VAE of random weights, and standard normal numbers, which is what
the latents of a trained VAE look like to a compressor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import safetensors.torch
import torch
import zstandard
from rich.console import Console
from rich.table import Table

from tuner.builtin.encoding.store import Store, make_key
from tuner.builtin.encoding.writing import Writer
from tuner.testing.clips import render_clip

LEVELS = (1, 3, 9)


@dataclass(frozen=True)
class Packed:
    """How one level does on one kind of entry."""

    ratio: float
    """packed bytes by plain bytes"""
    pack: float
    """plain MB/s"""
    unpack: float
    """plain MB/s"""


def seconds(work: Callable[[], object], least: float = 0.3) -> float:
    """The shortest time of one call, over at least three calls and ``least`` seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def measure(data: bytes, level: int) -> Packed:
    """Pack and unpack ``data``."""
    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    packed = packer.compress(data)
    megabytes = len(data) / 1e6
    pack = seconds(lambda: packer.compress(data))
    return Packed(len(packed) / len(data), megabytes / pack, megabytes / seconds(lambda: unpacker.decompress(packed)))


def vae_latents(folder: Path, frames: int, height: int, width: int) -> torch.Tensor:
    """Latents (16, F', h, w) float32 of a rendered clip, as the wan plugin stores them."""
    from diffusers import AutoencoderKLWan

    from tuner_wan.encode import encode_clip
    from tuner_wan.tiny import build_tiny_t2v

    clip = folder / "clip.mp4"
    render_clip(clip, width=width, height=height, frames=frames, fps=16, seed=1)
    with av.open(clip) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pixels = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1
    vae = AutoencoderKLWan.from_pretrained(build_tiny_t2v(folder / "tiny"), subfolder="vae").eval()
    with torch.no_grad():
        return encode_clip(vae, pixels)


def compression(folder: Path, frames: int, height: int, width: int) -> Table:
    """Ratio and speed for each kind of content."""
    latents = vae_latents(folder, frames, height, width)
    normal = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    kinds = {
        "tiny VAE, float32": latents,
        "tiny VAE, bfloat16": latents.bfloat16(),
        "normal, float32": normal,
        "normal, bfloat16": normal.bfloat16(),
    }
    table = Table("content", "MB", "level", "packed / plain", "packing MB/s", "unpacking MB/s", title="zstd")
    for name, tensor in kinds.items():
        data = safetensors.torch.save({"latents": tensor})
        for level in LEVELS:
            found = measure(data, level)
            speeds = f"{found.pack:.0f}", f"{found.unpack:.0f}"
            table.add_row(name, f"{len(data) / 1e6:.1f}", str(level), f"{found.ratio:.3f}", *speeds)
    return table


def starts(folder: Path, entries: int, numbers: int) -> Table:
    """Writing ``entries`` of so many float32 numbers, then finding them whole by reading and by looking up."""
    store, keys = Store(folder / "store"), [make_key(index) for index in range(entries)]
    tensor = torch.randn(numbers)
    table = Table("work", "seconds", "entries/s", title=f"{entries} entries of {tensor.nbytes / 1e6:.1f} MB")

    def add(name: str, took: float) -> None:
        table.add_row(name, f"{took:.2f}", f"{entries / took:.0f}")

    began = time.perf_counter()
    with Writer(128) as writer:
        for key in keys:
            writer.write(store, key, {"latents": tensor}, {})
    add("written, each flushed to the disk", time.perf_counter() - began)
    read = seconds(lambda: store.lacking(keys, reread=True), 0)
    looked_up = seconds(lambda: store.lacking(keys), 0)
    add("checked by reading (tuner cache --verify)", read)
    add("checked by size, time and inode (a usual start)", looked_up)
    table.caption = f"looking up is {read / looked_up:.0f} times as fast"
    return table


def main(arguments: list[str] | None = None) -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("frames", 81), ("width", 832), ("height", 480), ("entries", 500), ("numbers", 250_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print(compression(Path(folder), options.frames, options.height, options.width))
        console.print(starts(Path(folder), options.entries, options.numbers))


if __name__ == "__main__":
    main()
