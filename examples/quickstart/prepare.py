"""Makes what the quickstart trains on: a tiny Wan 2.1 T2V with 30 narrow blocks, and eight short captioned clips.

Everything goes to output/quickstart, wherever this is started from; what is there already is left alone.
"""

from __future__ import annotations

from pathlib import Path

from tuner.testing.clips import render_folder
from tuner_wan.tiny import build_tiny_t2v

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "output" / "quickstart"
BLOCKS = 30


def main() -> None:
    """Build the model and render the clips."""
    model = OUTPUT / "model"
    if not model.exists():
        print(f"building a tiny Wan 2.1 T2V with {BLOCKS} blocks ...", flush=True)
        build_tiny_t2v(model, layers=BLOCKS)
    clips = render_folder(OUTPUT / "clips")
    print(f"model: {model.relative_to(ROOT)}")
    print(f"clips: {clips[0].parent.relative_to(ROOT)} ({len(clips)})")


if __name__ == "__main__":
    main()
