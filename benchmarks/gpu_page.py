"""A page of figures: what was measured, when, on what, by which command.

    python benchmarks/gpu_page.py docs/benchmarks/gpu-tread.md "TREAD on a GPU" -- python benchmarks/tread.py --full

runs the command, shows what it prints, and keeps it on the page, up to the last line before whatever ends it.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tuner.files import atomic_write_text

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
NONE = "no GPU"


def device() -> str:
    """Name, memory and driver of the cards; the machine's processor where there are none.

    Asked of the driver's own tool: asking CUDA would take memory on the card that is measured.
    """
    try:
        lines = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return f"{NONE}, {platform.machine()}"
    return "; ".join(line for line in lines if line)


def header(title: str, command: Sequence[str]) -> str:
    """The page's first lines."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"# {title}\n\n{when}, {device()}, torch {version('torch')}.\n\n`{shlex.join(command)}`\n"


def write(page: Path, text: str) -> None:
    """Put ``text`` in the place of what the page said before: figures of an earlier run are in the history."""
    page.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(page, text)


def record(page: Path, title: str, command: Sequence[str]) -> int:
    """Run ``command``, print and keep its output. Returns its exit status."""
    top, printed = header(title, command), ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        printed += line
        write(page, f"{top}\n```text\n{printed}```\n")
    status = process.wait()
    write(page, f"{top}\nExit status {status}.\n\n```text\n{printed}```\n")
    return status


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("title")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args()
    if device().startswith(NONE):
        parser.error("there is no GPU here (nvidia-smi finds none)")
    sys.exit(record(options.page, options.title, options.command))


if __name__ == "__main__":
    main()
