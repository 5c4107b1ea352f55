"""Following a run: its story in memory, events to the diary, the page now and then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from tuner import __version__
from tuner.builtin.report import page
from tuner.builtin.report.diary import FOLDER, Diary, write_facts
from tuner.builtin.report.story import Story
from tuner.errors import Stopped
from tuner.train.checkpoint import without_secrets

if TYPE_CHECKING:
    from tuner.run import Run

EVERY = 15.0
"""Least seconds between two pages."""
SHARE = 0.01
"""Most of a run's time that writing pages may take: a slow disk or a long run is written more seldom."""


class Reporter:
    """What the plugin is while a run trains, on the main process."""

    def __init__(self, run: Run, resumed: Path | None) -> None:
        self._diary = Diary(run.output_dir)
        write_facts(run.output_dir, facts(run))
        # The log beyond the checkpoint is written anew: what is drawn of it would else stand twice.
        self._story = Story.read(run.output_dir, up_to=run.step)
        self._next = 0.0
        if resumed is None:
            self.event("start", f"step {run.step} of {run.total_steps}")
        else:
            self.event("resume", f"from {resumed.name}, step {run.step} of {run.total_steps}")
        for plugin in run.plugins.values():
            for line in plugin.warnings(run.config):
                self.warning(line)
        self._write()

    @property
    def path(self) -> Path:
        """The page."""
        return self._story.output_dir / FOLDER / page.NAME

    def line(self, line: Mapping[str, Any]) -> None:
        """Take a line of the log, and write the page if it is time."""
        self._story.curves.add(line)
        if monotonic() >= self._next:
            self._write()

    def event(self, kind: str, text: str, **more: Any) -> None:
        """Note that something happened."""
        self._story.tell(self._diary.write(kind, text, **more))

    def warning(self, text: str) -> None:
        """Note a warning, repeated ones once."""
        event = self._diary.warning(text)
        if event is not None:
            self._story.tell(event)

    def validation(self, run: Run, plugin: str, media: Sequence[Path]) -> None:
        """Note the files of a validation."""
        root = run.output_dir.resolve()
        inside = [path.resolve().relative_to(root) for path in media if path.resolve().is_relative_to(root)]
        weights = f", {run.variant} weights" if run.variant else ""
        text = f"{plugin} at step {run.step}{weights}: {len(inside)} files"
        self.event("validation", text, step=run.step, media=[path.as_posix() for path in inside])

    def sheet(self, step: int, path: Path) -> None:
        """Take the previews of a clip, and write the page if it is time."""
        self._story.media.add(step, [path])
        if monotonic() >= self._next:
            self._write()

    def end(self, run: Run, error: BaseException | None) -> None:
        """Note how the run ended and write the last page."""
        if error is None:
            self.event("end", f"step {run.step} of {run.total_steps}")
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self.event("stop", _first_line(error))
        else:
            self.event("error", _first_line(error))
        self._write()

    def _write(self) -> None:
        began = monotonic()
        page.write(self._story)
        now = monotonic()
        self._next = now + max(EVERY, (now - began) / SHARE)


def facts(run: Run) -> dict[str, Any]:
    """What the page says of the run as a whole; settings without secrets."""
    values = run.config.model_dump(mode="json")
    for plugin in run.plugins.values():
        values |= plugin.config.model_dump(mode="json")
    config = without_secrets(json.loads(json.dumps(values, default=str)))
    spec = run.spec
    return {
        "tuner": __version__,
        "model": {} if spec is None else {"family": spec.family, "flavour": spec.flavour, "base": spec.public_base},
        "total_steps": run.total_steps,
        "processes": run.process_count,
        "plugins": sorted(run.plugins),
        "set": sorted(run.explicit & config.keys()),
        "config": config,
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
