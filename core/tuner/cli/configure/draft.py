"""From answers to the files: what is there already, what is proposed, what someone fixed, and whether it stands."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.configure import memory
from tuner.cli.configure.look import Look, look
from tuner.cli.configure.propose import (
    Answers,
    Proposal,
    cache_of,
    datasets,
    model_keys,
    prompts,
    training_keys,
)
from tuner.files import atomic_write_text

if TYPE_CHECKING:
    from tuner.builtin.planner.costs import Shape
    from tuner.cli.configure.files import Existing
    from tuner.run import Run
    from tuner.selection import Catalog
    from tuner.spec import ModelSpec

LISTED, LIBRARY = "data_backend_config", "user_prompt_library.json"
STEPS = ("max_train_steps", "lr_warmup_steps", "checkpoint_step_interval", "validation_step_interval")
AFTER = {
    "teach": ("lora_rank", "caption_dropout_probability", "flow_schedule_shift", *STEPS),
    "clips": ("output_dir", *STEPS),
    "model": ("model_family", "model_flavour", "pretrained_model_name_or_path", "validation_guidance"),
    "family": ("model_family", "model_flavour", "pretrained_model_name_or_path", "validation_guidance"),
    "base": ("pretrained_model_name_or_path",),
    "card": ("plan_card",),
}
"""Keys that are proposed anew when an answer is another one than the file's; all others stay as the file has them."""
FITTED = ("card", "model", "family")
"""Answers after which the planner's levers are chosen anew."""


@dataclass
class Draft:
    """What would be written."""

    answers: Answers
    found: Look
    spec: ModelSpec
    settings: dict[str, Any]
    why: dict[str, str]
    entries: list[dict[str, Any]]
    entry_why: list[dict[str, str]]
    prompts: dict[str, str]
    gone: frozenset[str] = frozenset()
    """keys of the file that are taken out: levers of another card"""
    planned: memory.Planned | None = None

    @property
    def whole(self) -> dict[str, Any]:
        """The flat config, the planner's levers among it."""
        return self.settings | dict(self.planned.chosen if self.planned else {})

    @property
    def reasons(self) -> dict[str, str]:
        """The reason for each proposed key."""
        return self.why | dict(self.planned.why if self.planned else {})


@dataclass
class Drafting:
    """What drafts are made from, besides answers; remembers what took time."""

    existing: Existing
    output: Path
    catalog: Catalog
    show_progress: bool = True
    _looks: dict[Path, Look] = field(default_factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    _plans: dict[str, memory.Planned] = field(default_factory=dict)

    def look(self, folder: Path) -> Look:
        """What is in a folder. Raises DataError."""
        if folder not in self._looks:
            self._looks[folder] = look(folder, cache_of(folder) / "video", show_progress=self.show_progress)
        return self._looks[folder]

    def draft(self, answers: Answers, fixed: Mapping[str, Any]) -> Draft:
        """The config for ``answers``, with the keys that someone ``fixed``; really assembled, its data surveyed.

        Raises what ``tuner check`` would raise of it.
        """
        found = self.look(answers.clips)
        changed = self.existing.differing(answers)
        model = {**self.existing.settings, **model_keys(answers).values, **fixed}
        spec = described(model, self.catalog)
        proposed = self._proposed(answers, found, spec, fixed.get(STEPS[0]))
        settings, why, gone = self._merged(proposed, changed, fixed, answers.family)
        listed = datasets(answers, found, spec)
        entries = self.existing.entries_with(listed, changed)
        made = Draft(
            answers,
            found,
            spec,
            settings,
            why,
            [values for values, _ in entries],
            [reasons for _, reasons in entries],
            self.existing.prompts_with(prompts(answers, found), changed),
            gone,
        )
        self._survey(made)
        return made

    def plan(self, draft: Draft) -> Draft:
        """The draft with the levers that the planner chooses for the card."""
        known = json.dumps([draft.settings, draft.entries, draft.answers.card], default=str)
        if known not in self._plans:
            run, shapes = self._survey(draft)
            self._plans[known] = memory.planned(run, shapes, memory.machine(draft.answers.card))
        return replace(draft, planned=self._plans[known])

    def _proposed(self, answers: Answers, found: Look, spec: ModelSpec, steps: int | None) -> Proposal:
        made = model_keys(answers)
        training = training_keys(answers, found, spec, self.output, steps)
        made.values |= training.values
        made.why |= training.why
        if card := memory.machine(answers.card).card:
            made.put("plan_card", card.name, "expected times are for it")
        return made

    def _merged(
        self, proposed: Proposal, changed: frozenset[str], fixed: Mapping[str, Any], family: str
    ) -> tuple[dict[str, Any], dict[str, str], frozenset[str]]:
        """Keys of the file, over those the proposals whose answer is another one now, over all what is fixed."""
        stale = {key for answer in changed for key in AFTER.get(answer, ())}
        gone: set[str] = set()
        if changed & set(FITTED):
            gone = {key for lever in memory.levers(self.catalog, family) for key in lever}
        gone |= stale - proposed.values.keys()
        kept = {key: value for key, value in self.existing.settings.items() if key not in gone}
        due = stale | {LISTED} if self.existing.ours else stale | proposed.values.keys() - kept.keys()
        new = {key: value for key, value in proposed.values.items() if key in due and (key in stale or key not in kept)}
        settings = {**kept, **new, **fixed}
        why = {key: proposed.why[key] for key in new} | dict.fromkeys(fixed, "chosen by you")
        order = [*proposed.values, *settings]
        dropped = frozenset(gone - settings.keys()) & self.existing.settings.keys()
        return {key: settings[key] for key in dict.fromkeys(order) if key in settings}, why, dropped

    def _survey(self, draft: Draft) -> tuple[Run, Sequence[Shape]]:
        """Assemble the draft and look at its data, without writing anything but the index of probed files."""
        from tuner import pipeline
        from tuner.assembly import assemble
        from tuner.builtin.planner.candidates import quiet
        from tuner.builtin.planner.costs import shapes_of

        folder = Path(self._scratch.name)
        library = folder / LIBRARY
        atomic_write_text(library, json.dumps(draft.prompts))
        paths: dict[str, Any] = {"output_dir": str(folder), LISTED: draft.entries}
        if draft.settings.get("user_prompt_library") == str(self.output / LIBRARY):
            paths["user_prompt_library"] = str(library)
        with quiet(), redirect_stdout(io.StringIO()):
            found = pipeline.survey(assemble({**draft.settings, **paths}, catalog=self.catalog))
        return found.run, shapes_of(found.plan, found.total)


def described(settings: Mapping[str, Any], catalog: Catalog) -> ModelSpec:
    """The facts of the model that a config names. Raises TunerError."""
    from tuner import pipeline
    from tuner.assembly import assemble, new_run
    from tuner.builtin.planner.candidates import quiet

    named = {key: value for key, value in settings.items() if key.startswith(("model_f", "pretrained_"))}
    with quiet():
        assembly = assemble(named, catalog=catalog)
        return pipeline.describe(new_run(assembly), assembly.manager)
