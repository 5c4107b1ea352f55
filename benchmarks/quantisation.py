"""What a quantised network takes: bytes against those of its precision, and the peak of the host while it is read.

    python benchmarks/quantisation.py --layers 6 --page docs/benchmarks/quantisation.md

The network has the width of Wan 2.1 1.3B, fewer blocks, and random weights stored in bfloat16. Each precision is
loaded in a process of its own. The peak is that of memory that no file backs, beside what the process had before.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WIDTH = {"heads": 12, "head_dim": 128, "ffn_dim": 8960}
PLAIN = "no_change"
MIB = 2**20


def main() -> None:
    """Measure every precision that runs here, and print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="blocks of the network")
    parser.add_argument("--page", type=Path, help="write the page here")
    parser.add_argument("--one", nargs=2, metavar=("PRECISION", "MODEL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*chosen.one)))
        return
    from tuner_quantization import BitsandbytesPlugin, Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin

    plugins = (Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin, BitsandbytesPlugin)
    here = sorted(value for each in plugins for value, about in each.precisions.items() if not about.cuda)
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder) / "model", chosen.layers)
        rows = [in_a_process(precision, model) for precision in (PLAIN, *here)]
    page = written(rows, chosen.layers)
    if chosen.page is None:
        print(page)
    else:
        chosen.page.write_text(page, encoding="utf-8")


def build(path: Path, layers: int) -> Path:
    """A model of the width, its denoiser's weights in bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file

    from tuner_wan.tiny import build_tiny_t2v

    build_tiny_t2v(path, layers=layers, **WIDTH)
    for file in (path / "transformer").glob("*.safetensors"):
        save_file({name: each.to(torch.bfloat16) for name, each in load_file(file).items()}, file, {"format": "pt"})
    return path


def in_a_process(precision: str, model: Path) -> dict[str, Any]:
    """What :func:`measure` gives in a fresh process."""
    command = [sys.executable, __file__, "--one", precision, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(precision: str, model: str) -> dict[str, Any]:
    """Load the network in ``precision``; bytes of its matrices, of all of it, of their theory, and the peak."""
    import torch

    from tuner.config.keys import CoreConfig
    from tuner.materialise import materialise
    from tuner.run import Run
    from tuner_quantization import BitsandbytesPlugin, Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin
    from tuner_quantization.layers import stored_bytes
    from tuner_wan import WanPlugin

    run = Run(CoreConfig(pretrained_model_name_or_path=model), plugins={})
    wan = WanPlugin("wan", WanPlugin.Config())
    run.spec = wan.describe_model(run)
    run.place(torch.device("cpu"), torch.bfloat16)
    network = wan.load_model(run).network
    plugins = (Fp8ScaledPlugin, QuantoPlugin, TorchaoPlugin, BitsandbytesPlugin)
    owner = next((each for each in plugins if precision in each.precisions), None)
    sink = None if owner is None else owner(precision, owner.Config()).quantizers(run)[precision](network)
    warm = torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    del warm
    gc.collect()
    with Peak() as peak:
        materialise(network, device=run.device, sinks=[sink] if sink else [])
    whole = sum(stored_bytes(each) for each in network.module.parameters())
    read = sum(each.numel() for each in network.module.parameters()) * 2 if sink is None else sink.bytes_read
    return {
        "precision": precision,
        "whole": whole,
        "matrices": None if sink is None else sink.bytes_stored,
        "theory": None if owner is None else owner.precisions[precision].bytes * read / 2,
        "peak": peak.bytes,
    }


class Peak:
    """While entered, watches the memory of this process that no file backs."""

    def __enter__(self) -> Peak:
        self._before, self._most, self._over = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """The most, beside what there was before."""
        return self._most - self._before

    def _watch(self) -> None:
        while not self._over.is_set():
            self._most = max(self._most, anonymous())
            time.sleep(0.002)
        self._most = max(self._most, anonymous())


def anonymous() -> int:
    """Bytes of this process's memory that no file backs (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def written(rows: list[dict[str, Any]], layers: int) -> str:
    """The page."""
    import torch

    plain = rows[0]
    lines = [
        "# Quantisation: bytes, and the peak while loading",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} on the CPU ({platform.machine()}, torch {torch.__version__}), with",
        "",
        f"    python benchmarks/quantisation.py --layers {layers} --page docs/benchmarks/quantisation.md",
        "",
        f"A network of the width of Wan 2.1 1.3B with {layers} blocks, random weights, read from bfloat16. *Matrices*",
        "are the layers that are quantised; their bytes are held against those of the precision (weights and scales).",
        "*Peak* is the most host memory while the network was read, beside what the process had before; it is held",
        "against the network as it is in the end. The full network is never there: one tensor is, while it is read.",
        "",
        "| precision | network | of bf16 | matrices | of their theory | peak while loading | of the network |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theory = "" if row["theory"] is None else f"{row['matrices'] / row['theory']:.3f}"
        matrices = "" if row["matrices"] is None else f"{row['matrices'] / MIB:.0f} MiB"
        lines.append(
            f"| `{row['precision']}` | {row['whole'] / MIB:.0f} MiB | {row['whole'] / plain['whole']:.2f} | {matrices} "
            f"| {theory} | {row['peak'] / MIB:.0f} MiB | {row['peak'] / row['whole']:.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
