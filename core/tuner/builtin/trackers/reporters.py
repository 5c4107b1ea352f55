"""Who is told what happens in a run: one tracker, or one webhook, each behind an outbox of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tuner.builtin.trackers.media import is_shown
from tuner.builtin.trackers.outbox import PATIENCE, Outbox
from tuner.errors import Stopped
from tuner.train.checkpoint import without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tuner.builtin.trackers.services import Service
    from tuner.builtin.trackers.webhook import Webhook
    from tuner.run import Run
    from tuner.validate.results import Validation


def nothing() -> None:
    """What a webhook is opened and closed with."""


class Reporter(Protocol):
    """What is told. None of these waits for the service."""

    outbox: Outbox

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of the local log."""

    def validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """What a validation made."""

    def checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint is whole."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """The run is over."""


class TrackerReporter:
    """Tells a tracker."""

    def __init__(self, run: Run, name: str, service: Service, opened: Callable[[str], None]) -> None:
        """Open the tracker; ``opened`` is called with the id of its run."""
        self._service = service
        self.outbox = Outbox(f"report_to {name}", run.log, lambda: opened(service.open()), service.close)

    def line(self, line: Mapping[str, Any]) -> None:
        """Its numbers."""
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        self.outbox.put(lambda: self._service.log(numbers, step))

    def validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Its pictures and videos; the numbers come with the step's line."""
        mark = f"@{run.variant}" if run.variant else ""
        for path in filter(is_shown, validation.media):
            name, step = f"{plugin}/{path.name}{mark}", run.step
            self.outbox.put(lambda name=name, path=path, step=step: self._service.show(name, path, step))  # type: ignore[misc]

    def checkpoint(self, run: Run, path: Path) -> None:
        """Nothing."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """It is closed when all is sent."""


class WebhookReporter:
    """Posts to a webhook."""

    def __init__(self, run: Run, webhook: Webhook) -> None:
        """Post that the run begins."""
        self._webhook = webhook
        text = f"started, {run.total_steps} steps, in {run.output_dir}"
        facts = self._facts(run)
        self.outbox = Outbox("webhook_config", run.log, nothing, nothing)
        self.outbox.put(lambda: webhook.post("info", "start", text, facts))

    def line(self, line: Mapping[str, Any]) -> None:
        """The line, where ``log_level`` is ``debug``."""
        text = f"step {line['step']}: loss {line['loss']:.4f}"
        self.outbox.put(lambda: self._webhook.post("debug", "log", text, dict(line)))

    def validation(self, run: Run, plugin: str, validation: Validation) -> None:
        """Its pictures and videos, where it made any."""
        files = list(filter(is_shown, validation.media))
        of = f" of the {run.variant} weights" if run.variant else ""
        text = f"step {run.step}: validation{of} by {plugin}"
        facts = {**self._facts(run), "plugin": plugin, "weights": run.variant, "metrics": dict(validation.metrics)}
        if files:
            self.outbox.put(lambda: self._webhook.post("info", "validation", text, facts, files))

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


def finish(reporters: Sequence[Reporter], *, at_once: bool) -> None:
    """Wait for all of them together, as long as :data:`PATIENCE`, or not at all."""
    for reporter in reporters:
        reporter.outbox.end()
    until = time.monotonic() + (0.0 if at_once else PATIENCE)
    for reporter in reporters:
        reporter.outbox.finish(until)
