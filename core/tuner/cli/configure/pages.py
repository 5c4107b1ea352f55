"""The pages of the menu: what is on each, and what each item is now."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.cli.configure import memory
from tuner.cli.configure.questions import BETWEEN, QUESTIONS
from tuner.config.describe import allowed

if TYPE_CHECKING:
    from rich.table import Table

    from tuner.cli.configure.draft import Draft
    from tuner.config.owners import KeyIndex
    from tuner.selection import Catalog

MEMORY = "Training → Memory Optimisation"
PAGES: dict[str, tuple[str, ...]] = {
    "Data": ("clips", "caption", "trigger", "frames", "caption_dropout_probability", "vae_batch_size"),
    "Model": ("model", "base", "model_type", "lora_type", "lora_rank", "mixed_precision", "attention_mechanism"),
    "Training": (
        "teach",
        "max_train_steps",
        "learning_rate",
        "optimizer",
        "lr_scheduler",
        "lr_warmup_steps",
        "gradient_accumulation_steps",
        "flow_schedule_shift",
        "seed",
    ),
    MEMORY: ("card",),
    "Validation": (
        "prompts",
        "validation_negative_prompt",
        "validation_step_interval",
        "validation_num_inference_steps",
        "validation_guidance",
        "validation_resolution",
        "validation_num_video_frames",
    ),
    "Output": (
        "output_dir",
        "checkpoint_step_interval",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
    ),
}
"""Answers, and config keys."""


@dataclass(frozen=True)
class Item:
    """A row of a page."""

    name: str
    now: str
    allowed: str
    about: str


def items(page: str, draft: Draft, index: KeyIndex, catalog: Catalog) -> list[Item]:
    """The rows of a page; on that of memory with what the planner says each would do."""
    names = list(PAGES[page])
    if page == MEMORY:
        names += memory.keys(catalog, draft.answers.family)
    effects = _effects(draft, index, catalog) if page == MEMORY else {}
    return [item for name in names if (item := _item(name, draft, index, effects.get(name, ""))) is not None]


def table(page: str, rows: list[Item]) -> Table:
    """A page for the terminal."""
    from rich.table import Table

    made = Table(title=page, title_justify="left")
    for column in ("", "item", "now", "allowed", "effect, by the planner" if page == MEMORY else "about"):
        made.add_column(column, overflow="fold")
    for number, row in enumerate(rows, 1):
        made.add_row(str(number), row.name, row.now, row.allowed, row.about)
    return made


def companions(key: str, value: Any, catalog: Catalog, family: str) -> dict[str, Any]:
    """The key, and what goes with it: levers are several keys at once."""
    for lever in memory.levers(catalog, family):
        if next(iter(lever)) == key and lever[key] == value:
            return dict(lever)
    return {key: value}


def _item(name: str, draft: Draft, index: KeyIndex, effect: str) -> Item | None:
    if name in QUESTIONS:
        value = getattr(draft.answers, name)
        now = BETWEEN.join(draft.prompts.values()) if name == "prompts" else str(value)
        return Item(name, now or "-", QUESTIONS[name].allowed, effect or QUESTIONS[name].text)
    place = index.find(name)
    if place is None:
        return None
    now = draft.whole.get(name, place.field.get_default(call_default_factory=True))
    about = draft.reasons.get(name) or (place.field.description or "").partition(". ")[0]
    return Item(name, json.dumps(now, default=str), allowed(place.field), effect or about)


def _effects(draft: Draft, index: KeyIndex, catalog: Catalog) -> dict[str, str]:
    """For each key that begins a lever, what each of its values would do."""
    assert draft.planned is not None
    found: dict[str, dict[str, str]] = {}
    for lever in memory.levers(catalog, draft.answers.family):
        lines, off = found.setdefault(next(iter(lever)), {}), _off(lever, index)
        on = all(draft.whole.get(key, off.get(key)) == value for key, value in lever.items())
        other = off if on else lever
        if other != lever or not on:
            lines.setdefault(memory.written(other), draft.planned.effect(other))
    told = {key: "\n".join(f"{value}: {effect}" for value, effect in lines.items()) for key, lines in found.items()}
    return told | {"card": draft.planned.line}


def _off(lever: Any, index: KeyIndex) -> dict[str, Any]:
    places = {key: index.find(key) for key in lever}
    return {key: place.field.get_default(call_default_factory=True) for key, place in places.items() if place}


def summary(draft: Draft) -> Iterator[str]:
    """What would be written, a line for each thing that matters."""
    whole = draft.whole
    networks = " and ".join(network.name for network in draft.spec.networks)
    yield f"model: {draft.spec.flavour} from {draft.spec.base} ({networks})"
    for entry in draft.entries:
        if entry.get("dataset_type", "video") in ("video", "image"):
            frames = entry.get("video", {})
            lengths = frames.get("frame_buckets") or [frames.get("num_frames", 1)]
            yield (
                f"data: {entry['id']}, {entry.get('instance_data_dir')}, at {entry.get('resolution')} "
                f"({entry.get('resolution_type')}), {', '.join(map(str, lengths))} frames"
            )
    yield f"steps: {whole.get('max_train_steps')}, a checkpoint every {whole.get('checkpoint_step_interval')}"
    yield "prompts: " + BETWEEN.join(draft.prompts.values())
    if (planned := draft.planned) is None:
        return
    yield f"memory: {planned.line}"
    for key, value in planned.chosen.items():
        yield f"  {key}: {json.dumps(value)} ({planned.why.get(key, 'chosen by the planner')})"
    if gone := sorted(draft.gone - whole.keys()):
        yield f"  taken out: {', '.join(gone)}"
    if planned.problem is not None:
        yield f"warning: {planned.problem.what}"
    hours = planned.hours(int(whole.get("max_train_steps") or 0), int(whole.get("train_batch_size", 1)))
    if hours is not None:
        length = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        yield f"time: at least {length} of training on it, validation not counted"
