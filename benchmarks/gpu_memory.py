"""Peak memory and seconds a step of Wan's real dimensions on a GPU, lever by lever, and on a card made small.

    python benchmarks/gpu_memory.py 1.3b --pages docs/benchmarks    one part, its figures on a page
    python benchmarks/gpu_memory.py --smoke                         the same code, a tiny network, any machine

Random weights, LoRA of rank 16, batch size 1, the project's own step (``gpu_run.py``). Each case has a process of its
own, so that none finds the memory of another. The first three steps are not timed; of the others the median counts.
Beside each peak is what ``tuner plan`` predicts.

A small card is this one with ``torch.cuda.set_per_process_memory_fraction``, which limits what torch's allocator may
take. The planner's allowance for CUDA's context is taken off the limit first: a small card has to hold that too.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gpu_page import NONE, device, header, write
from gpu_run import FEWEST, GIB, Case, Result, measure

SMALL, LARGE = "t2v-480p-1.3b-2.1", "t2v-480p-14b-2.1"
CLIP, SHORT, PICTURE = (81, 480, 832), (33, 480, 832), (1, 480, 832)
STREAMED = {"enable_group_offload": True, "group_offload_use_stream": True}
CHUNKED = {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 8}
OFFLOADED, EIGHT_BITS = {"gradient_checkpointing": "offload"}, {"base_model_precision": "int8-quanto"}
LEAN = {"wan_lean_blocks": True}
LEVERS: Mapping[str, Mapping[str, Any]] = {
    "none": {"gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": "selective"},
    "full": {"gradient_checkpointing": True},
    "offload": OFFLOADED,
    "streaming": {"gradient_checkpointing": True, **STREAMED},
    "streaming + chunked": {"gradient_checkpointing": True, **STREAMED, **CHUNKED},
    "all + int8": {**OFFLOADED, **LEAN, **STREAMED, **CHUNKED, **EIGHT_BITS},
}
PLAIN = "full"
"""What the others are held against: all weights on the device, every block checkpointed."""
ENOUGH_TOKENS = 13_000
"""From which on copies are to be hidden."""
MOST = {"offload": 1.02, "streaming": 1.03}
"""Times the plain step, from that many tokens on."""
MOST_LIMITED, PLANNED = 1.10, 0.10
"""Times the plain step on a small card; how far a peak may be from the predicted one."""
TINY = {"blocks": 4, "dim": 24, "heads": 2, "ffn_dim": 32, "text_dim": 16}


@dataclass(frozen=True)
class Part:
    """Cases of one model and shape that fit in nine minutes on an H100."""

    title: str
    flavour: str
    shape: tuple[int, int, int]
    levers: Sequence[str] = tuple(LEVERS)
    limit: float | None = None
    """GiB of the small card that the last lever is to fit too"""
    narrow: Mapping[str, Any] | None = None

    def cases(self) -> list[Case]:
        """In the order in which they are measured; the small card's before the same without limits."""
        plain = Case("", self.flavour, self.shape, narrow=self.narrow or {})
        found = [replace(plain, name=name, keys=LEVERS[name]) for name in self.levers]
        if self.limit is not None:
            last = found[-1]
            found.insert(-1, replace(last, name=f"{last.name}, within {self.limit:g} GiB", limit=self.limit))
        return found


RESIDENT = ("selective", "full", "offload")
STREAMING = ("full", "streaming", "streaming + chunked", "all + int8")
PARTS = {
    "1.3b": Part("Wan 1.3B, 832x480, 81 frames", SMALL, CLIP, limit=4),
    "1.3b-short": Part("Wan 1.3B, 832x480, 33 frames", SMALL, SHORT),
    "14b-resident": Part("Wan 14B, 832x480, 33 frames, weights on the device", LARGE, SHORT, ("none", *RESIDENT)),
    "14b-streamed": Part("Wan 14B, 832x480, 33 frames, weights streamed", LARGE, SHORT, STREAMING),
    "14b-small-card": Part("Wan 14B, 832x480, 81 frames, within 10 GiB", LARGE, CLIP, ("full", "all + int8"), 10),
    "image-small-card": Part("Wan 14B, one image, within 4 GiB", LARGE, PICTURE, ("full", "all + int8"), 4),
    "smoke": Part("A tiny Wan", SMALL, (5, 64, 64), limit=4, narrow=TINY),
}


def alone(case: Case, number: int, until: float) -> Result:
    """:func:`measure` in a process of its own. Whatever goes wrong there comes back as a note."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case, number, until).result()
        except Exception as error:  # of any kind: the other cases are to be measured all the same
            return Result(case, 0, 0.0, None, note=f"failed: {type(error).__name__}: {error}".replace("\n", " "))


def results(part: Part, number: int, until: float, *, isolated: bool) -> Iterator[Result]:
    """Each case as it is done. One is left out, and says so, where half the time of the longest is no longer left."""
    longest = 0.0
    for case in part.cases():
        began = time.time()
        if began + longest / 2 > until:
            yield Result(case, 0, 0.0, None, note="not run: no time was left")
            continue
        yield alone(case, number, until) if isolated else measure(case, number, until, warm_up=0)
        longest = max(longest, time.time() - began)


# What it comes to


def seconds(result: Result) -> float:
    """The median step."""
    return statistics.median(result.seconds)


def targets(done: Sequence[Result]) -> Iterator[tuple[str, float, float]]:
    """(what is asked for, what was measured, the most that is allowed), where it could be measured."""
    ran = {each.case.name: each for each in done if each.seconds}
    plain = ran.get(PLAIN)
    for name, each in ran.items():
        if plain is not None and name in MOST and each.tokens >= ENOUGH_TOKENS:
            yield f"{name}: time, of {PLAIN}", seconds(each) / seconds(plain), MOST[name]
        if each.allocated is None or each.reserved is None or each.context is None:
            continue
        if (limit := each.case.limit) is not None:
            yield f"{name}: GiB in all", (each.reserved + each.context) / GIB, limit
            if plain is not None:
                yield f"{name}: time, of {PLAIN} without limits", seconds(each) / seconds(plain), MOST_LIMITED
        yield f"{name}: peak, off the predicted one", abs(each.predicted / each.allocated - 1), PLANNED


def fastest(done: Sequence[Result]) -> str:
    """How each small card compares with the fastest case without limits."""
    free = [each for each in done if each.seconds and each.case.limit is None]
    small = [each for each in done if each.allocated is not None and each.seconds and each.case.limit is not None]
    best = min(free, key=seconds, default=None)
    return "".join(
        f"{each.case.name}: {seconds(each) / seconds(best):.3f} of the fastest without limits ({best.case.name}).\n\n"
        for each in small
        if best is not None
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


COLUMNS = (
    *("case", "s a step", "least, most", "steps", f"of {PLAIN}", "floor by plan, s"),
    *("peak, GiB", "predicted", "peak / predicted", "reserved, GiB", "context, GiB", "loading, s", ""),
)


def row(result: Result, plain: Result | None) -> list[str]:
    """The case's line. What was not measured is left empty."""
    return [
        result.case.name,
        *times(result.seconds, plain),
        f"{result.expected:.3f}" if result.expected else "",
        gibibytes(result.allocated),
        gibibytes(result.predicted),
        f"{result.allocated / result.predicted:.3f}" if result.allocated and result.seconds else "",
        gibibytes(result.reserved),
        gibibytes(result.context),
        f"{result.loading:.0f}" if result.seconds else "",
        result.note,
    ]


def times(taken: Sequence[float], plain: Result | None) -> list[str]:
    """Median, extremes and number of the steps, and the median of the plain case's."""
    if not taken:
        return [""] * 4
    step = statistics.median(taken)
    return [
        f"{step:.3f}",
        f"{min(taken):.3f}, {max(taken):.3f}",
        str(len(taken)),
        f"{step / seconds(plain):.3f}" if plain else "",
    ]


def gibibytes(size: float | None) -> str:
    """In GiB; nothing where it is not known."""
    return "" if not size else f"{size / GIB:.2f}"


def figures(done: Sequence[Result]) -> str:
    """All that was measured so far, and how it stands to what is asked for."""
    plain = next((each for each in done if each.case.name == PLAIN and each.seconds), None)
    tokens = max(each.tokens for each in done)
    text = f"{tokens} tokens, LoRA r16, batch size 1. Peaks without CUDA's context, which stands beside them.\n\n"
    if all(each.allocated is None for each in done):
        text += "No GPU: memory was neither limited nor counted.\n\n"
    text += table([COLUMNS, *(row(each, plain) for each in done)]) + "\n" + fastest(done)
    held = [
        (what, f"{value:.3f}", f"{most:.2f}", "held" if value <= most else "missed")
        for what, value, most in targets(done)
    ]
    return text + (table([("asked for", "measured", "at most", ""), *held]) if held else "")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, default="smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, all cases in this process")
    parser.add_argument("--pages", type=Path, help="folder for gpu-memory-PART.md, written after each case")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a case")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no case is begun or goes on")
    options = parser.parse_args()
    name = "smoke" if options.smoke else options.part
    part, isolated = PARTS[name], name != "smoke"
    if isolated and device().startswith(NONE):
        parser.error("there is no GPU here (nvidia-smi finds none): --smoke runs anywhere")
    logging.getLogger("tuner").setLevel(logging.ERROR)
    top = header(f"{part.title}: memory and time", ["python", *sys.argv])
    done: list[Result] = []
    number, until = options.steps if isolated else FEWEST, time.time() + options.budget
    for each in results(part, number, until, isolated=isolated):
        done.append(each)
        print(f"{each.case.name}: {each.note or f'{seconds(each):.3f} s a step'}", file=sys.stderr, flush=True)
        if options.pages is not None:
            write(options.pages / f"gpu-memory-{name}.md", f"{top}\n{figures(done)}")
    print(figures(done))
    sys.exit(any(each.note.startswith("failed") for each in done))


if __name__ == "__main__":
    main()
