"""What a webhook is told of a run: each happening is a message, put into its outbox."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.builtin.file_kinds import is_shown
from tuner.builtin.outbox import Outbox
from tuner.errors import Stopped
from tuner.train.checkpoint import without_secrets

if TYPE_CHECKING:
    from tuner.builtin.webhook.post import Webhook
    from tuner.run import Run
    from tuner.validate.results import Preview, Validation

PARTS = 10
"""Progress is told this many times in a run, the end apart."""


class Progress:
    """Which tenths of a run were told."""

    def __init__(self, step: int, total: int) -> None:
        """Begin at ``step`` of ``total``."""
        self._first, self._total, self._began = step, total, time.monotonic()
        self._told = step * PARTS // max(1, total)

    def passed(self, step: int) -> int | None:
        """Seconds left, where ``step`` begins another tenth and is not the last one."""
        part = step * PARTS // max(1, self._total)
        if part == self._told or step >= self._total:
            return None
        self._told = part
        each = (time.monotonic() - self._began) / max(1, step - self._first)
        return round(each * (self._total - step))


class WebhookReporter:
    """Posts to a webhook."""

    def __init__(self, run: Run, webhook: Webhook) -> None:
        """Post that the run begins."""
        self._webhook = webhook
        text = f"started, {run.total_steps} steps, in {run.output_dir}"
        facts = self._facts(run)
        self.outbox = Outbox("webhook_config", run.log, _nothing, _nothing)
        self._progress: Progress | None = None
        self.outbox.put(lambda: webhook.post("info", "start", text, facts))

    def resumed(self, run: Run, checkpoint: Path) -> None:
        """Where the run goes on from."""
        text, facts = f"goes on from {checkpoint.name}", {**self._facts(run), "checkpoint": str(checkpoint)}
        self.outbox.put(lambda: self._webhook.post("info", "resume", text, facts))

    def line(self, run: Run, line: Mapping[str, Any]) -> None:
        """The line, where ``log_level`` is ``debug``; at every tenth of the run how far it is."""
        text = f"step {line['step']}: loss {line['loss']:.4f}"
        self.outbox.put(lambda: self._webhook.post("debug", "log", text, dict(line)))
        self._progress = self._progress or Progress(int(line["step"]), run.total_steps)
        if (left := self._progress.passed(int(line["step"]))) is None:
            return
        told = f"{text}, {line['step']} of {run.total_steps} steps done, about {timedelta(seconds=left)} left"
        facts = {**self._facts(run), "loss": line["loss"], "seconds_left": left}
        self.outbox.put(lambda: self._webhook.post("info", "progress", told, facts))

    def validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Its pictures and videos, where it made any."""
        files = list(filter(is_shown, validation.media))
        of = f" of the {run.variant} weights" if run.variant else ""
        text = f"step {run.step}: validation{of} by {plugin}"
        facts = {**self._facts(run), "plugin": plugin, "weights": run.variant, "metrics": dict(validation.metrics)}
        if files:
            self.outbox.put(lambda: self._webhook.post("info", "validation", text, facts, files))

    def preview(self, run: Run, preview: Preview) -> None:
        """A clip while it is rendered."""
        text = f"step {run.step}: {preview.name} after {preview.step} of {preview.steps} sampling steps"
        facts = {**self._facts(run), "prompt": preview.prompt, "sampling_step": preview.step, "of": preview.steps}
        self.outbox.put(lambda: self._webhook.post("info", "preview", text, facts, [preview.path]))

    def checkpoint(self, run: Run, path: Path) -> None:
        """Its name."""
        text, facts = f"{path.name} is saved", {**self._facts(run), "checkpoint": str(path)}
        self.outbox.put(lambda: self._webhook.post("info", "checkpoint", text, facts))

    def end(self, run: Run, error: BaseException | None) -> None:
        """How the run ended, with the first line of an error."""
        facts = self._facts(run)
        if error is None:
            text = f"done after step {run.step} of {run.total_steps}"
            self.outbox.put(lambda: self._webhook.post("info", "end", text, facts))
            return
        said = without_secrets({"said": (str(error).splitlines() or [type(error).__name__])[0]})["said"]
        if isinstance(error, Stopped | KeyboardInterrupt):
            self.outbox.put(lambda: self._webhook.post("info", "stopped", f"stopped: {said}", facts))
        else:
            failed = f"failed after step {run.step}: {said}"
            self.outbox.put(lambda: self._webhook.post("error", "error", failed, facts))

    @staticmethod
    def _facts(run: Run) -> dict[str, Any]:
        return {"step": run.step, "total_steps": run.total_steps, "output_dir": str(run.output_dir)}


def _nothing() -> None:
    """What a webhook is opened and closed with."""
