"""A plan as a line of the log, as tables, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.builtin.planner.cards import Card
from tuner.builtin.planner.costs import Cost, mean
from tuner.builtin.planner.memory import Memory
from tuner.builtin.planner.memory_phases import Phase
from tuner.builtin.planner.wording import figures, seconds, tera
from tuner.spec import ModelSpec, NetworkSpec

if TYPE_CHECKING:
    from rich.table import Table

HOUR = 3600
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a run will cost."""

    spec: ModelSpec
    card: Card | None
    costs: dict[str, list[Cost]]
    """name of a network -> its steps, by shape"""
    phases: Sequence[Phase]
    """what the run holds, each at its worst"""
    trained_shape: tuple[int, int, int] | None
    """(frames, height, width) of most clips"""
    steps: int | None = None
    """optimizer steps of the run, where the data are known"""

    @property
    def hours(self) -> float | None:
        """Of training alone, at least; None where steps or rates are not known. Networks take equal turns."""
        means = [mean(costs).seconds for costs in self.costs.values()]
        if self.steps is None or self.card is None:
            return None
        return self.steps * sum(each for each in means if each is not None) / len(means) / HOUR


def summary(costs: Sequence[Cost], card: Card | None) -> str:
    """One line: tokens, work, time, and what token routes bring."""
    average, tokens = mean(costs), sorted(cost.workload.tokens for cost in costs)
    if len(costs) == 1:
        clips = f"clips of {costs[0].shape.bucket} ({tokens[0]} tokens each)"
    else:
        clips = f"clips of {len(costs)} shapes with {tokens[0]} to {tokens[-1]} tokens, on average"
    line = f"a step computes {tera(average.flops)} on {clips}"
    if card is not None and average.seconds is not None:
        line += f"; expected on {card.name}: {seconds(average.seconds)} at least"
    if any(any(cost.workload.dropped) for cost in costs):
        line += f"; its token routes make it {average.speed_up:.2f} times as fast"
    return line


def tables(plan: Plan) -> Iterator[Table | str]:
    """What ``tuner plan`` prints, for rich."""
    for name, costs in plan.costs.items():
        yield _speed(plan, plan.spec.network(name), costs)
        if len(costs) > 1:
            yield _average(costs)
        worst = max(costs, key=lambda cost: cost.memory.on_device)
        yield _memory(f"training on clips of {worst.shape.bucket}", worst.memory)
    yield from (_memory(str(phase), phase.memory) for phase in plan.phases if phase.name != "training")
    yield from _peak(plan)
    if plan.hours is not None:
        yield f"{plan.steps} steps: {figures(plan.hours)} h of training at least"
    if plan.card is None:
        yield "For times name a card: --card H100"
    else:
        yield f"Rates of {plan.card.name}: {plan.card.source}"


def _speed(plan: Plan, network: NetworkSpec, costs: Sequence[Cost]) -> Table:
    from rich.table import Table

    label = f", {network.label or network.name}" if len(plan.costs) > 1 else ""
    where = f" on {plan.card.name}" if plan.card else ""
    title = f"{plan.spec.family} {plan.spec.flavour}{label}: one optimizer step{where}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    routed = any(any(cost.workload.dropped) for cost in costs)
    for heading in _headings(plan.card, routed):
        table.add_column(heading, justify="left" if heading == "clips of" else "right", no_wrap=True)
    for cost in costs:
        table.add_row(*_cells(cost, routed))
    return table


def _peak(plan: Plan) -> Iterator[str]:
    """Where the run as a whole holds most, and whether that fits the card."""
    device, host = peaks(plan.phases)
    line = f"Most of the run: {_gib(device.memory.on_device)} GiB on the device in {device}"
    yield line + (f", {_gib(host.memory.on_host)} GiB on the host in {host}" if host.memory.on_host else "")
    if plan.card is not None and device.memory.on_device > plan.card.memory * GIB:
        size = f"{plan.card.memory:g}"
        yield f"{plan.card.name} has {size} GiB. For what would fit: tuner plan --fit {size}G"


def peaks(phases: Sequence[Phase]) -> tuple[Phase, Phase]:
    """The phases that hold most on the device, and on the host."""
    return max(phases, key=lambda each: each.memory.on_device), max(phases, key=lambda each: each.memory.on_host)


def _memory(what: str, memory: Memory) -> Table:
    """What is held at most, by component."""
    from rich.table import Table

    device, host = memory.device, memory.host
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(f"GiB at most, {what}")
    for place in ("device", "host"):
        table.add_column(place, justify="right")
    for component in dict.fromkeys([*device, *host]):
        table.add_row(component, *(_gib(held.get(component, 0.0)) for held in (device, host)))
    table.add_row("in all", _gib(memory.on_device), _gib(memory.on_host))
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else ""


def _headings(card: Card | None, routed: bool) -> list[str]:
    headings = ["clips of", "share", "clips", "tokens", "TFLOP", "attention"]
    headings += ["seconds"] if card else []
    return headings + (["routes"] if routed else [])


def _cells(cost: Cost, routed: bool) -> list[str]:
    workload = cost.workload
    cells = [
        str(cost.shape.bucket),
        f"{cost.shape.share:.0%}",
        str(workload.samples * workload.micro_batches),
        str(workload.tokens),
        figures(cost.flops.hardware / 1e12),
        f"{cost.flops.self_attention_share:.0%}",
    ]
    cells += [] if cost.seconds is None else [figures(cost.seconds)]
    return cells + ([f"{cost.speed_up:.2f} x"] if routed else [])


def _average(costs: Sequence[Cost]) -> str:
    average = mean(costs)
    time = "" if average.seconds is None else f", {seconds(average.seconds)}"
    gain = f", {average.speed_up:.2f} times as fast by routes" if average.speed_up > 1 else ""
    return f"On average {tera(average.flops)} a step{time}{gain}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The same for programs. FLOP, seconds and tokens are plain numbers; ``null`` is not known."""
    device, host = peaks(plan.phases)
    return {
        "model": {"family": plan.spec.family, "flavour": plan.spec.flavour},
        "card": None if plan.card is None else plan.card.name,
        "steps": plan.steps,
        "hours": plan.hours,
        "phases": [
            {"name": each.name, "what": each.what, "device": each.memory.device, "host": each.memory.host}
            for each in plan.phases
        ],
        "peak": {
            "device": {"phase": str(device), "bytes": device.memory.on_device},
            "host": {"phase": str(host), "bytes": host.memory.on_host},
        },
        "networks": {
            name: {
                "shapes": [_record(cost) for cost in costs],
                "mean": {**vars(mean(costs))},
            }
            for name, costs in plan.costs.items()
        },
    }


def _record(cost: Cost) -> dict[str, Any]:
    workload, bucket, flops = cost.workload, cost.shape.bucket, cost.flops
    return {
        "width": bucket.width,
        "height": bucket.height,
        "frames": bucket.frames,
        "share": cost.shape.share,
        "clips": workload.samples * workload.micro_batches,
        "tokens": workload.tokens,
        "flops": flops.hardware,
        "model_flops": flops.model,
        "linear_flops": flops.linear,
        "attention_flops": flops.attention_forward + flops.backward.attention,
        "self_attention_share": flops.self_attention_share,
        "seconds": cost.seconds,
        "speed_up": cost.speed_up,
        "memory": {"device": cost.memory.device, "host": cost.memory.host},
    }
