"""What ``tuner check`` ends with: what the run will do, and what it will need."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.assembly import Assembly
    from tuner.builtin.planner.costs import Cost
    from tuner.data.samples import Bucket, Sample
    from tuner.pipeline import Survey

GIB = 2**30
HOUR = 3600
FLOAT32 = 4


def show(assembly: Assembly, found: Survey) -> None:
    """Print the table, and a warning where the disk has too little room."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="What will happen", title_justify="left")
    for name, value in rows(assembly, found):
        table.add_row(name, value)
    Console().print(table)
    for line in short_of_disk(found):
        print(f"warning: {line}")


def rows(assembly: Assembly, found: Survey) -> Iterator[tuple[str, str]]:
    """(what, in words) of the run."""
    run, spec, samples = found.run, found.spec, found.prepared.samples
    yield "model", f"{spec.family} {spec.flavour} from {spec.base}"
    held = f"; {len(found.prepared.held_out)} held out" if found.prepared.held_out else ""
    yield "data", f"{len(samples)} samples{_shapes(Counter(sample.bucket for sample in samples))}{held}"
    per_step = " to ".join(map(str, sorted({*found.plan.samples_per_step})))
    yield "training", f"{found.total} steps of {per_step} samples: {found.plan.epochs_in(found.total):.1f} epochs"
    costs = costs_of(assembly, found)
    if costs:
        worst = max(costs, key=lambda cost: cost.memory.on_device)
        yield "memory", f"{worst.memory.on_device / GIB:.1f} GiB on the device while training ({worst.shape.bucket})"
        seconds = [cost.seconds * cost.shape.share for cost in costs if cost.seconds is not None]
        name = "time" if seconds else "work"
        tera = sum(cost.flops.hardware * cost.shape.share for cost in costs) / 1e12
        told = f"{sum(seconds) * found.total / HOUR:.2g} h of training at least; " if seconds else ""
        yield name, f"{told}{tera:.3g} TFLOP a step" + ("" if seconds else "; for times set plan_card")
    yield "cache", f"about {_size(cache_bytes(found))} in {_root(found)}, {_size(_free(_root(found)))} free"
    each, kept = checkpoint_bytes(costs), checkpoints_kept(found)
    if each:
        yield "checkpoints", f"{kept} of about {_size(each)} in {run.output_dir}, {_size(_free(run.output_dir))} free"
    interval = run.config.validation_step_interval
    if run.config.validation_prompt or getattr(run.config, "user_prompt_library", None):
        often = f"every {interval} steps, and at the end" if interval else "at the end"
        yield "validation", f"{often}: {found.total // interval if interval else 1} times"
    yield from _told(assembly)


def costs_of(assembly: Assembly, found: Survey) -> list[Cost]:
    """What a step costs, by shape of clip; empty without the planner."""
    from tuner.builtin.planner import PlannerPlugin
    from tuner.builtin.planner.costs import cost_of, shapes_of

    planner = assembly.plugins.get("planner")
    if not isinstance(planner, PlannerPlugin) or found.run.estimate is None:
        return []
    card, network = planner.card(), found.spec.networks[0]
    shapes = shapes_of(found.plan, found.total)
    return [cost_of(found.run.estimate, network, shape, card) for shape in shapes]


def cache_bytes(found: Survey) -> float:
    """Bytes of all encoded clips, every view of each, as the cache keeps them without compression."""
    width = FLOAT32 if found.run.config.mixed_precision == "no" else FLOAT32 / 2
    each = (prod(found.spec.latents.shape(*_shape(sample.bucket))) * len(sample.views) for sample in _all(found))
    return sum(each) * width


def checkpoint_bytes(costs: list[Cost]) -> float:
    """Bytes of one checkpoint: what is trained, its optimizer's state and average, and the file for other programs."""
    if not costs:
        return 0.0
    workload = costs[0].workload
    trained = workload.adapter_parameters
    if workload.trained == "network":
        matrices = sum(prod(shape) for shape in workload.network.weights.values())
        trained = matrices or 0
    return trained * (2 * FLOAT32 + workload.optimizer_bytes + workload.average_bytes + workload.average_bytes_on_host)


def checkpoints_kept(found: Survey) -> int:
    """How many checkpoints will lie in the output folder in the end."""
    config = found.run.config
    made = 1 + ((found.total - 1) // config.checkpoint_step_interval if config.checkpoint_step_interval else 0)
    return min(made, config.checkpoints_total_limit) if config.checkpoints_total_limit else made


def short_of_disk(found: Survey) -> Iterator[str]:
    """A line where a folder's disk has less free than the cache will take."""
    wanted, free = cache_bytes(found), _free(_root(found))
    if wanted > free:
        yield f"the cache will take about {_size(wanted)}, and {_root(found)} has {_size(free)} free: set cache_dir"


def _told(assembly: Assembly) -> Iterator[tuple[str, str]]:
    """Who outside this machine hears of the run."""
    config = {name: value for each in assembly.plugins.values() for name, value in each.config.model_dump().items()}
    if config.get("push_to_hub") or config.get("push_checkpoints_to_hub"):
        where = config.get("hub_model_id") or assembly.core.output_dir.resolve().name
        yield "uploads", f"to {where}, {'private' if config.get('hub_private') else 'PUBLIC'} where it is new"
    if str(config.get("report_to", "none")).lower() not in ("", "none"):
        yield "trackers", str(config["report_to"])


def _shapes(buckets: Counter[Bucket]) -> str:
    """Of which shapes the samples are."""
    if not buckets:
        return ""
    bucket, count = buckets.most_common(1)[0]
    return f" of {bucket}" if len(buckets) == 1 else f" of {len(buckets)} shapes, most of them ({count}) {bucket}"


def _all(found: Survey) -> Iterator[Sample]:
    yield from found.prepared.samples
    yield from found.prepared.held_out


def _shape(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.frames, bucket.height, bucket.width


def _root(found: Survey) -> Path:
    samples = found.prepared.samples
    return samples[0].cache if samples else found.run.output_dir


def _free(folder: Path) -> float:
    """Bytes free where ``folder`` is, or will be."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return float(shutil.disk_usage(there).free)


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
